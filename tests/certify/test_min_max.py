"""MinMax in bounds: cases by hand, exactness where pairs cannot swap, and what rounding carries through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.threat import L2Ball, LinfBall
from certify import bound, capture
from certify.interval import Interval
from certify.op import Box
from certify.ops.min_max import MinMax
from certify.precision import rounding_at_points
from robust.min_max import MinMax as Layer


def vector(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def test_the_interval_of_a_pair_by_hand() -> None:
    out = MinMax().interval(Interval.from_box(vector(0, 1), vector(3, 2)))
    assert (out.lb.tolist(), out.ub.tolist()) == ([[1, 0]], [[3, 2]])


def test_the_lines_of_a_pair_by_hand() -> None:
    # d = a - b in [-2, 2]: max <= b + (d + 2) / 2 = (a + b) / 2 + 1, min >= a - (d + 2) / 2 = (a + b) / 2 - 1.
    A = torch.tensor([[[-1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    (through,), constant = MinMax().backward(A, [Box(vector(0, 0), vector(2, 2))])
    assert through.tolist() == [[[-0.5, -0.5]], [[0.5, 0.5]]]
    assert constant.flatten().tolist() == [-1, -1]


def test_bounds_are_exact_where_no_pair_can_swap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Layer(), nn.Linear(6, 3)).double()
    model[0].bias.data[:3] += 10
    x = torch.rand(5, 4, dtype=torch.float64)
    matrix = model[2].weight @ model[0].weight
    for ball, dual in ((LinfBall(0.1, None), 1), (L2Ball(0.1, None), 2)):
        expected = model(x) - 0.1 * matrix.norm(dual, dim=1)
        torch.testing.assert_close(bound(model, x, ball, method="crown").lb, expected)


def test_sums_of_a_pair_are_exact_although_it_may_swap() -> None:
    # max + min = a + b: the rows cancel what is relaxed.
    model = nn.Sequential(nn.Linear(2, 2), Layer(), nn.Linear(2, 1, bias=False)).double()
    model[2].weight.data = torch.ones(1, 2, dtype=torch.float64)
    x = torch.rand(3, 2, dtype=torch.float64)
    expected = model(x) - 0.3 * model[0].weight.sum(0).abs().sum()
    torch.testing.assert_close(bound(model, x, LinfBall(0.3, None), method="crown").lb, expected)


def test_rounding_of_either_member_reaches_both_outputs_of_a_pair() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), Layer(), nn.Linear(2, 2, bias=False)).double()
    model[2].weight.data = torch.eye(2, dtype=torch.float64)
    x = torch.rand(1, 2, dtype=torch.float64)
    for large in (0, 1):
        model[0].weight.data = torch.ones(2, 2, dtype=torch.float64)
        model[0].weight.data[large] = 1e6
        size = rounding_at_points(capture(model, x).snapshot(), x)
        assert bool((size > 1e5).all())
