"""SiLU: sampled points never leave its interval and its lines, from thin to wide boxes, in both precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.threat import LinfBall
from certify import bound
from certify.interval import Interval
from certify.op import Box
from certify.ops.silu import LARGEST_CURVATURE, LOWEST, LOWEST_AT, SiLU
from certify.tracing import capture


def boxes(dtype):
    generator = torch.Generator().manual_seed(0)
    center = 6 * torch.randn(4000, dtype=torch.float64, generator=generator)
    radius = 10 ** (-9 + 10 * torch.rand(4000, dtype=torch.float64, generator=generator))
    special = torch.tensor([[LOWEST_AT, 0.0], [0.0, 0.0], [LOWEST_AT, 1e-3], [0.0, 1.0554], [0.0, 30.0], [80.0, 1.0]])
    center, radius = (torch.cat([v, s.double()]) for v, s in zip((center, radius), special.T, strict=True))
    return (center - radius).to(dtype), (center + radius).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_points_never_escape_the_interval_and_the_lines(dtype):
    lb, ub = boxes(dtype)
    share = torch.linspace(0, 1, 301, dtype=torch.float64)[:, None]
    point = (lb.double() + share * (ub.double() - lb.double())).clamp(lb.double(), ub.double())
    value = F.silu(point)
    box = SiLU().interval(Interval.from_box(lb, ub))
    slack = 4 * torch.finfo(dtype).eps * (1 + lb.abs() + ub.abs()).double()
    assert (value >= box.lb.double() - slack).all() and (value <= box.ub.double() + slack).all()
    lines = SiLU().lines(Box(lb, ub))
    lower = lines.lower_slope.double() * point + lines.lower_intercept.double()
    upper = lines.upper_slope.double() * point + lines.upper_intercept.double()
    assert (lower <= value).all() and (value <= upper).all()
    assert ((upper - lower) <= 0.7 + 2 * (ub - lb).double()).all()


def test_the_constants_are_on_the_safe_side():
    fine = torch.linspace(-20, 20, 4_000_001, dtype=torch.float64)
    value = F.silu(fine)
    assert value.min() >= LOWEST > value.min() - 1e-6
    assert (fine.relu() - value).max() <= -LOWEST
    gate = torch.sigmoid(fine)
    curvature = gate * (1 - gate) * (2 + fine * (1 - 2 * gate))
    assert curvature.abs().max() <= LARGEST_CURVATURE


@pytest.mark.parametrize("method", ["ibp", "crown_ibp", "crown", "alpha_crown"])
@pytest.mark.parametrize("eps", [0.0, 0.02, 0.2])
def test_points_of_the_ball_stay_within_the_bounds_of_a_network(method, eps):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 8), nn.SiLU(), nn.Linear(8, 3)
    ).eval()
    x = torch.rand(2, 1, 5, 5)
    lb, ub = bound(net, x, LinfBall(eps), method=method)
    for _ in range(300):
        corner = (x + eps * torch.randn_like(x).sign() * torch.rand(()).round()).clamp(0, 1)
        z = net(corner)
        assert (lb - 1e-5 <= z).all() and (z <= ub + 1e-5).all()
    if eps == 0:
        torch.testing.assert_close(lb, net(x), rtol=1e-3, atol=1e-3)


def test_a_call_of_the_function_is_captured_too():
    class Net(nn.Module):
        def forward(self, x):
            return F.silu(x.flatten(1))

    x = torch.randn(3, 2, 2)
    torch.testing.assert_close(capture(Net(), x).snapshot()(x), F.silu(x.flatten(1)))
