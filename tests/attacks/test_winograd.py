"""Convolutions in fewer multiplications are convolutions, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.winograd import Winograd, gains

SIZES = [(4, 4), (3, 5), (8, 8), (1, 9), (7, 12), (16, 5), (17, 16)]


def library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def gradient(out: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad((out**3).sum(), x)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_the_librarys(size, batch, with_bias):
    weight = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    x = torch.randn(batch, 2, *size, dtype=torch.float64, requires_grad=True)
    found, expected = Winograd.of(weight, bias)(x), library(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x))


def test_channels_side_by_side_in_memory_make_no_difference():
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    found, expected = Winograd.of(weight, None)(x), library(x, weight, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, x), gradient(expected, x))


@pytest.mark.parametrize(("channels", "size"), [(128, 16), (256, 8), (512, 4)])
def test_rounding_in_float32_stays_below_a_thirty_thousandth_of_the_largest_value(channels, size):
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    x = torch.randn(2, channels, size, size, requires_grad=True)
    exact, exact_x = library(x.double(), weight.double(), None), x.detach().double().requires_grad_()
    found = Winograd.of(weight, None)(x)
    assert (found - exact).abs().max() < 3e-5 * exact.abs().max()
    expected = gradient(library(exact_x, weight.double(), None), exact_x)
    assert (gradient(found, x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_second_derivative_is_refused_and_not_wrong():
    weight, x = torch.randn(2, 2, 3, 3), torch.randn(1, 2, 4, 4, requires_grad=True)
    out = Winograd.of(weight, None)(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_it_gains_with_many_channels_and_few_pixels_and_takes_the_place_of_no_other_convolution():
    form = ((1, 1), (1, 1), (1, 1), 1)
    wide, shape = torch.empty(256, 256, 3, 3), (16, 256, 8, 8)
    assert gains(wide, form, shape) and gains(wide, form, (16, 256, 16, 16))
    assert not gains(wide, form, (15, 256, 8, 8))  # too small matrices
    assert not gains(wide, form, (16, 256, 20, 20)) and not gains(wide, form, (32, 256, 5, 5))
    assert not gains(wide.double(), form, shape)
    assert not gains(torch.empty(1024, 127, 3, 3), form, shape) and not gains(torch.empty(127, 1024, 3, 3), form, shape)
    assert not gains(torch.empty(256, 256, 1, 3), form, shape)
    one, two = (1, 1), (2, 2)
    for other in ((two, one, one, 1), (one, (0, 0), one, 1), (one, two, two, 1), (one, one, one, 2)):
        assert not gains(wide, other, shape)
    assert not gains(wide.to("meta"), form, shape)
