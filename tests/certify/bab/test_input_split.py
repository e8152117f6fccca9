"""Splits of the input: what is proven holds at every point, and shallow wide networks with few inputs are decided."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import L2Ball, LinfBall
from certify.bab import input_split
from certify.bab.input_split import free_inputs, split_inputs
from certify.graph import Snapshot
from certify.ops.affine import Linear
from certify.precision import rounding_size
from certify.region import Region
from certify.verifiers.bab import BranchAndBound
from tests.certify.bab.cores import ended

EPS = 0.15


def deep(seed: int, inputs: int) -> tuple[nn.Module, Tensor]:
    """(network with 160 ReLUs, an input)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 40), nn.ReLU())
    for _ in range(3):
        model.extend([nn.Linear(40, 40), nn.ReLU()])
    model.append(nn.Linear(40, 3))
    for layer in model[::2]:
        layer.weight.data *= 2.0
    return model.eval(), torch.rand(1, inputs)


def shifted(snapshot: Snapshot, by: Tensor) -> Snapshot:
    """The network with its rows lowered by `by` `[R]`."""
    *front, last = snapshot.nodes
    assert isinstance(last.op, Linear) and last.op.bias is not None
    return Snapshot((*front, replace(last, op=Linear(last.op.weight, last.op.bias - by))))


def least(snapshot: Snapshot, region: Region) -> Tensor:
    """Least sampled value of each row, `[R]`."""
    inputs = region.center.shape[1]
    u = torch.rand(20_000, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    points = region.center + region.radius * u
    return torch.cat([_rows(snapshot, part) for part in points.split(1000)]).amin(0)


def _rows(snapshot: Snapshot, points: Tensor) -> Tensor:
    *front, last = snapshot.nodes
    assert isinstance(last.op, Linear) and last.op.bias is not None
    flat = Snapshot((*front, replace(last, op=Linear(last.op.weight[0], last.op.bias.view(-1)))))
    return flat(points)


@pytest.mark.parametrize("inputs", [2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_proven_holds_at_every_point(seed: int, inputs: int) -> None:
    model, x = deep(seed, inputs)
    snapshot, region = ended(model, x, LinfBall(EPS))
    low = least(snapshot, region)
    for row in range(len(low)):
        # All rows but one are far from 0; that one is at a sampled point just below it, or everywhere above.
        for height, holds in ((-1e-3, False), (0.1, True)):
            by = low - 100.0
            by[row] = low[row] - height * (1 + abs(float(low[row])))
            moved = shifted(snapshot, by)
            size = rounding_size(moved, region)[0]
            found = split_inputs(moved, region, size, time.perf_counter() + 60)
            assert (found.witness is None) == found.proven
            assert found.proven <= holds, "a proof in spite of a counterexample"
            if found.witness is not None:
                assert float(moved(found.witness.unsqueeze(0)).min()) <= 0
            else:
                assert (found.low > 0).all() and (found.low <= low - by).all()


@pytest.mark.parametrize("boxes", [0, 4])
def test_a_search_that_ends_early_proves_nothing(boxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of time (before the first box) or of boxes, with a property that holds."""
    monkeypatch.setattr(input_split, "BOXES", boxes)
    model, x = deep(0, 3)
    snapshot, region = ended(model, x, LinfBall(EPS))
    low = least(snapshot, region)
    moved = shifted(snapshot, low - 0.01 * (1 + low.abs()))
    found = split_inputs(moved, region, rounding_size(moved, region)[0], time.perf_counter() + (60 if boxes else -1))
    assert not (found.proven or found.doubtful) and found.witness is None
    assert (found.low <= 0).any() and found.domains <= 2 * boxes


def test_deep_networks_with_few_inputs_are_decided_by_their_inputs() -> None:
    model, x = deep(0, 3)
    label = model(x).argmax(1)
    (split,) = BranchAndBound(timeout=60)(model, x, label, LinfBall(EPS))
    assert split.status != "unknown"


def test_inputs_that_cannot_move_and_balls_are_not_split() -> None:
    x = torch.tensor([[0.2, 0.5, 1.0]])
    region = Region.around(x, LinfBall(0.1))
    assert free_inputs(region) == 3
    assert free_inputs(replace(region, radius=torch.tensor([[0.1, 0.0, 0.1]]))) == 2
    assert free_inputs(Region.around(x, L2Ball(0.1))) > 3
