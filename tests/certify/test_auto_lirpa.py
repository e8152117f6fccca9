"""The verifier of auto_LiRPA's bounds: it agrees with ours, reaches further, and is not believed blindly."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import PGD, L1Ball, L2Ball, LinfBall
from attacks.threat import Ball
from certify import VERIFIERS, bound, margin_spec
from certify.op import UnsupportedOp
from certify.verdict import SoundnessError
from certify.verifiers.auto_lirpa import AutoLiRPA

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # the package is of 2022


class Gated(nn.Module):
    """A product of two values, for which the suite has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(64, 5), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.value(flat) * torch.sigmoid(self.gate(flat))


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    front = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*front, nn.Linear(256, 12), nn.Tanh(), nn.Linear(12, 5)).eval()


def gated() -> nn.Module:
    torch.manual_seed(1)
    return Gated().eval()


def images(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    y[-1] = (y[-1] + 1) % 5
    return x, y


@pytest.mark.parametrize(("name", "ours"), [("IBP", "ibp"), ("CROWN-IBP", "crown_ibp"), ("CROWN", "crown")])
def test_its_bounds_are_ours_where_both_have_rules(name: str, ours: str) -> None:
    model = convolutional()
    x, y = images(model)
    ball = LinfBall(0.004)
    verdicts = VERIFIERS.parse(f"auto_lirpa:method={name}")(model, x, y, ball)
    expected = bound(model, x, ball, spec=margin_spec(y, 5), method=ours).lb.amin(1)
    found = torch.tensor([v.margin_lb for v in verdicts[:-1]])
    # Lines of tanh are chosen by each package in its own way; interval bounds have no choices.
    torch.testing.assert_close(found, expected.detach()[:-1], atol=1e-5 if name == "IBP" else 2e-3, rtol=0)
    certified = [v.status for v in VERIFIERS.parse(ours)(model, x, y, ball)]
    clear = expected.abs() > 2e-3
    assert [v.status for v, sure in zip(verdicts, clear, strict=True) if sure] == [
        status for status, sure in zip(certified, clear, strict=True) if sure
    ]
    assert verdicts[-1].status == "misclassified"


@pytest.mark.parametrize("ball", [LinfBall(0.01), L2Ball(0.1)], ids=lambda ball: ball.norm)
def test_a_network_without_rules_here_is_certified_and_no_attack_gets_past(ball: Ball) -> None:
    model = gated()
    x, y = images(model, 12)
    with pytest.raises(UnsupportedOp, match="a product of two values"):
        VERIFIERS.parse("crown")(model, x, y, ball)
    verdicts = AutoLiRPA()(model, x, y, ball)
    certified = torch.tensor([v.status == "certified" for v in verdicts])
    assert certified.any() and {v.status for v in verdicts} >= {"misclassified"}
    points = PGD(steps=50, restarts=2)(model, x, y, ball)
    margins = (margin_spec(y, 5) @ model(points).unsqueeze(2)).squeeze(2).amin(1)
    lower = torch.tensor([v.margin_lb for v in verdicts])
    assert (margins[:-1] >= lower[:-1] - 1e-5).all() and (margins[certified] > 0).all()


def test_bounds_that_a_point_contradicts_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = AutoLiRPA._package_bounds

    def too_tight(self: AutoLiRPA, *arguments: Any) -> tuple[Tensor, Tensor]:
        low, high = real(self, *arguments)
        return (low + high) / 2 + 1e-3, high

    monkeypatch.setattr(AutoLiRPA, "_package_bounds", too_tight)
    model = gated()
    with pytest.raises(SoundnessError, match="do not hold at a point of the ball"):
        AutoLiRPA()(model, *images(model), LinfBall(0.01))


def test_a_margin_within_rounding_is_not_certified() -> None:
    """Logits of 1e9 whose difference float64 resolves, and the allowance does not."""
    model = gated()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.value.bias += 2e9
        model.value.bias[0] += 300
    x = torch.rand(2, 1, 8, 8)
    verdicts = AutoLiRPA()(model, x, model(x).argmax(1), LinfBall(0.01))
    assert {v.status for v in verdicts} == {"unknown"}


def test_a_margin_that_large_weights_cancel_to_is_not_certified() -> None:
    """The package sees a margin of 1e-4; float64 has lost that much where its weights of 1e13 were added up."""
    first, last = nn.Linear(64, 2), nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.rand(1, 64).expand(2, 64) * 1e13)
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        last.bias.copy_(torch.tensor([1e-4, 0.0]))
    x = torch.rand(2, 1, 8, 8)
    verdicts = AutoLiRPA()(nn.Sequential(nn.Flatten(), first, last).eval(), x, torch.zeros(2).long(), LinfBall(0.01))
    assert [(v.status, v.margin_lb > 0) for v in verdicts] == [("unknown", True)] * 2


def test_misuse_is_answered_in_one_line() -> None:
    model = gated()
    x, y = images(model)
    with pytest.raises(ValueError, match="the threat model is an l1 ball; this verifier knows linf, l2"):
        AutoLiRPA()(model, x, y, L1Ball(1.0))
    with pytest.raises(UnsupportedOp, match="auto_LiRPA cannot bound the network either"):
        AutoLiRPA()(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.GELU()).eval(), x, y, LinfBall(0.1))
