"""Precise BatchNorm against averages computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import trainer
from robust.active import Moment
from robust.batch_norm import has_batch_norm, reestimate_statistics
from robust.hook import HOOKS
from robust.trainer import train
from tests.robust.runs import tiny


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for size in (5, 5, 3):
        yield torch.rand(size, 2, 3, 3, generator=generator) * 2 - 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4, momentum=0.3))


def test_statistics_become_the_mean_over_the_batches_of_each_batchs_own() -> None:
    model = network()
    model(next(batches()))  # earlier statistics must not count
    HOOKS.parse("precise_bn").start(model).after_epoch(Moment(model, 1, 1.0, batches))
    parts = list(batches())
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in parts]).mean(dim=0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x in parts]).mean(dim=0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    hidden = [
        model[2](
            (
                (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
            ).flatten(1)
        )
        for x in parts
    ]
    torch.testing.assert_close(model[3].running_mean, torch.stack([h.mean(dim=0) for h in hidden]).mean(dim=0))


def test_modes_momenta_and_weights_are_left_as_they_were_also_after_an_error() -> None:
    model = network()
    model[0].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def failing() -> Iterator[Tensor]:
        yield next(batches())
        raise OSError("disk gone")

    reestimate_statistics(model, batches())
    with pytest.raises(OSError, match="disk gone"):
        reestimate_statistics(model, failing())
    assert [layer.momentum for layer in (model[0], model[3])] == [0.1, 0.3]
    assert [layer.training for layer in model] == [False, True, True, True]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_model_without_batch_norm_costs_no_pass() -> None:
    model = nn.Linear(2, 2)
    assert not has_batch_norm(model)

    def forbidden() -> Iterator[Tensor]:
        raise AssertionError("read")

    HOOKS.parse("precise_bn").start(model).after_epoch(Moment(model, 1, 1.0, forbidden))


def test_it_runs_behind_every_epoch_and_before_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is validated has the precise statistics: batches seen is the count of one pass."""
    counts: list[int] = []

    def validate(model: nn.Module, *_: Any) -> dict[str, float]:
        counts.extend(int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked"))
        return {"clean": 0.0, "certified": 0.0}

    monkeypatch.setattr(trainer, "validate", validate)
    train(tiny(hooks=("precise_bn",), batch_size=300, epochs=2), tmp_path, progress=False)
    assert counts == [5] * 4
