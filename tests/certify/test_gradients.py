"""Bounds are differentiable in the parameters, and their gradients are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import L2Ball, LinfBall
from certify.affine_intervals import LinearInterval
from certify.bounds.bound import bound
from certify.ops.relu import _ReLUInterval
from certify.spec import margin_spec
from certify.tracing import capture


def tiny(kind: str) -> nn.Module:
    """Network of a few parameters in float64, away from kinks."""
    torch.manual_seed(3)
    middle = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(0.1),
        "sigmoid": nn.Sigmoid(),
        "max_pool": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, stride=1)),
        "batch_norm": nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()),
    }[kind]
    sample = nn.Sequential(nn.Conv2d(1, 2, 2), middle, nn.Flatten())
    size = sample.eval()(torch.zeros(1, 1, 3, 3)).shape[1]
    return nn.Sequential(sample, nn.Linear(size, 3), nn.ReLU(), nn.Linear(3, 3)).double().eval()


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.2)], ids=lambda b: b.norm)
@pytest.mark.parametrize("method", ["ibp", "crown_ibp", "crown"])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "sigmoid", "max_pool", "batch_norm"])
def test_gradients_of_bounds_match_finite_differences(kind: str, method: str, ball: LinfBall | L2Ball) -> None:
    model = tiny(kind)
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    graph = capture(model, x)
    spec = margin_spec(torch.tensor([0, 2]), 3, torch.float64)
    parameters = list(model.parameters())

    def lower(*values: Tensor) -> Tensor:
        # gradcheck perturbs its inputs in place; they are the live parameters.
        return bound(graph, x, ball, spec, method).lb

    assert torch.autograd.gradcheck(lower, parameters, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_the_interval_rule_of_relu_has_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    radius = torch.rand(4, 5, dtype=torch.float64, generator=generator).add(0.01).requires_grad_()
    assert torch.autograd.gradcheck(_ReLUInterval.apply, (center, radius))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_interval_rule_of_a_dense_layer_has_the_gradient_of_its_formula(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    center, radius, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 4), (3, 4), (2, 4), (2,))
    )
    assert torch.autograd.gradcheck(LinearInterval.apply, (center, radius, weight, bias if has_bias else None))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda c, r: LinearInterval.apply(c, r, frozen, None), (center, radius))


def test_a_bound_without_unstable_neurons_gives_no_nan_gradient() -> None:
    model = tiny("relu")
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    for method in ("ibp", "crown_ibp", "crown"):
        model.zero_grad()
        bound(model, x, LinfBall(0.0), method=method).lb.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
