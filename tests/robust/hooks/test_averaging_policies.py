"""What an average starts from, when it moves, and which BatchNorm statistics go with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from robust import trainer
from robust.active import Moment
from robust.hooks.ema import EMA
from robust.hooks.fawa import FAWA
from robust.trainer import train
from tests.robust.runs import tiny, weights


def moment(model: nn.Module, epoch: float, held_out: Any = ()) -> Moment:
    return Moment(model, 0, epoch, lambda: iter(()), lambda: iter(()), lambda: iter(held_out))


def one_weight(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def value_of(active: Any) -> float:
    return float(active.weights()["weight"])


def test_a_warm_average_copies_up_to_its_start_and_then_decays_by_the_number_of_updates():
    active = EMA(decay=0.3, start_epoch=1.0, warmup=True).start(None)
    expected = 0.0
    for step, decay in enumerate([0.0, 0.0, 1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]):
        active.after_step(moment(one_weight(step), step / 2))
        expected = decay * expected + (1 - decay) * step
        assert value_of(active) == pytest.approx(expected)
        other = EMA(decay=0.3, start_epoch=1.0, warmup=True).start(None)
        other.restore(active.state())
        active = other


def test_an_average_per_epoch_ignores_steps():
    active = EMA(decay=0.75, every="epoch").start(None)
    for epoch in range(3):
        active.after_step(moment(one_weight(99.0), epoch + 0.5))
        active.after_epoch(moment(one_weight(epoch), epoch + 1))
    assert value_of(active) == pytest.approx(0.75 * (0.75 * 0 + 0.25 * 1) + 0.25 * 2)


def normed(mean: float) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(1))
    model[0].running_mean.fill_(mean)
    return model


@pytest.mark.parametrize(("policy", "expected"), [("copy", 4.0), ("average", 0.5 * 2 + 0.5 * 4)])
def test_statistics_are_copies_or_averages_and_never_the_networks_own(policy, expected):
    active = EMA(decay=0.5, batch_norm=policy).start(None)
    for mean in (2.0, 4.0):
        model = normed(mean)
        active.after_step(moment(model, 0.5))
    active.after_epoch(moment(model, 1.0))
    found = active.weights()
    assert float(found["0.running_mean"]) == pytest.approx(expected)
    assert set(found) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    model[0].running_mean.fill_(77.0)
    assert float(active.weights()["0.running_mean"]) == pytest.approx(expected)
    other = EMA(decay=0.5, batch_norm=policy).start(None)
    other.restore(active.state())
    assert float(other.weights()["0.running_mean"]) == pytest.approx(expected)


def test_a_run_keeps_the_statistics_that_its_average_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last: dict[str, Any] = {}
    whole = trainer._Run._step

    def step(self: Any, index: torch.Tensor) -> dict[str, float]:
        values = whole(self, index)
        last.update({name: buffer.clone() for name, buffer in self.model.named_buffers()})
        return values

    monkeypatch.setattr(trainer._Run, "_step", step)
    train(tiny(hooks=("ema:decay=0.5,batch_norm=copy",), epochs=1, batch_size=400), tmp_path, progress=False)
    stored = weights(tmp_path)
    for name in last:
        assert torch.equal(stored[name], last[name]), name


class Shift(nn.Module):
    """Class 1 where the pixel is above a trained threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = x.flatten(1)[:, 0] - self.weight
        return torch.stack([-above, above], 1) * 9


def test_fawa_takes_an_epoch_in_only_where_the_worst_class_holds():
    held_out = [(torch.tensor([0.1, 0.3, 0.7, 0.9]).view(4, 1, 1, 1), torch.tensor([0, 0, 1, 1]))]
    run = SimpleNamespace(classes=2, ball=LinfBall(0.1))
    fawa = FAWA(decay=0.75, threshold=0.6, attack=PGD(steps=2, step_size=1.0, keep="last"))
    active = fawa.start(run)
    assert active.averages and active.weights() is None
    kept = []
    # At 0.35 class 0 loses its second image under attack: half of it is left.
    for epoch, threshold in enumerate([0.35, 0.5, 0.75, 0.45, 0.35]):
        active.after_epoch(moment(Shift(threshold), epoch + 1, held_out))
        kept.append(None if active.weights() is None else value_of(active))
    assert kept == [None, *(pytest.approx(v) for v in (0.5, 0.5, 0.75 * 0.5 + 0.25 * 0.45, 0.4875))]
    other = fawa.start(run)
    other.restore(active.state())
    assert value_of(other) == value_of(active)
