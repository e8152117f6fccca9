"""Legal modules whose forward is another function than it looks: refused in words, or bounded as what they compute.

Every case has a point of the ball that the model's own forward classifies wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune, spectral_norm, weight_norm

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify import tracing
from certify.interval import BallImage, Interval
from certify.lipschitz.local import Search, local_lipschitz
from certify.op import UnsupportedOp
from certify.tracing import CaptureError, capture
from certify.verifier import VERIFIERS


@dataclass
class Case:
    model: nn.Module
    x: Tensor
    ball: Ball
    wrong: Tensor
    """A point of the ball that is not of class `label`."""
    label: int = 0


class TwoLayers(nn.Module):
    def __init__(self, inputs: int, between: Callable[[Tensor], Tensor] = nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        self.features, self.head, self.between = nn.Linear(inputs, 2), nn.Linear(2, 2), between

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x.flatten(1))
        return self.head(self.between(h))


def clipped(h: Tensor) -> Tensor:
    return torch.cat([h[:, :1].clamp(max=0.9), h[:, 1:]], 1)


@torch.no_grad()
def bright() -> Case:
    """Class 0 everywhere unless the first feature is clipped, which brighter images than noise are needed for."""
    net = TwoLayers(64)
    net.features.weight.fill_(1 / 64)
    net.features.bias.zero_()
    net.head.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    net.head.bias.copy_(torch.tensor([0.0, 0.85]))
    return Case(net, torch.full((1, 1, 8, 8), 0.93), LinfBall(0.07), torch.ones(1, 1, 8, 8))


def hook_on_a_layer() -> Case:
    case = bright()
    case.model.features.register_forward_hook(lambda module, inputs, output: clipped(output))  # type: ignore[operator]
    return case


def hook_before_a_layer() -> Case:
    case = bright()
    case.model.head.register_forward_pre_hook(lambda module, inputs: (clipped(inputs[0]),))  # type: ignore[operator]
    return case


def hook_on_the_model() -> Case:
    case = bright()
    case.model.register_forward_hook(lambda module, inputs, z: torch.cat([z[:, :1].clamp(max=1.8), z[:, 1:]], 1))
    return case


def another_forward_of_a_layer() -> Case:
    case = bright()
    usual = case.model.features.forward  # type: ignore[union-attr]
    case.model.features.forward = lambda x: clipped(usual(x))  # type: ignore[union-attr, method-assign]
    return case


def another_forward_of_the_model() -> Case:
    case = bright()
    usual = case.model.forward
    case.model.forward = lambda x: (lambda z: torch.cat([z[:, :1].clamp(max=1.8), z[:, 1:]], 1))(usual(x))  # type: ignore[method-assign]
    return case


class ClippedConv(nn.Conv2d):
    def _conv_forward(self, *arguments: Tensor | None) -> Tensor:  # type: ignore[override]
        return super()._conv_forward(*arguments).clamp(max=0.9)  # type: ignore[arg-type]


@torch.no_grad()
def convolution_with_a_computation_of_its_own() -> Case:
    conv = ClippedConv(1, 1, 1)
    conv.weight.fill_(1.0)
    conv.bias.zero_()  # type: ignore[union-attr]
    last = nn.Linear(1, 2)
    last.weight.copy_(torch.tensor([[2.0], [0.0]]))
    last.bias.copy_(torch.tensor([0.0, 1.83]))
    x = torch.full((1, 1, 1, 1), 0.95)
    # Clipped, class 1 wins; without the clip the brightest pixels are class 0.
    return Case(nn.Sequential(conv, nn.Flatten(), last), x, LinfBall(0.02), x, label=0)


@torch.no_grad()
def change_through_a_view() -> Case:
    def between(h: Tensor) -> Tensor:
        F.relu_(h[:, :1])
        return h

    net = TwoLayers(2, between)
    net.features.weight.copy_(torch.eye(2))
    net.features.bias.copy_(torch.tensor([0.5, 0.0]))
    net.head.weight.copy_(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    net.head.bias.copy_(torch.tensor([0.1, 0.0]))
    x, wrong = torch.tensor([[-0.95, 0.15]]), torch.tensor([[-0.95, -0.13]])
    return Case(net, x, LinfBall(0.3, (-1.0, 1.0)), wrong)


@torch.no_grad()
def batch_norm_of_sequences() -> Case:
    """Channels and positions of the same number, and logits far below 1."""
    norm, last = nn.BatchNorm1d(4), nn.Linear(16, 2)
    norm.weight.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    last.weight.zero_()
    last.weight[0, 1:4] = -3e-4
    last.bias.copy_(torch.tensor([6e-4, 0.0]))
    x = torch.full((1, 4, 4), 0.2)
    return Case(nn.Sequential(norm, nn.Flatten(), last), x, LinfBall(0.5), x + 0.5)


@torch.no_grad()
def negative_average() -> Case:
    net = nn.Sequential(nn.AvgPool2d(2, divisor_override=-4), nn.Flatten(), nn.Linear(4, 2))
    net[2].weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    net[2].bias.copy_(torch.tensor([3.0, 0.0]))  # type: ignore[operator]
    return Case(net, torch.full((1, 1, 4, 4), 0.3), LinfBall(0.6), torch.full((1, 1, 4, 4), 0.9))


def negative_average_function() -> Case:
    class Pooled(nn.Module):
        def __init__(self, last: nn.Module) -> None:
            super().__init__()
            self.last = last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.avg_pool2d(x, 2, divisor_override=-4).flatten(1))

    case = negative_average()
    return Case(Pooled(case.model[2]), case.x, case.ball, case.wrong)  # type: ignore[index]


@torch.no_grad()
def tiny_weights(ball: Ball) -> Case:
    """Squares of the weights are 0 in float32."""
    net = nn.Linear(4, 2)
    net.weight.copy_(1e-24 * torch.tensor([[1.0] * 4, [0.0] * 4]))
    net.bias.copy_(1e-24 * torch.tensor([-0.5, 0.0]))
    return Case(net, torch.full((1, 4), 0.3), ball, torch.full((1, 4), 0.05))


@torch.no_grad()
def tiny_first_layer() -> Case:
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    net[0].weight.copy_(1e-24 * torch.tensor([[1.0] * 4, [-1.0] * 4]))
    net[0].bias.copy_(1e-24 * torch.tensor([-0.5, 0.5]))  # type: ignore[operator]
    for place in (2, 4):
        net[place].weight.copy_(1e12 * torch.eye(2))
        net[place].bias.zero_()  # type: ignore[operator]
    return Case(net, torch.full((1, 4), 0.3), L2Ball(0.6), torch.full((1, 4), 0.05))


@torch.no_grad()
def small_entries_of_large_numbers() -> Case:
    """What a mixed-integer solver takes for 0."""
    net = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1), nn.ReLU(), nn.Linear(1, 2))
    net[0].weight.copy_(1e6 * torch.eye(50))
    net[0].bias.fill_(-1e5)  # type: ignore[operator]
    net[2].weight.fill_(9e-10)  # type: ignore[operator]
    net[2].bias.fill_(-0.02)  # type: ignore[operator]
    net[4].weight.copy_(torch.tensor([[-1e4], [0.0]]))
    net[4].bias.copy_(torch.tensor([120.0, 0.0]))  # type: ignore[operator]
    return Case(net, torch.full((1, 50), 0.05), LinfBall(0.95), torch.ones(1, 50))


CASES: dict[str, Callable[[], Case]] = {
    "hook on a layer": hook_on_a_layer,
    "hook before a layer": hook_before_a_layer,
    "hook on the model": hook_on_the_model,
    "another forward of a layer": another_forward_of_a_layer,
    "another forward of the model": another_forward_of_the_model,
    "change through a view": change_through_a_view,
    "batch norm of sequences": batch_norm_of_sequences,
    "negative average": negative_average,
    "negative average, as a function": negative_average_function,
    "tiny weights, l2": lambda: tiny_weights(L2Ball(0.6)),
    "tiny weights, linf": lambda: tiny_weights(LinfBall(0.3)),
    "tiny weights, l1": lambda: tiny_weights(L1Ball(1.2)),
    "tiny first layer": tiny_first_layer,
    "small entries of large numbers": small_entries_of_large_numbers,
}

OWN = [name for name in VERIFIERS.names() if name != "auto_lirpa"]


@pytest.mark.parametrize("name", CASES)
def test_no_verifier_certifies_a_ball_with_a_wrong_point(name: str) -> None:
    case = CASES[name]()
    model, y = case.model.eval(), torch.tensor([case.label])
    assert int(model(case.x).argmax(1)) == case.label != int(model(case.wrong).argmax(1))
    assert case.ball.contains(case.wrong, case.x).all()
    asked = 0
    for verifier in OWN:
        try:
            (verdict,) = VERIFIERS.parse(verifier)(model, case.x, y, case.ball)
        except (UnsupportedOp, CaptureError):
            asked += 1
            continue
        except ValueError as error:
            assert "the threat model is" in str(error), error
            continue
        asked += 1
        assert verdict.status != "certified", verifier
    assert asked >= 5


@torch.no_grad()
def test_a_convolution_with_a_computation_of_its_own_is_read_as_it_computes() -> None:
    case = convolution_with_a_computation_of_its_own()
    wide = 3 * torch.randn(50, 1, 1, 1)
    torch.testing.assert_close(capture(case.model, case.x).snapshot()(wide), case.model(wide))


def test_a_forward_with_autocast_of_its_own_is_refused_and_one_of_the_caller_is_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = self.layer(x)
            return z.float()

    model = Mixed().eval()
    with pytest.raises(CaptureError, match=r"switches torch\.autocast itself"):
        capture(model, torch.rand(1, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (verdict,) = VERIFIERS.parse("crown")(model.layer, torch.rand(1, 3), torch.tensor([0]), LinfBall(0.0))
    assert verdict.status in ("certified", "misclassified")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "prepared",
    [spectral_norm, weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["spectral_norm", "weight_norm", "prune"],
)
def test_hooks_of_torch_that_only_set_weights_are_no_obstacle(prepared: Callable[[nn.Linear], nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), prepared(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.rand(2, 1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(capture(model, x[:1]).snapshot()(x), model(x))


@torch.no_grad()
def test_a_graph_that_only_rounds_otherwise_is_accepted() -> None:
    """Folded into one layer, a convolution and its normalisation lose what float32 cannot hold."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
    conv.bias.fill_(1e4)  # type: ignore[union-attr]
    norm.running_mean.fill_(1e4)  # type: ignore[union-attr]
    norm.running_var.fill_(1e-4)  # type: ignore[union-attr]
    model, x = nn.Sequential(conv, norm, nn.Flatten()).eval(), torch.rand(8, 1, 1, 1)
    assert not tracing._agree(model(x), capture(model, x).snapshot()(x), 1e-3)


