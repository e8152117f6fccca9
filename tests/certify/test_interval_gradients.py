"""Gradients of interval propagation that are written by hand, against autograd through the textbook formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.input_gradient import way
from certify.bounds.interval import interval_walk, interval_walk_with_points
from certify.interval import BoxesAndPoints, Interval
from certify.ops.affine import Conv2d, Linear, conv2d
from certify.ops.relu import ReLU
from certify.tracing import capture
from tests.certify.networks import INPUT, KINDS, VARIANTS, network

BOXES, POINTS = 3, 2

# (channels in, out, kernel, stride, padding, dilation, groups)
FORMS = {
    "turned": (3, 5, 4, 1, 0, 1, 1),
    "turned, padded": (3, 5, 4, 1, 2, 1, 1),
    "turned, padded unevenly": (2, 3, 4, 1, (0, 3), 1, 1),
    "turned, dilated": (3, 5, 4, 1, 1, 2, 1),
    "turned, most channels": (16, 4, 4, 1, 0, 1, 1),
    "padded beyond the kernel": (3, 5, 4, 1, 4, 1, 1),
    "too many channels": (17, 4, 4, 1, 0, 1, 1),
    "other kernel": (3, 5, 3, 1, 1, 1, 1),
    "uneven kernel": (3, 5, (4, 3), 1, 1, 1, 1),
    "strided": (3, 5, 4, 2, 1, 1, 1),
    "point": (20, 7, 1, 2, 0, 1, 1),
    "image": (1, 6, 3, 1, 1, 1, 1),
    "strided along the height": (3, 5, 4, (2, 1), 1, 1, 1),
    "grouped": (4, 6, 4, 1, 1, 1, 2),
    "everything": (4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2),
}


WAYS = {"turned": "turn", "strided": "interleave", "point": "interleave", "image": "fold"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(form: str, bias: bool) -> Conv2d:
    channels, out, kernel, stride, padding, dilation, groups = FORMS[form]
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    weight = draw(out, channels // groups, height, width, seed=1).requires_grad_()
    shift = draw(out, seed=2).requires_grad_() if bias else None
    return conv2d(weight, shift, stride, padding, dilation, groups, (channels, 11, 10))


def gradients(op: Conv2d | Linear, outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed weighted sum of centres and radii in the inputs and the parameters."""
    loss = sum((draw(*value.shape, seed=3 + k).to(value.dtype) * value).sum() for k, value in enumerate(outputs))
    parameters = [op.weight] if op.bias is None else [op.weight, op.bias]
    return list(torch.autograd.grad(loss, inputs + parameters))  # type: ignore[arg-type]


