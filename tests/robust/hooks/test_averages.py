"""EMA and SWA against averages computed by hand, with BatchNorm statistics that belong to the averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import trainer
from robust.active import Moment, RunFacts
from robust.hook import HOOKS
from robust.trainer import train
from tests.robust.runs import tiny, weights


def run_noting_weights(
    hook: str, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[dict[str, Tensor]], Any]:
    """(parameters behind every step, the run) of a run with one hook."""
    seen: list[dict[str, Tensor]] = []
    runs: list[Any] = []
    whole = trainer._Run._step

    def step(self: Any, index: Tensor) -> dict[str, float]:
        values = whole(self, index)
        seen.append({name: p.detach().double().clone() for name, p in self.model.named_parameters()})
        runs.append(self)
        return values

    monkeypatch.setattr(trainer._Run, "_step", step)
    train(tiny(hooks=(hook,), batch_size=300, **changes), out, progress=False)
    return seen, runs[-1]


def test_swa_is_the_plain_mean_of_every_second_step_from_its_start_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = run_noting_weights("swa:start_epoch=1,every=2", tmp_path, monkeypatch, epochs=3)
    # 5 steps an epoch; steps are counted behind the step, and epoch 1 begins when 5 are done.
    chosen = [seen[step - 1] for step in range(5, 16) if step % 2 == 0]
    assert len(chosen) == 5
    stored = weights(tmp_path)
    for name in seen[0]:
        mean = torch.stack([one[name] for one in chosen]).mean(dim=0)
        torch.testing.assert_close(stored[name].double(), mean, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(stored[name].double(), seen[-1][name], rtol=1e-5, atol=1e-6)


def test_ema_weighs_the_newest_weights_with_one_minus_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = run_noting_weights("ema:decay=0.75", tmp_path, monkeypatch, epochs=2)
    average = seen[0]
    for one in seen[1:]:
        average = {name: 0.75 * average[name] + 0.25 * one[name] for name in average}
    stored = weights(tmp_path)
    for name, value in average.items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hook", ["swa:every=1", "ema:decay=0.75"])
def test_batch_norm_statistics_belong_to_the_averaged_weights(
    hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First-layer statistics of the stored model, against those of its own first convolution over the batches."""
    _, run = run_noting_weights(hook, tmp_path, monkeypatch)
    model = trainer.load(tmp_path / trainer.CHECKPOINT).model
    layers = list(model.children())
    place = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d))
    norm, front = layers[place], nn.Sequential(*layers[:place])
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        outputs = [front(x) for x in run._batches()]
    means = torch.stack([out.mean(dim=(0, 2, 3)) for out in outputs]).mean(dim=0)
    variances = torch.stack([out.transpose(0, 1).flatten(1).var(dim=1) for out in outputs]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variances, rtol=1e-4, atol=1e-5)
    trained = dict(run.model.named_buffers())
    assert not torch.allclose(norm.running_mean, trained[f"{place}.running_mean"], rtol=1e-4, atol=1e-5)


def test_an_average_that_never_started_leaves_the_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = run_noting_weights("swa:start_epoch=50", tmp_path, monkeypatch, epochs=1)
    stored = weights(tmp_path)
    assert all(torch.equal(stored[name].double(), value) for name, value in seen[-1].items())


@pytest.mark.parametrize("text", ["ema:decay=0.5", "swa:every=1"])
def test_a_restored_average_goes_on_like_one_that_was_never_stored(text: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    moment = Moment(model, 0, 0.0, lambda: iter(()))
    whole, first = HOOKS.parse(text).start(model), HOOKS.parse(text).start(model)
    second = HOOKS.parse(text).start(model)
    for step in range(4):
        moment.step = step + 1
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        whole.after_step(moment)
        if step == 2:
            second.restore({name: tensor.clone() for name, tensor in first.state().items()})
        (first if step < 2 else second).after_step(moment)
    expected, got = whole.weights(), second.weights()
    assert expected is not None and got is not None
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_hook_that_averages_says_so_before_it_has_an_opinion() -> None:
    """The trainer refuses two of them at the start of a run."""
    model = nn.Linear(2, 2)
    moment = Moment(model, 1, 1.0, lambda: iter(()))
    # Those that are left out judge epochs, or need more processes or another model.
    for name in set(HOOKS.names()) - {"condlr", "fawa", "fedavg"}:
        active = HOOKS.parse(name).start(RunFacts(model, (1, 1, 2), 2, 4, 1, 1, lambda text: model))
        moment.step = 10
        active.after_step(moment)
        assert active.averages == (active.weights() is not None), name