@pytest.mark.parametrize("method", ["interval", "crown", "recurjac"])
def test_local_constants_of_tiny_weights_are_no_less_than_the_gradient(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).eval().double()
    x = torch.rand(1, 4, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda v: model(v)[0], x)[:, 0].norm(dim=1)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(1e-100)  # the gradient's squares are 0 in float64
    found = local_lipschitz(model, x, L2Ball(1e-3), method=method, search=Search(samples=0))
    assert (found.ub[0] >= rows * 1e-200 * (1 - 1e-9)).all()


@pytest.mark.parametrize("weight, axis", [(1e-24, 1.0), (1e-24, 1e10), (1e-12, 1e-12), (1e10, 1e-24), (0.5, 0.25)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_image_of_a_ball_is_no_smaller_than_the_greatest_move(kind: str, weight: float, axis: float) -> None:
    x = torch.zeros(1, 3, 1, 1) if kind == "conv" else torch.zeros(1, 3)
    layer = nn.Conv2d(3, 2, 1, bias=False) if kind == "conv" else nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(weight)
    (node,) = capture(nn.Sequential(layer, nn.Flatten()), x).snapshot().nodes[1:2]
    ball = BallImage(x, torch.full_like(x, axis), torch.ones(1))
    radius = node.op.interval(Interval(x, torch.full_like(x, 10 * axis), ball)).radius.double()
    assert (radius >= 3**0.5 * weight * axis * (1 - 1e-5)).all()


@pytest.mark.parametrize("change", ["large values", "small logits"])
def test_a_graph_is_compared_on_large_values_and_by_every_logits_own_size(change: str) -> None:
    class Net(nn.Module):
        def __init__(self, changed: bool) -> None:
            super().__init__()
            self.layer, self.changed = nn.Linear(3, 2), changed

        def forward(self, x: Tensor) -> Tensor:
            x = x.clamp(max=1.5) if self.changed and change == "large values" else x
            z = self.layer(x) * torch.tensor([1.0, 1e-5])
            return z * torch.tensor([1.0, 0.5]) if self.changed and change == "small logits" else z

    torch.manual_seed(0)
    plain, changed = Net(False).eval(), Net(True).eval()
    changed.load_state_dict(plain.state_dict())
    probe = torch.rand(3, 3)
    graph = capture(plain, probe)
    tracing._check(graph, plain, probe)
    # As if the graph of `plain` had been read from `changed`, where float64 shows the same.
    with mock.patch.object(tracing, "_agree_in_float64", return_value=False), pytest.raises(CaptureError):
        tracing._check(graph, changed, probe)


def test_hooks_on_all_modules_are_refused() -> None:
    handle = register_module_forward_hook(lambda module, inputs, output: output)
    try:
        with pytest.raises(CaptureError, match="has forward hooks"):
            capture(nn.Sequential(nn.Linear(3, 2)), torch.rand(1, 3))
    finally:
        handle.remove()


def test_a_computation_put_on_one_convolution_has_no_rule() -> None:
    conv = nn.Conv2d(1, 2, 1)
    usual = conv._conv_forward
    conv._conv_forward = lambda *arguments: usual(*arguments).clamp(max=50)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedOp, match=r"no bound rule for nn\.Conv2d"):
        capture(nn.Sequential(conv, nn.Flatten()), torch.rand(1, 1, 1, 1))
