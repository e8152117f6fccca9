"""Swish written out is read as SiLU, whatever its form, and other products are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import LinfBall
from certify import bound, capture
from certify.op import UnsupportedOp

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda v: v * torch.sigmoid(v),
    "method": lambda v: v.sigmoid() * v,
    "mul": lambda v: torch.mul(v, F.sigmoid(v)),
    "read_again": lambda v: v * (gate := torch.sigmoid(v)) + gate,
}


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.form = nn.Linear(6, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.form(self.first(x)))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_has_the_bounds_of_silu(name: str) -> None:
    net, x, ball = Net(FORMS[name]).eval(), torch.rand(4, 6), LinfBall(0.1)
    names = [type(node.op).__name__ for node in capture(net, x).snapshot().nodes]
    assert names.count("SiLU") == 1 and ("SShaped" in names) == (name == "read_again")
    for method in ("ibp", "crown"):
        lb, ub = bound(net, x, ball, method=method)
        for seed in range(20):
            logits = net(ball.sample(x, torch.Generator().manual_seed(seed)))
            assert ((lb <= logits + 1e-6) & (logits - 1e-6 <= ub)).all()
    if name != "read_again":
        expected = bound(Net(F.silu).eval(), x, ball, method="crown")
        torch.testing.assert_close(bound(net, x, ball, method="crown"), expected)


@pytest.mark.parametrize("form", [lambda v: v * torch.sigmoid(v + 1), lambda v: v * torch.sigmoid(2 * v)])
def test_a_product_with_another_gate_is_no_swish(form: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOp, match="a product of two values is not supported"):
        capture(Net(form), torch.rand(2, 6))


def test_zero_padding_is_bounded_and_other_padding_is_refused() -> None:
    class Padded(nn.Module):
        def __init__(self, **options: float | str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.options = nn.Conv2d(1, 2, 3), options

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, (1, 0, 2, 1), **self.options)).flatten(1)

    x, ball = torch.rand(2, 1, 4, 4), LinfBall(0.1)
    lb, ub = bound(Padded(), x, ball, method="crown")
    for seed in range(20):
        out = Padded()(ball.sample(x, torch.Generator().manual_seed(seed)))
        assert ((lb <= out + 1e-6) & (out - 1e-6 <= ub)).all()
    for options in ({"mode": "reflect"}, {"value": 1.0}):
        with pytest.raises(UnsupportedOp, match="has no bound rule; use zeros"):
            capture(Padded(**options), x)
