"""Global constants: no pair of points, however far apart, escapes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certify.lipschitz.global_constant import global_lipschitz
from certify.lipschitz.operator_norm import NORMS
from certify.op import UnsupportedOp
from tests.certify.lipschitz.nets import jacobians, mlp
from tests.certify.networks import CLASSES, INPUT, KINDS, pair, sandwich

ORDER = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}


CHOSEN = ["conv_groups", "conv_stride", "conv_dilation", "max_pool_padded", "max_pool_ceil", "avg_pool_padded"]
CHOSEN += ["concat_pixels", "residual_of_residual", "min_max", "silu"]


@pytest.mark.parametrize("name", [*KINDS, *CHOSEN])
def test_no_difference_of_outputs_escapes(name: str):
    model = (pair("relu", name, 1) if name in KINDS else sandwich(name, 1)).double().eval()
    generator = torch.Generator().manual_seed(0)
    x, away = (torch.randn(40, *INPUT, generator=generator, dtype=torch.float64) for _ in range(2))
    away = away * torch.logspace(-3, 1, 40).double().view(-1, 1, 1, 1)
    with torch.no_grad():
        change = (model(x + away) - model(x)).abs()
    slopes = jacobians(model, x, torch.eye(CLASSES, dtype=torch.float64)).flatten(2)
    for norm in NORMS:
        bound = global_lipschitz(model, x, norm)
        distance = torch.linalg.vector_norm(away.flatten(1), ORDER[norm], dim=1).unsqueeze(1)
        assert bool((change <= bound * distance * (1 + 1e-9)).all())
        assert bool((torch.linalg.vector_norm(slopes, DUAL[norm], dim=2) <= bound * (1 + 1e-9)).all())


def test_the_last_layer_counts_row_by_row():
    model = mlp([3, 4], 0)
    weight = model[0].weight.detach()
    for norm in NORMS:
        assert torch.allclose(global_lipschitz(model, torch.zeros(1, 3), norm), weight.norm(DUAL[norm], dim=1))
    margin = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    found = global_lipschitz(model, torch.zeros(1, 3), "l2", margin)
    assert torch.allclose(found, (weight[0] - weight[1]).norm())


def test_overlapping_windows_of_a_maximum_count():
    # One pixel is the maximum of four windows: moving it by 1 moves the sum of the outputs by 4.
    model = nn.Sequential(nn.MaxPool2d(2, stride=1), nn.Flatten()).double()
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1] = 1.0
    rows = torch.ones(1, 4)
    slope = jacobians(model, x, rows.double())[0, 0].abs().max()
    assert slope == 4 <= global_lipschitz(model, x, "l1", rows).item()


def test_what_has_no_constant_is_refused():
    with pytest.raises(ValueError, match="no Lipschitz constant for distances in 'l7'; known norms: linf, l2, l1"):
        global_lipschitz(mlp([2, 2], 0), torch.zeros(1, 2), "l7")
    with pytest.raises(UnsupportedOp, match=r"no bound rule for nn\.GELU"):
        global_lipschitz(nn.Sequential(nn.Linear(2, 2), nn.GELU()), torch.zeros(1, 2))
