"""Operator norms against the dense matrix of the layer and its singular values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from certify.lipschitz.operator_norm import NORMS, operator_norm_bound, power_iteration
from certify.op import UnsupportedOp
from certify.ops.affine import Linear, conv2d
from certify.ops.average_pool import Average
from certify.ops.relu import ReLU
from certify.ops.select import Select

SHAPES = [
    # kernel, stride, padding, dilation, groups
    ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((4, 3), (2, 3), (2, 0), (1, 1), 2),
    ((2, 4), (3, 2), (1, 3), (1, 2), 1),
    ((1, 2), (3, 3), (0, 2), (2, 1), 2),
    ((5, 1), (2, 1), (3, 1), (1, 1), 1),
]


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    units = torch.eye(int(torch.Size(shape).numel()), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros(1, *shape, dtype=torch.float64))).flatten(1).T


def exact(matrix: Tensor, norm: str) -> Tensor:
    return torch.linalg.matrix_norm(matrix, {"l1": 1, "linf": torch.inf, "l2": 2}[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), SHAPES)
def test_no_norm_of_a_convolution_is_above_its_bound(kernel, stride, padding, dilation, groups, norm):
    torch.manual_seed(0)
    shape = (2 * groups, 9, 8)
    for _ in range(5):
        layer = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, dtype=torch.float64)
        truth, bound = exact(dense(layer, shape), norm), operator_norm_bound(layer, norm, in_shape=shape)
        assert truth <= bound <= (2 if norm == "l2" else 1 + 1e-9) * truth


def test_the_ring_of_a_large_image_is_tight():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, 2, 1, dtype=torch.float64)
    truth = exact(dense(layer, (2, 28, 28)), "l2")
    assert truth <= operator_norm_bound(layer, in_shape=(2, 28, 28)) < 1.02 * truth


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_circular_convolutions_are_exact(stride, norm):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (3, 5), stride, (1, 2), padding_mode="circular", dtype=torch.float64)
    truth = exact(dense(layer, (2, 8, 6)), norm)
    assert truth <= operator_norm_bound(layer, norm, in_shape=(2, 8, 6)) * (1 + 1e-15) < (1 + 1e-9) * truth


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(5, 7), (7, 5), (1, 4), (6, 6)])
def test_dense_norms_are_exact(size, norm):
    torch.manual_seed(0)
    weight = torch.randn(3, *size, dtype=torch.float64)
    truth = torch.stack([exact(matrix, norm) for matrix in weight])
    bound = operator_norm_bound(weight, norm)
    assert bool((truth <= bound).all()) and bool((bound < (1 + 1e-9) * truth).all())


def test_gram_iteration_decreases_to_the_norm_and_never_below_it():
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    truth = exact(weight.double(), "l2")
    bounds = [float(operator_norm_bound(weight, gram_iterations=k)) for k in range(1, 12)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(bounds))
    assert truth <= bounds[-1] < truth * (1 + 1e-6)


def test_gram_iteration_of_an_orthogonal_layer_is_exact_from_the_start():
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert 1 <= operator_norm_bound(rotation, gram_iterations=1) < 1 + 1e-9


@pytest.mark.parametrize("gram_iterations", [None, 6])
def test_zero_and_tiny_and_huge_weights(gram_iterations):
    assert operator_norm_bound(torch.zeros(3, 4), gram_iterations=gram_iterations) == 0
    for scale in (1e-20, 1e20):
        bound = operator_norm_bound(scale * torch.ones(3, 3, dtype=torch.float64), gram_iterations=gram_iterations)
        assert bound / scale == pytest.approx(3)


@pytest.mark.parametrize("gram_iterations", [None, 6])
def test_the_gradient_is_that_of_the_norm(gram_iterations):
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def bound(w: Tensor) -> Tensor:
        return operator_norm_bound(conv2d(w, None, 2, 1, 1, 1, (3, 6, 6)), gram_iterations=gram_iterations)

    assert torch.autograd.gradcheck(bound, weight)


def test_power_iteration_stays_below_and_comes_near():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, 1, 1, dtype=torch.float64)
    op = conv2d(layer.weight, layer.bias, 1, 1, 1, 1, (2, 8, 8))
    truth = exact(dense(layer, (2, 8, 8)), "l2")
    first = power_iteration(op, torch.randn(1, 2, 8, 8, dtype=torch.float64), 20)
    further = power_iteration(op, first.v, 200)
    assert first.value <= further.value <= truth * (1 + 1e-12)
    assert further.value == pytest.approx(float(truth), rel=1e-3)
    assert power_iteration(Linear(torch.zeros(2, 3)), torch.ones(1, 3)).value == 0


def test_average_pools_have_their_norm():
    pool = Average(nn.AvgPool2d(2).forward, (3, 6, 6))
    assert operator_norm_bound(pool) == pytest.approx(0.5)
    assert operator_norm_bound(pool, "linf") == pytest.approx(1)
    assert operator_norm_bound(pool, "l1") == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (ReLU(), {}, UnsupportedOp, "no operator norm for ReLU"),
        (torch.eye(2), {"norm": "l3"}, ValueError, "no operator norm 'l3'; known: linf, l2, l1"),
        (nn.Conv2d(1, 1, 3), {}, ValueError, "give in_shape=\\(C, H, W\\)"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), {"in_shape": (1, 5, 5)}, UnsupportedOp, "Conv2d"),
        (
            nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular"),
            {"in_shape": (1, 5, 5)},
            UnsupportedOp,
            "half of its reach",
        ),
    ],
)
def test_what_has_no_norm_is_refused(layer, options, error, message):
    with pytest.raises(error, match=message):
        operator_norm_bound(layer, **options)


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_numbers_that_are_picked_more_than_once_count_as_often(norm):
    index = torch.tensor([3, 0, 3, 1, 3, 1])
    matrix = torch.eye(4, dtype=torch.float64)[index]
    order = {"l2": 2, "l1": 1, "linf": math.inf}[norm]
    bound = operator_norm_bound(Select(index, (4,), (2, 3)), norm)
    torch.testing.assert_close(bound, torch.linalg.matrix_norm(matrix, order), rtol=1e-11, atol=0)
    assert bound >= torch.linalg.matrix_norm(matrix, order) * (1 - 1e-15)
