from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.threat import LinfBall
from certify.verdict import SoundnessError, Verdict, check_witness, falsified, refutes

BALL = LinfBall(0.1)


def threshold(at: float = 0.5) -> nn.Module:
    """Two classes on one pixel: class 1 above the threshold."""
    model = nn.Linear(1, 2)
    model.weight.data = torch.tensor([[-1.0], [1.0]])
    model.bias.data = torch.tensor([at, -at])
    return model


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_certified_verdict_needs_a_positive_finite_margin(margin: float) -> None:
    with pytest.raises(SoundnessError, match="positive finite margin"):
        Verdict("certified", margin, "crown", 0.1)


def test_a_falsified_verdict_cannot_be_made_by_hand() -> None:
    with pytest.raises(SoundnessError, match=r"certify\.falsified"):
        Verdict("falsified", -1.0, "attack", 0.1)
    with pytest.raises(SoundnessError, match=r"certify\.falsified"):
        Verdict("falsified", -1.0, "attack", 0.1, witness=torch.zeros(1))


def test_only_a_falsified_verdict_has_a_witness_and_statuses_are_known() -> None:
    with pytest.raises(SoundnessError, match="only a falsified"):
        Verdict("unknown", -1.0, "crown", 0.1, witness=torch.zeros(1))
    with pytest.raises(ValueError, match="known: certified, falsified, unknown, misclassified"):
        Verdict("safe", 1.0, "crown", 0.1)  # type: ignore[arg-type]


def test_a_true_witness_makes_a_falsified_verdict_that_can_be_copied() -> None:
    x, witness, y = torch.tensor([0.55]), torch.tensor([0.46]), torch.tensor(1)
    verdict = falsified(threshold(), witness, x, y, BALL, method="attack", seconds=0.5, margin_lb=-2.0)
    assert verdict.status == "falsified" and torch.equal(verdict.witness, witness)
    assert replace(verdict, seconds=1.0).seconds == 1.0


@pytest.mark.parametrize(
    ("witness", "reason"),
    [
        ([0.44], "outside the linf ball"),
        ([0.52], "which is right"),
        ([0.46, 0.46], "shape and dtype"),
    ],
)
def test_a_false_witness_is_refused_with_its_reason(witness: list[float], reason: str) -> None:
    x, y = torch.tensor([0.55]), torch.tensor(1)
    with pytest.raises(SoundnessError, match=reason):
        check_witness(threshold(), torch.tensor(witness), x, y, BALL)
    assert not refutes(threshold(), torch.tensor(witness), x, y, BALL)


def test_a_point_one_rounding_step_outside_the_ball_is_no_witness() -> None:
    x, y = torch.tensor([0.55]), torch.tensor(1)
    low, _ = LinfBall(0.1).box(x)
    check_witness(threshold(), low, x, y, BALL)
    with pytest.raises(SoundnessError, match="outside"):
        check_witness(threshold(), torch.nextafter(low, torch.tensor(0.0)), x, y, BALL)


def test_logits_that_are_not_numbers_are_no_evidence() -> None:
    model = threshold()
    model.bias.data[0] = math.nan
    with pytest.raises(SoundnessError, match="not finite"):
        check_witness(model, torch.tensor([0.46]), torch.tensor([0.55]), torch.tensor(1), BALL)


def test_a_witness_is_judged_in_evaluation_mode_and_the_flags_come_back() -> None:
    model = nn.Sequential(nn.Dropout(1.0), threshold()).train()
    model[1].eval()
    check_witness(model, torch.tensor([0.46]), torch.tensor([0.55]), torch.tensor(1), BALL)
    assert model.training and model[0].training and not model[1].training
