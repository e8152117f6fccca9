"""Products by the faster library are products: values, gradients of any order, any strides, and where it is asked."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import attacks.dense_product
from attacks.dense_product import dense, product

ROUNDING = 1e-5


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that the faster library was asked to multiply by."""
    own, shapes = attacks.dense_product._by_onednn, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return own(x, weight, bias)

    if not attacks.dense_product._measured():
        pytest.skip("this torch has no oneDNN for this processor: every product is the library's")
    monkeypatch.setattr(attacks.dense_product, "_by_onednn", counted)
    return shapes


def strided(rows: int, columns: int, how: str) -> Tensor:
    return {
        "rows": lambda: torch.randn(rows, columns),
        "columns": lambda: torch.randn(columns, rows).T,
        "wider rows": lambda: torch.randn(rows, 2 * columns)[:, 5 : columns + 5],
        "every second": lambda: torch.randn(2 * rows, 3 * columns)[::2, 1::3],
        "one row": lambda: torch.randn(1, columns).expand(rows, columns),
        "one column": lambda: torch.randn(rows, 1).expand(rows, columns),
        "overlapping": lambda: torch.randn(2 * rows + columns).as_strided((rows, columns), (2, 1)),
    }[how]()


SUITABLE = ["rows", "columns", "wider rows"]
LAYOUTS = [*SUITABLE, "every second", "one row", "one column", "overlapping"]


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_values_are_the_librarys_whatever_the_strides(left, right, asked):
    x, weight, bias = strided(170, 160, left), strided(180, 160, right), torch.randn(180)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for found in (dense(x, weight, bias), product(x, weight.T) + bias):
        assert (found - exact).abs().max() < ROUNDING * exact.abs().max()
    assert len(asked) == (2 if left in SUITABLE and right in SUITABLE else 0)


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_first_and_second_order_are_the_librarys(turned, asked):
    x, bias = torch.randn(200, 160, requires_grad=True), torch.randn(180, requires_grad=True)
    weight = torch.randn((160, 180) if turned else (180, 160), requires_grad=True)

    def derivatives(layer) -> list[Tensor]:
        out = layer(x, weight.T if turned else weight, bias)
        first = torch.autograd.grad(out.square().mean(), (x, weight, bias), create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))]

    found = derivatives(dense)
    assert len(asked) > 3
    for ours, theirs in zip(found, derivatives(F.linear), strict=True):
        assert (ours - theirs).abs().max() < ROUNDING * theirs.abs().max()
    # A gradient in another layout than its parameter's is copied number by number.
    assert found[2].stride() == weight.stride()


def test_only_the_gradients_that_are_wanted_are_computed(asked):
    x, weight = torch.randn(200, 160, requires_grad=True), torch.randn(180, 160)
    dense(x, weight).square().sum().backward()
    assert len(asked) == 2 and x.grad is not None
    dense(x.detach(), weight.requires_grad_()).square().sum().backward()
    assert len(asked) == 4 and weight.grad is not None
    with torch.no_grad():
        assert not dense(x, weight).requires_grad


def test_others_than_large_float32_matrices_are_the_librarys_own(asked):
    x, weight = torch.randn(200, 160), torch.randn(180, 160)
    rows = torch.randn(4, 200, 160)
    assert torch.equal(dense(x[:9], weight), F.linear(x[:9], weight))
    columns, few = torch.randn(600, 200).T, torch.randn(63, 600)
    assert torch.equal(dense(columns, few), F.linear(columns, few))
    assert torch.equal(dense(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(dense(rows, weight), F.linear(rows, weight))
    assert dense(x[:, :0], weight[:, :0]).abs().max() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(x, weight).dtype == torch.bfloat16
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(dense(x, weight), F.linear(x, weight))
    assert not asked
    with pytest.raises(RuntimeError, match="shape"):
        dense(torch.randn(900, 160), torch.randn(900, 159))
    with pytest.raises(RuntimeError):
        dense(x, weight, torch.randn(179))
    assert dense(x, weight, torch.ones(1)).shape == (200, 180)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_forward_derivatives_and_maps_over_examples_are_right():
    x, weight, direction = torch.randn(200, 160), torch.randn(180, 160), torch.randn(200, 160)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(dense(forward_ad.make_dual(x, direction), weight)).tangent
    torch.testing.assert_close(tangent, direction @ weight.T)
    many = torch.randn(3, 200, 160)
    found = torch.func.vmap(torch.func.grad(lambda one: dense(one, weight).square().sum()))(many)
    torch.testing.assert_close(found, 2 * many @ weight.T @ weight, rtol=1e-4, atol=1e-3)
