"""The verifier that multiplies eps by local Lipschitz constants of the margins."""

from __future__ import annotations

import pytest
import torch

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify.lipschitz.local import local_lipschitz
from certify.spec import margin_spec
from certify.verifiers.crown import CROWN
from certify.verifiers.lipschitz_margin import LipschitzMargin
from tests.certify.networks import CLASSES, INPUT, KINDS, network

BALLS = [LinfBall(0.01), L2Ball(0.05), L1Ball(0.2)]


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.norm)
@pytest.mark.parametrize("bounds", ["crown", "interval"])
def test_margins_hold_at_sampled_points_and_are_what_the_constants_say(ball: Ball, bounds: str):
    model = network([KINDS["relu"], KINDS["conv"], KINDS["relu"]], 0)
    x = torch.rand(6, *INPUT, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    logits = model(x).detach()
    y = logits.argmax(1)
    verdicts = LipschitzMargin(bounds)(model, x, y, ball)
    spec = margin_spec(y, CLASSES)
    margins = (spec @ logits.unsqueeze(2)).squeeze(2)
    constants = local_lipschitz(model, x, ball, "crown" if bounds == "crown" else "interval", spec, states="crown").ub
    expected = (margins - float(ball.eps) * constants).amin(1)
    found = torch.tensor([v.margin_lb for v in verdicts], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-4)
    assert {v.status for v in verdicts} <= {"certified", "unknown"}
    assert "certified" in {v.status for v in verdicts} or bounds == "interval"
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        points = ball.sample(x, generator)
        worst = (spec @ model(points).detach().unsqueeze(2)).squeeze(2).amin(1)
        assert bool((worst >= found - 1e-5).all())


def test_it_certifies_nothing_that_crown_does_not_nearly():
    model = network([KINDS["relu"]], 3)
    x = torch.rand(6, *INPUT, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    for eps in (0.005, 0.02, 0.05):
        ours, theirs = (v(model, x, y, LinfBall(eps)) for v in (LipschitzMargin(), CROWN()))
        assert sum(v.status == "certified" for v in ours) <= sum(v.status == "certified" for v in theirs)
