"""The early stop on catastrophic overfitting: when it acts, and which weights it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robust.files import read_json_lines
from robust.hooks import catastrophic_overfitting
from robust.run_setup import CHECKPOINT, LOG
from robust.trainer import train
from tests.robust.runs import same, tiny, trained, weights

SETTINGS = tiny(
    objective="fgsm_at", hooks=("catastrophic_overfitting",), epochs=4, batch_size=400, validate_every=10, eps=0.05
)


def script(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
    """The hook measures these accuracies, one per epoch."""

    def measured(self: Any, moment: Any) -> float:
        return accuracies[round(moment.epoch) - 1]

    monkeypatch.setattr(catastrophic_overfitting._Active, "_accuracy", measured)


def test_a_fall_by_more_than_the_drop_ends_the_run_with_the_weights_of_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [0.3, 0.5, 0.29, 0.9])
    checkpoint = train(SETTINGS, tmp_path / "stopped", progress=False)
    log = read_json_lines(tmp_path / "stopped" / LOG)
    assert len(log) == 3
    # Validated although validate_every says otherwise: it is the last epoch.
    assert set(checkpoint.metrics) == {"validation/clean", "validation/under_attack"}
    two = trained(tiny(**{**vars(SETTINGS), "epochs": 2, "hooks": ()}), tmp_path / "two")
    assert same(two, weights(tmp_path / "stopped"))


def test_small_falls_and_the_first_epoch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [0.1, 0.5, 0.31, 0.12])
    first = trained(SETTINGS, tmp_path / "watched")
    assert len(read_json_lines(tmp_path / "watched" / LOG)) == 4
    assert same(first, trained(tiny(**{**vars(SETTINGS), "hooks": ()}), tmp_path / "plain"))


def test_a_stopped_run_goes_on_to_its_end_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robust import trainer

    script(monkeypatch, [0.3, 0.5, 0.29, 0.9])
    whole = trained(SETTINGS, tmp_path / "whole")
    step = trainer._Run._step

    def stopping(self: Any, index: torch.Tensor) -> dict[str, float]:
        values = step(self, index)
        self.interruption.asked = True
        return values

    monkeypatch.setattr(trainer._Run, "_step", stopping)
    while not (tmp_path / "parts" / CHECKPOINT).exists():
        try:
            train(SETTINGS, tmp_path / "parts", progress=False)
        except KeyboardInterrupt:
            pass
    assert same(whole, weights(tmp_path / "parts"))


def test_the_accuracy_is_that_under_the_attack_in_evaluation_mode() -> None:
    from types import SimpleNamespace

    from attacks.threat import LinfBall
    from robust.active import Moment
    from tests.robust.objectives import oracle

    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    x, y = x, net.eval()(x).argmax(1)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    moment = Moment(net, 3, 1.0, lambda: iter(()), lambda: iter([(x, y)]))
    found = []
    for eps in (0.0, 1.0):
        hook = catastrophic_overfitting.CatastrophicOverfitting()
        found.append(hook.start(SimpleNamespace(ball=LinfBall(eps)))._accuracy(moment))
    assert found[0] == 1 and found[1] < 0.5
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())
