"""The verifier of auto_LiRPA's bounds: it agrees with ours, reaches further, and is not believed blindly."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import PGD, L1Ball, L2Ball, LinfBall
from attacks.threat import Ball
from certify import VERIFIERS, bound, constant_arithmetic, margin_spec
from certify.constant_arithmetic import without_broadcasts
from certify.op import UnsupportedOp
from certify.tracing import CaptureError
from certify.verdict import SoundnessError
from certify.verifiers.auto_lirpa import AutoLiRPA
from robust.normalize import Normalize

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


class Formula(nn.Module):
    """Any formula of the input and of constants of given shapes."""

    def __init__(self, formula: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.formula, self.count = formula, len(shapes)
        noise = torch.Generator().manual_seed(3)
        for number, shape in enumerate(shapes):
            self.register_buffer(f"c{number}", 0.3 + 0.5 * torch.rand(shape, generator=noise))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *(getattr(self, f"c{number}") for number in range(self.count)))


PER_CHANNEL = (3, 1, 1)
NORMALISATIONS: dict[str, Callable[[], nn.Module]] = {
    "the layer of the suite": lambda: Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
    "constants [C, 1, 1]": lambda: Formula(lambda x, a, b: (x - a) / b, PER_CHANNEL, PER_CHANNEL),
    "constants [1, C, 1, 1]": lambda: Formula(lambda x, a, b: (x - a) / b, (1, *PER_CHANNEL), (1, *PER_CHANNEL)),
    "constants [C], viewed": lambda: Formula(lambda x, a, b: (x - a.view(1, -1, 1, 1)) * b[:, None, None], (3,), (3,)),
    "numbers": lambda: Formula(lambda x: (x - 0.3) / 0.35),
    "constants from the left": lambda: Formula(lambda x, a, b: b * (a - x), PER_CHANNEL, PER_CHANNEL),
    "methods": lambda: Formula(lambda x, a, b: x.sub(a).mul(b).add(0.1), PER_CHANNEL, ()),
}


def of_colour(first: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    middle = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(first, *middle, nn.Flatten(), nn.Linear(64, 5)).eval()


def colour_images(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return x, model(x).argmax(1)


def margins_of_points(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """Smallest margins `[B]` at random points of the ball and at those of an attack."""
    noise = torch.Generator().manual_seed(6)
    points = [ball.sample(x, noise) for _ in range(20)] + [PGD(steps=20)(model, x, y, ball)]
    spec = margin_spec(y, model(x).shape[1])
    return torch.stack([(spec @ model(p).unsqueeze(2)).squeeze(2).amin(1) for p in points]).amin(0)


@pytest.mark.parametrize("ball", [LinfBall(1 / 255), L2Ball(0.1)], ids=lambda ball: ball.norm)
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_any_spelling_of_a_normalisation_is_bounded_as_by_our_crown(name: str, ball: Ball) -> None:
    """The package's own treatment of constants fails (a bare AssertionError with [C, 1, 1]) or, in l2, is unsound."""
    model = of_colour(NORMALISATIONS[name]())
    x, y = colour_images(model)
    found = torch.tensor([v.margin_lb for v in AutoLiRPA()(model, x, y, ball)])
    expected = bound(model, x, ball, spec=margin_spec(y, 5), method="crown").lb.amin(1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)
    assert (found <= margins_of_points(model, x, y, ball) + 1e-6).all()


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize(
    "first",
    [
        Formula(lambda x: (x - 0.5) / 0.5),
        Formula(lambda x: (x.flatten(1) - 0.5) / 0.5),
        Formula(lambda x: torch.relu(x - 0.5)),
        Formula(lambda x: x + torch.relu(x)),
        Formula(lambda x: torch.sigmoid(8 * x)),
        nn.Identity(),
    ],
    ids=["numbers", "flat numbers", "relu", "residual", "sigmoid", "none"],
)
def test_an_l2_ball_is_never_taken_for_its_centre(first: nn.Module, method: str) -> None:
    """What reads the input and is no linear layer used the centre for the ball: points got past what was certified."""
    for seed in (5, 16):
        torch.manual_seed(seed)
        hidden = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
        model = nn.Sequential(first, nn.Flatten(), *hidden).eval()
        x = torch.rand(20, 1, 4, 4)
        y = model(x).argmax(1)
        for eps in (0.1, 0.5):
            ball = L2Ball(eps, pixel_range=None)
            lower = torch.tensor(
                [v.margin_lb for v in VERIFIERS.parse(f"auto_lirpa:method={method}")(model, x, y, ball)]
            )
            assert (lower <= margins_of_points(model, x, y, ball) + 1e-6).all()


def test_a_rewritten_network_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_colour(Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert without_broadcasts(model, x) is not model
        real = constant_arithmetic._line
        monkeypatch.setattr(
            constant_arithmetic,
            "_line",
            lambda *of: (found := real(*of)) and (found[0], found[1] * 1.0001, found[2]),
        )
        assert without_broadcasts(model, x) is model


class Changed(nn.Module):
    """A network whose output is changed by a function of the input and of that output."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.change = gated(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x, self.body(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, z: z if x[0, 0, 0, 0] > 0.5 else -z, "depends on values: Converting a tensor to a Python boolean"),
        (lambda x, z: z * x.max().item(), "depends on values: Converting a tensor to a Python number"),
        (lambda x, z: z / x.shape[0], "depend on the batch that it comes in"),
        (lambda x, z: z - z.mean(0), "depend on the batch that it comes in"),
        (lambda x, z: z + torch.rand(5), "or are random"),
    ],
    ids=["branch", "number", "batch size", "batch", "noise"],
)
def test_a_trace_that_holds_for_one_batch_only_proves_nothing(change: Any, message: str) -> None:
    """The package keeps the branch and the numbers of the traced batch as constants, and would certify that network."""
    model = Changed(change).eval()
    x, _ = images(model.body)
    with pytest.raises(CaptureError, match=message):
        AutoLiRPA(batch_size=1 if "values" in message else 16)(model, x, model(x).argmax(1), LinfBall(1e-3))


def test_what_the_package_dies_of_is_one_line() -> None:
    model = of_colour(Formula(lambda x, a: x * a, (3, 8, 8)))  # one number per pixel
    x, y = colour_images(model)
    with pytest.raises(UnsupportedOp, match=r"cannot bound the network either \(AssertionError: without a message\)"):
        AutoLiRPA()(model, x, y, LinfBall(0.01))


def test_misuse_is_answered_in_one_line() -> None:
    model = gated()
    x, y = images(model)
    with pytest.raises(ValueError, match="the threat model is an l1 ball; this verifier knows linf, l2"):
        AutoLiRPA()(model, x, y, L1Ball(1.0))
    with pytest.raises(UnsupportedOp, match="auto_LiRPA cannot bound the network either"):
        AutoLiRPA()(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.GELU()).eval(), x, y, LinfBall(0.1))
