"""CondLR: factorised layers that compute what the layer did, and factors that stay in their sets during a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from certify.tracing import capture
from robust.active import Moment
from robust.checkpoint import load
from robust.hooks.condlr import CondLR, orthonormal
from robust.model import MODELS
from robust.models.low_rank import Factorised
from robust.run_setup import CHECKPOINT
from robust.trainer import train
from tests.robust.runs import tiny

LAYERS = [nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Linear(7, 4), nn.Conv2d(2, 6, 1, bias=False)]


@pytest.mark.parametrize("layer", LAYERS, ids=["conv", "linear", "no-bias"])
def test_a_factorised_layer_of_full_rank_is_the_layer_and_a_lower_one_its_best_approximation(layer):
    layer = layer.double()
    matrix = layer.weight.detach().flatten(1)
    shape = (4, 7) if isinstance(layer, nn.Linear) else (4, layer.in_channels, 8, 8)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = Factorised(layer, min(matrix.shape)).double()
    for part, exact in zip(full, Factorised(layer, min(matrix.shape)), strict=True):
        assert part.weight.shape == exact.weight.shape
    torch.testing.assert_close(full(x), layer(x), rtol=1e-5, atol=1e-5)
    low = Factorised(layer, 2)
    product = low[2].weight.flatten(1) @ low[1].weight.flatten(1) @ low[0].weight.flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(product.double(), u[:, :2] * s[:2] @ v[:2], rtol=1e-5, atol=1e-5)


def test_all_layers_but_the_last_are_factorised_and_the_network_can_be_certified():
    model = MODELS.parse("low_rank:model=(cnn3:width=4),ratio=0.25")((1, 8, 8), 10, (0.5,), (0.25,))
    factorised = [layer for layer in model.modules() if isinstance(layer, Factorised)]
    assert [layer[1].weight.shape[0] for layer in factorised] == [1, 2]
    assert capture(model, torch.zeros(1, 1, 8, 8)).snapshot()(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"ratio=0.0: expected a share"):
        MODELS.parse("low_rank:ratio=0")


def singular_values(layer: Factorised) -> torch.Tensor:
    return torch.linalg.svdvals(layer[1].weight.detach().flatten(1))


def check_sets(layer: Factorised, condition: float) -> None:
    for columns in (layer[0].weight.flatten(1).T, layer[2].weight.flatten(1)):
        torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), rtol=1e-4, atol=1e-5)
    values = singular_values(layer)
    assert float(values[0] / values[-1]) <= condition * (1 + 1e-4)


@pytest.mark.parametrize("rule", ["clamp", "mean"])
def test_a_retraction_by_hand(rule):
    torch.manual_seed(0)
    model = nn.Sequential(Factorised(nn.Linear(6, 5), 3), nn.ReLU(), nn.Linear(5, 2))
    for part in model[0]:
        nn.init.normal_(part.weight)
    outer, middle = model[0][2].weight.detach().clone(), model[0][1].weight.detach().clone()
    condlr = CondLR(condition=1.2, rule=rule)
    active = condlr.start(SimpleNamespace(model=model))
    check_sets(model[0], 1.2 if rule == "clamp" else 1.0)
    # Gram-Schmidt, column by column.
    columns: list[torch.Tensor] = []
    for column in outer.T:
        rest = column - sum((column @ done) * done for done in columns)
        columns.append(rest / rest.norm())
    torch.testing.assert_close(model[0][2].weight.detach(), torch.stack(columns, 1), rtol=1e-4, atol=1e-5)
    s = torch.linalg.svdvals(middle)
    m = float(s.mean())
    low, high = m - m * 0.2 / 2.2, m + m * 0.2 / 2.2
    expected = s.clamp(low, high) if rule == "clamp" else torch.full((3,), float((s**2).mean() ** 0.5))
    torch.testing.assert_close(singular_values(model[0]), expected, rtol=1e-4, atol=1e-5)
    # Orthonormal factors stay as they are.
    before = [part.weight.detach().clone() for part in model[0]]
    active.after_step(Moment(model, 1, 0.1, lambda: iter(())))
    for part, value in zip((model[0][0], model[0][2]), (before[0], before[2]), strict=True):
        torch.testing.assert_close(part.weight.detach(), value, rtol=1e-4, atol=1e-5)


def test_signs_of_orthonormal_columns_are_kept():
    q = -torch.eye(4)[:, :2]
    torch.testing.assert_close(orthonormal(q), q)


def test_a_run_ends_with_factors_in_their_sets_and_its_checkpoint_loads(tmp_path: Path):
    settings = tiny(
        model="low_rank:model=(cnn3:width=4)", objective="natural", hooks=("condlr:condition=1.3",), batch_size=400
    )
    train(settings, tmp_path, progress=False)
    model = load(tmp_path / CHECKPOINT).model
    layers = [layer for layer in model.modules() if isinstance(layer, Factorised)]
    assert len(layers) == 2
    for layer in layers:
        check_sets(layer, 1.3)
    with pytest.raises(ValueError, match=r"condlr needs factorised layers: --model 'low_rank:model=\(cnn7\)'"):
        CondLR().start(SimpleNamespace(model=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"condition=0.5: a condition number is at least 1"):
        CondLR(condition=0.5)
