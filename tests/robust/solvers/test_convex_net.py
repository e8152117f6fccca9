"""The convex network: its losses are those of the network, hold on the whole ball, and nothing trained beats them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from robust.solvers.convex_net import ConvexNet


def problem(count: int = 12) -> tuple[Tensor, Tensor]:
    """Points of the plane, labels of an exclusive or, one of them wrong."""
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    y = (points[:, 0] * points[:, 1]).sign()
    y[0] *= -1
    return points, y


def hinge(network, x: Tensor, y: Tensor) -> Tensor:
    return (1 - y * network(x).squeeze(1)).clamp(min=0).detach()


def objective(network, x: Tensor, y: Tensor, decay: float) -> Tensor:
    weights = sum(p.square().sum() for p in network.parameters())
    return (1 - y * network(x).squeeze(1)).clamp(min=0).mean() + decay / 2 * weights


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.2])
def test_the_reported_losses_are_the_networks_worst_ones_over_the_ball(eps):
    x, y = problem()
    fit = ConvexNet(eps=eps, decay=0.1, patterns=20)(x, y)
    assert fit.lower - 1e-9 <= fit.value <= fit.lower * (1 + 2e-4)
    assert len(fit.network[0].weight) > 1 and fit.hinge.min() < 0.5 < 0.8 < fit.hinge.max()
    # Within the ball the network is linear around each training point, so a corner is the worst.
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    worst = torch.stack([hinge(fit.network, x + eps * corner, y) for corner in corners]).amax(0)
    torch.testing.assert_close(worst, fit.hinge, rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        inside = eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
        assert (hinge(fit.network, x + inside, y) <= fit.hinge + 1e-6).all()
    if eps == 0:
        torch.testing.assert_close(float(objective(fit.network, x, y, 0.1).detach()), fit.value, rtol=1e-6, atol=1e-9)


def test_gradient_descent_on_a_network_of_the_same_kind_never_gets_below_the_bound():
    x, y = problem(8)
    # With 300 samples all 16 patterns of eight points of the plane are among them.
    fit = ConvexNet(decay=0.02, patterns=300)(x, y)
    best = float("inf")
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(2, 12, bias=False), nn.ReLU(), nn.Linear(12, 1, bias=False)).double()
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(600):
            optimizer.zero_grad()
            loss = objective(network, x, y, 0.02)
            loss.backward()
            optimizer.step()
        best = min(best, float(loss.detach()))
    assert fit.lower - 1e-6 <= best <= 1.5 * fit.value


def test_a_larger_radius_or_decay_costs_more():
    x, y = problem()
    values = [ConvexNet(eps=eps, decay=0.01, patterns=15)(x, y).value for eps in (0.0, 0.1, 0.3)]
    assert values == sorted(values) and values[0] < values[2]
    assert ConvexNet(decay=0.1, patterns=15)(x, y).value > values[0]


def test_a_hopeless_radius_leaves_a_network_that_says_nothing():
    x, y = problem()
    fit = ConvexNet(eps=50.0, decay=0.01, patterns=5)(x, y)
    assert fit.value == pytest.approx(1.0) and not fit.network(x).any()


def test_bad_input_and_an_open_gap_are_refused():
    x, y = problem()
    with pytest.raises(ValueError, match=r"expected labels -1 and 1, got \[0.0, 1.0\]"):
        ConvexNet()(x, (y + 1) / 2)
    with pytest.raises(RuntimeError, match=r"after 1 linear programs the gap is .*; raise rounds or tolerance"):
        ConvexNet(rounds=1, patterns=10, decay=0.01)(x, y)
    with pytest.raises(ValueError, match="expected eps >= 0, decay > 0"):
        ConvexNet(decay=0.0)