def check(op: Conv2d | Linear, shape: tuple[int, ...]) -> None:
    center = draw(BOXES + POINTS, *shape, seed=5).requires_grad_()
    radius = draw(BOXES, *shape, seed=6).abs().requires_grad_()
    found = op.interval_and_points(BoxesAndPoints(center, radius))
    expected = op.forward(center), op.absolute_part().forward(radius)
    torch.testing.assert_close((found.values, found.radius), expected, rtol=0, atol=1e-11)
    ours = gradients(op, (found.values, found.radius), [center, radius])
    theirs = gradients(op, expected, [center, radius])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_convolution_are_those_of_its_centre_and_its_radius(form: str, bias: bool):
    op = conv(form, bias)
    assert way(op.weight, op.form) == WAYS.get(form.partition(",")[0])
    check(op, op.in_shape)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradients_of_a_dense_layer_are_those_of_its_centre_and_its_radius(
    rows: int, bias: bool, pieces: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("certify.affine_intervals.WEIGHTS", 63 // pieces + 3)
    op = Linear(draw(7, 9, seed=1).requires_grad_(), draw(7, seed=2).requires_grad_() if bias else None)
    center, radius = draw(rows, 9, seed=5).requires_grad_(), draw(rows, 9, seed=6).abs().requires_grad_()
    found = op.interval(Interval(center, radius))
    expected = op.forward(center), F.linear(radius, op.weight.abs())
    torch.testing.assert_close((found.center, found.radius), expected, rtol=0, atol=1e-12)
    ours = gradients(op, (found.center, found.radius), [center, radius])
    torch.testing.assert_close(ours, gradients(op, expected, [center, radius]), rtol=0, atol=1e-12)


def test_a_large_dense_layer_in_float32_has_the_values_and_gradients_of_float64(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("certify.affine_intervals.WEIGHTS", 50_000)
    values = draw(50, 500, seed=5), draw(50, 500, seed=6).abs(), draw(300, 500, seed=1), draw(300, seed=2)
    found = []
    for dtype in (torch.float32, torch.float64):
        center, radius, weight, bias = (value.to(dtype).requires_grad_() for value in values)
        op = Linear(weight, bias)
        out = op.interval(Interval(center, radius))
        found.append([out.center, out.radius, *gradients(op, (out.center, out.radius), [center, radius])])
    for single, double in zip(*found, strict=True):
        assert (single - double).abs().max() < 1e-5 * double.abs().max()


@pytest.mark.parametrize("wanted", ["center", "radius", "weight"])
def test_a_convolution_gives_the_gradients_that_are_asked_for_alone(wanted: str):
    op = conv("turned", bias=True)
    values = {"center": draw(2, *op.in_shape), "radius": draw(2, *op.in_shape, seed=6).abs(), "weight": op.weight}
    asked = values[wanted].requires_grad_()
    out = op.interval(Interval(values["center"], values["radius"]))
    reference = op.forward(values["center"]), op.absolute_part().forward(values["radius"])
    ours, theirs = (
        torch.autograd.grad((c.sin() + r.sin()).sum(), asked) for c, r in ((out.center, out.radius), reference)
    )
    torch.testing.assert_close(ours, theirs)


def test_relu_of_boxes_and_points_is_that_of_their_ends_and_so_are_its_gradients():
    # More numbers than one piece has, stable and unstable neurons, and ends that are exactly 0.
    center, radius = draw(6, 300, 100, seed=1), draw(4, 300, 100, seed=2).abs()
    center[:4, 0], center[:4, 1] = radius[:, 0], -radius[:, 1]
    radius[:, 2] = 0.0
    center.requires_grad_(), radius.requires_grad_()
    found = ReLU().interval_and_points(BoxesAndPoints(center, radius))
    lb, ub = (F.relu(center[:4] - radius), F.relu(center[:4] + radius))
    expected = torch.cat([(lb + ub) / 2, F.relu(center[4:])]), (ub - lb) / 2
    torch.testing.assert_close((found.values, found.radius), expected, rtol=0, atol=1e-14)
    stable = ((center[:4] - radius) > 0) | ((center[:4] + radius) <= 0)
    assert torch.equal(found.boxes.lb > 0, center[:4] - radius > 0)
    assert torch.equal(found.boxes.center[stable], F.relu(center[:4])[stable])
    weights = [draw(*value.shape, seed=7) for value in expected]
    ours, theirs = (
        torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, pair, strict=True)), [center, radius])  # type: ignore[arg-type]
        for pair in ((found.values, found.radius), expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_relu_of_a_box_holds_the_relu_of_its_ends_in_float32_to_the_last_bit(scale: float):
    center, radius = (draw(50000, 1) * scale).float(), (draw(50000, 1, seed=1).abs() * scale).float()
    # Ends next to 0, where a rounded middle of c and r would miss the upper one.
    center[:1000] = torch.nextafter(-radius[:1000], torch.zeros(()))
    found = ReLU().interval(Interval(center, radius))
    upper = F.relu(center.double() + radius.double()).float()
    assert bool((found.radius >= 0).all()) and bool((found.ub >= upper * (1 - 2**-22)).all())
    assert torch.equal(found.ub > 0, center + radius > 0)


@pytest.mark.parametrize("name", KINDS | VARIANTS)
def test_points_that_go_beside_boxes_change_neither(name: str):
    graph = capture(network([(KINDS | VARIANTS)[name]], 0).double(), torch.zeros(1, *INPUT, dtype=torch.float64))
    snapshot = graph.snapshot()
    box = Interval(draw(BOXES, *INPUT), draw(BOXES, *INPUT, seed=1).abs() / 10)
    points = draw(POINTS, *INPUT, seed=2)
    found, found_boxes = interval_walk_with_points(snapshot, BoxesAndPoints.of(box, points))
    expected, boxes = interval_walk(snapshot, box)
    torch.testing.assert_close(found.points, snapshot(points))
    torch.testing.assert_close((found.boxes.center, found.boxes.radius), (expected.center, expected.radius))
    assert found_boxes.keys() == boxes.keys()
    for place, value in boxes.items():
        torch.testing.assert_close((found_boxes[place].lb, found_boxes[place].ub), (value.lb, value.ub))
