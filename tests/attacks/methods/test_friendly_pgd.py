"""Early-stopped PGD: when examples stop, and that they keep their places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks.methods.friendly_pgd import FriendlyPGD
from attacks.methods.pgd import PGD
from attacks.threat import LinfBall

THRESHOLDS = torch.tensor([0.95, 0.05, 0.25, 0.99, 0.15])
"""Moves, in units of the radius, at which the examples below are no longer class 0."""

EPS = 0.1


def problem() -> tuple[Tensor, Tensor]:
    """One pixel at 0.5 per example; its own threshold travels in a second one, which has no gradient."""
    x = torch.stack([torch.full((5,), 0.5), 0.5 + EPS * THRESHOLDS], 1).double()
    return x.view(5, 1, 1, 2), torch.zeros(5, dtype=torch.long)


def model(x: Tensor) -> Tensor:
    pixel, threshold = x.flatten(1).unbind(1)
    beyond = pixel - threshold.detach()
    return torch.stack([torch.zeros_like(beyond), beyond], 1)


def attack(**changes) -> FriendlyPGD:
    return FriendlyPGD(**{"steps": 8, "step_size": 0.1, "noise": 0.0, "start": "clean", **changes})


@pytest.mark.parametrize(("patience", "extra"), [(0, 0), (1, 1), (3, 3)])
def test_an_example_stops_so_many_steps_behind_the_first_wrong_point_and_keeps_its_place(patience, extra):
    x, y = problem()
    moves = (attack(patience=patience)(model, x, y, LinfBall(EPS)) - x).flatten(1)
    # Wrong for the first time behind ceil(threshold / 0.1) steps; 8 steps are all there are.
    steps = [min(n + extra, 8) for n in (10, 1, 3, 10, 2)]
    torch.testing.assert_close(moves[:, 0], EPS * 0.1 * torch.tensor(steps, dtype=torch.float64))
    assert not moves[:, 1].any()


def test_with_endless_patience_and_no_noise_it_is_pgd(small_net, examples):
    net, x = small_net(4), examples(7)
    y = net(x).argmax(1)
    for loss in ("cross_entropy", "kl"):
        ours = FriendlyPGD(steps=4, step_size=0.3, patience=99, noise=0.0, loss=loss)
        theirs = PGD(steps=4, step_size=0.3, loss=loss, keep="last")
        found = [a(net, x, y, LinfBall(EPS), generator=torch.Generator().manual_seed(3)) for a in (ours, theirs)]
        torch.testing.assert_close(*found)


def test_examples_that_are_wrong_from_the_start_stay_there_and_noise_moves_the_others():
    x, y = problem()
    wrong = attack(start="clean")(lambda x: model(x).flip(1), x, y, LinfBall(EPS))
    torch.testing.assert_close(wrong[1:2], x[1:2])
    noisy = attack(noise=0.01)
    first, second = (noisy(model, x, y, LinfBall(EPS), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert (first != second).flatten(1).any(1).all()


def test_the_pace_scales_every_step():
    x, y = problem()
    pace = torch.tensor([0.5, 1.0, 1.0, 2.0, 1.0])
    moves = (attack(steps=1, patience=9)(model, x, y, LinfBall(EPS), pace=pace) - x).flatten(1)[:, 0]
    torch.testing.assert_close(moves, 0.1 * EPS * pace.double())
