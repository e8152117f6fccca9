"""The training loop: the same seed or a killed run gives the same weights, and every refusal says what to do."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.tracing import capture
from robust import run_setup, trainer
from robust.dataset import DATASETS, DataSet
from robust.files import FileInUse, JsonLines
from robust.hook import HOOKS
from robust.images import MemoryImages
from robust.model import MODELS
from robust.objective import OBJECTIVES, cross_entropy
from robust.objectives.ibp import IBP
from robust.run_setup import BEST, CHECKPOINT, LAST, LOG, SETTINGS, STATE, TrainingError, training_data
from robust.schedule import SCHEDULES
from robust.seeds import seeded
from robust.settings import Settings
from robust.step import StepPlan, step_gradients
from robust.tensor_file import load_tensors, save_tensors
from robust.trainer import train
from robust.views import Views
from tests.robust.runs import RUN, records, same, start, state_step, stop_once, tiny, trained, weights

SGD = tiny(
    optimizer="sgd:lr=0.02",
    hooks=("precise_bn", "swa:every=3"),
    regularizers=("shi:weight=0.5", "l1:weight=1e-5"),
    select="best",
    micro_batch=50,
    epochs=3,
)
ADAM = tiny(
    objective="mtl_ibp:attack=(pgd:steps=1,step_size=10.0,unit=box,keep=last,mode=keep)",
    hooks=("ema:decay=0.9",),
    lr_schedule="cosine:warmup=0.5",
    init="ibp",
    epochs=3,
)
L2 = Settings(
    model="liresnet:depth=2,width=4,hidden=8",
    objective="emma:power_iterations=2",
    norm="l2",
    eps=0.3,
    eps_schedule="linear:end=1,initial=1/15",
    epochs=2,
    validator="global_l2",
    validate_every=2,
)
RUNS = {"sgd": SGD, "adam": ADAM, "l2": L2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the runs, trained in one go."""
    torch.set_num_threads(1)
    folders = {name: tmp_path_factory.mktemp("undisturbed") / name for name in RUNS}
    for name, out in folders.items():
        train(RUNS[name], out, progress=False)
    return folders


def test_methods_for_other_balls_than_the_runs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^objective emma is for l2 balls, the run has norm='linf'; change one"):
        train(tiny(objective="emma"), tmp_path, progress=False)
    with pytest.raises(TrainingError, match=r"^validator global_l2 is for l2 balls, the run has norm='linf'; change"):
        train(tiny(validator="global_l2"), tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


# --- reproducible, interruptible


def test_the_same_seed_gives_the_same_weights_bit_by_bit_and_another_seed_others(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    torch.manual_seed(99)  # the state of torch's own noise must not matter
    assert same(trained(ADAM, tmp_path / "again"), weights(undisturbed["adam"]))
    other = Settings.from_dict({**ADAM.to_dict(), "seed": 1})
    assert not same(trained(other, tmp_path / "other"), weights(undisturbed["adam"]))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_behind_every_single_step_ends_like_an_undisturbed_one(
    name: str, tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each go does a few steps, saves and stops, at the ends of epochs as well as in their middle."""
    out, goes = tmp_path / "run", 0
    step = trainer._Run._step

    def stopping(self: Any, index: Tensor) -> dict[str, float]:
        values = step(self, index)
        self.interruption.asked = self.progress.step % 4 == 0 or self.progress.step % self.steps_per_epoch == 0
        return values

    monkeypatch.setattr(trainer._Run, "_step", stopping)
    while not (out / CHECKPOINT).exists():
        goes += 1
        try:
            train(RUNS[name], out, progress=False)
        except KeyboardInterrupt:
            assert (out / STATE).exists()
    assert goes > 6
    assert same(weights(out), weights(undisturbed[name]))
    assert records(out) == records(undisturbed[name])
    kept = [LAST] if RUNS[name].select == "best" else []
    assert sorted(file.name for file in out.iterdir()) == sorted([CHECKPOINT, LOG, SETTINGS, *kept])


def kill_and_continue(settings: Settings, out: Path, kills: int, seed: int) -> int:
    """Kill a run in a process of its own so many times, then end it here; how often it was at work when killed."""
    noise, hits = random.Random(seed), 0
    for _ in range(kills):
        process = start(json.dumps(settings.to_dict()), str(out), "0", script=RUN)
        hits += stop_once(process, out / STATE, changes=noise.randrange(2, 12))
    trained(settings, out)
    return hits


def test_a_run_killed_in_the_middle_of_an_epoch_ends_like_an_undisturbed_one(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    assert kill_and_continue(SGD, tmp_path / "run", kills=1, seed=0) == 1
    assert same(weights(tmp_path / "run"), weights(undisturbed["sgd"]))
    assert records(tmp_path / "run") == records(undisturbed["sgd"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_three_times_at_random_ends_like_an_undisturbed_one(
    name: str, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    assert kill_and_continue(RUNS[name], tmp_path / "run", kills=3, seed=7) >= 2
    assert same(weights(tmp_path / "run"), weights(undisturbed[name]))
    assert records(tmp_path / "run") == records(undisturbed[name])


def test_a_kill_between_an_epochs_record_and_its_state_leaves_no_second_record(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is older than the log by more than an epoch, which saving by the clock makes the usual case."""
    out = tmp_path / "run"
    append = JsonLines.append

    def dying(self: JsonLines, lines: Any) -> None:
        append(self, lines)
        if len(self.records) == 2:
            raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(JsonLines, "append", dying)
        train(ADAM, out, progress=False)
    assert len(records(out)) == 2 and not (out / STATE).exists()
    assert same(trained(ADAM, out), weights(undisturbed["adam"]))
    assert records(out) == records(undisturbed["adam"])


@pytest.mark.usefixtures("listening")
def test_ctrl_c_saves_the_state_behind_the_step_under_way(tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    out = tmp_path / "run"
    threading.Timer(0.0, _when_logged, (out, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        train(ADAM, out, progress=False)
    assert state_step(out) > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(trained(ADAM, out), weights(undisturbed["adam"]))


def _when_logged(out: Path, number: int) -> None:
    while not (out / LOG).exists() or not (out / LOG).stat().st_size:
        time.sleep(0.002)
    signal.raise_signal(number)


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_Run", None)
    checkpoint = train(ADAM, undisturbed["adam"], progress=False)
    assert same(dict(checkpoint.model.state_dict()), weights(undisturbed["adam"]))


def test_other_settings_in_the_folder_are_refused_naming_what_differs(undisturbed: dict[str, Path]) -> None:
    other = Settings.from_dict({**ADAM.to_dict(), "epochs": 9, "seed": 4})
    with pytest.raises(TrainingError, match=r"other settings \(epochs: 3 there, 9 now; seed: 0 there, 4 now\); choose"):
        train(other, undisturbed["adam"], progress=False)


@pytest.mark.usefixtures("broken")
def test_a_folder_in_which_nothing_was_trained_yet_takes_other_settings(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is nan"):
        train(tiny(objective="broken_for_test:at=0"), tmp_path, progress=False)
    trained(tiny(epochs=1), tmp_path)
    assert Settings.from_dict(json.loads((tmp_path / SETTINGS).read_text())) == tiny(epochs=1)


def test_settings_that_are_none_are_refused_with_their_path(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text("{")
    (tmp_path / LOG).write_text('{"epoch": 1}\n')
    with pytest.raises(TrainingError, match=r"settings\.json holds no settings of this suite"):
        train(tiny(), tmp_path, progress=False)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with JsonLines(tmp_path / LOG), pytest.raises(FileInUse, match="written by another process"):
        train(tiny(), tmp_path, progress=False)


def test_what_kills_left_beside_a_run_is_removed(tmp_path: Path) -> None:
    for name in (STATE, BEST, CHECKPOINT, LAST, SETTINGS):
        (tmp_path / f".{name}.0a1b2c3d.part").write_text("half of the n")
    (tmp_path / ".notes.part").write_text("somebody's own")
    _stop_at_step(tiny(epochs=1), tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".notes.part"]
    state = (tmp_path / STATE).read_bytes()
    expected = trained(tiny(epochs=1), tmp_path)
    for name in (STATE, BEST):
        (tmp_path / name).write_bytes(state)
    assert same(trained(tiny(epochs=1), tmp_path), expected)
    assert not (tmp_path / STATE).exists() and not (tmp_path / BEST).exists()


@pytest.mark.parametrize("last", [False, True], ids=["a state", "the checkpoint"])
def test_a_run_whose_folder_was_removed_writes_nothing_into_that_of_the_next(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = trainer._Run._step, tmp_path / "run"

    def removed(self: Any, index: Tensor) -> dict[str, float]:
        values = whole(self, index)
        if self.progress.step == (self.steps_per_epoch if last else 2):
            shutil.rmtree(out)
            _begun_and_killed(tiny(epochs=1, seed=1), out)
        return values

    monkeypatch.setattr(JsonLines, "append", lambda *_: None)  # it stops there already
    monkeypatch.setattr(trainer._Run, "_step", removed)
    with pytest.raises(OSError, match=r"removed or replaced while"):
        train(tiny(epochs=1), out, progress=False, save_every=math.inf if last else 0.0)
    assert sorted(path.name for path in out.iterdir()) == [LOG, SETTINGS]


def _begun_and_killed(settings: Settings, out: Path) -> None:
    with JsonLines(out / LOG):
        (out / SETTINGS).write_text(json.dumps(settings.to_dict()))


def test_a_state_or_checkpoint_of_other_settings_is_refused_without_the_file_of_settings(tmp_path: Path) -> None:
    _stop_at_step(tiny(epochs=1), tmp_path, 3)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(TrainingError, match=r"other settings \(seed: 0 there, 1 now\); choose another folder"):
        train(tiny(epochs=1, seed=1), tmp_path, progress=False)
    (tmp_path / SETTINGS).unlink()
    expected = trained(tiny(epochs=1), tmp_path)
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(TrainingError, match=r"other settings \(seed: 0 there, 1 now\); choose another folder"):
        train(tiny(epochs=1, seed=1), tmp_path, progress=False)
    assert same(trained(tiny(epochs=1), tmp_path), expected)


def test_a_state_of_an_older_version_which_has_no_settings_is_gone_on_with(tmp_path: Path) -> None:
    expected = trained(tiny(epochs=1), tmp_path / "whole")
    _stop_at_step(tiny(epochs=1), tmp_path / "cut", 3)
    tensors, metadata = load_tensors(tmp_path / "cut" / STATE)
    del metadata["settings"]
    save_tensors(tmp_path / "cut" / STATE, tensors, metadata)
    assert same(trained(tiny(epochs=1), tmp_path / "cut"), expected)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_state_is_an_error_that_says_what_to_do_and_no_silent_restart(damage: str, tmp_path: Path) -> None:
    _stop_at_step(tiny(), tmp_path, 3)
    content = bytearray((tmp_path / STATE).read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[-5] ^= 1
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(TrainingError, match=r"state\.safetensors: .*Remove the file to train from the start$"):
        train(tiny(), tmp_path, progress=False)
    assert (tmp_path / STATE).read_bytes() == content


def _stop_at_step(settings: Settings, out: Path, step: int) -> None:
    whole = trainer._Run._step
    with pytest.MonkeyPatch.context() as patch:

        def stopping(self: Any, index: Tensor) -> dict[str, float]:
            values = whole(self, index)
            self.interruption.asked = self.progress.step == step
            return values

        patch.setattr(trainer._Run, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(settings, out, progress=False)


# --- what a step does


@dataclass(frozen=True)
class Broken:
    """Clean loss that is NaN from one call on."""

    at: int = 0

    def __call__(self, views: Views) -> dict[str, Tensor]:
        clean = cross_entropy(views.clean, views.y)
        return {"clean": clean, "odd": clean * (math.nan if views.ramp >= self.at / 100 else 0.0)}


@pytest.fixture
def broken() -> Iterator[None]:
    """An objective that exists for one test only, so that tests of everything registered never see it."""
    OBJECTIVES.register("broken_for_test")(Broken)
    yield
    del OBJECTIVES._entries["broken_for_test"]


@pytest.mark.usefixtures("broken")
def test_a_loss_that_is_not_a_number_stops_the_run_with_step_term_and_advice(tmp_path: Path) -> None:
    settings = tiny(objective="broken_for_test:at=50", epochs=3, eps_schedule="linear:start=0,end=2")
    with pytest.raises(TrainingError, match=r"^step 11: odd is nan\. Try a lower learning rate, .*clip_norm"):
        train(settings, tmp_path, progress=False)


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
def test_a_huge_learning_rate_stops_the_run(clip_norm: float, tmp_path: Path) -> None:
    settings = tiny(optimizer="sgd:lr=1e30", clip_norm=clip_norm)
    with pytest.raises(TrainingError, match=r"^step \d+: .* is (nan|inf)\."):
        train(settings, tmp_path, progress=False)


def test_weights_that_broke_in_the_last_step_are_never_stored(tmp_path: Path) -> None:
    settings = tiny(optimizer="sgd:lr=1e39", clip_norm=0.0, epochs=1, batch_size=2000, validation=0.0)
    with pytest.raises(TrainingError, match=r"step 1: largest weight of .* is (nan|inf)"):
        train(settings, tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).exists() and not (tmp_path / STATE).exists()


def double_problem(model: str, count: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = MODELS.parse(model)((1, 8, 8), 10, (0.3,), (0.4,)).double().train()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return net, x, torch.randint(10, (count,), generator=generator)


def gradients(net: nn.Module, x: Tensor, y: Tensor, moment: StepPlan, micro_batch: int) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    settings = Settings(eps=0.05, micro_batch=micro_batch)
    step_gradients(capture(net, x[:1]), x, y, moment, settings)
    return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("model", ["cnn3:width=2", "cnn3:width=2,batch_norm=true"])
def test_gradients_in_parts_are_those_of_the_whole_batch(model: str, fraction: float) -> None:
    net, x, y = double_problem(model)
    moment = StepPlan(IBP(clean_weight=0.3), [], fraction, 1.0, seeded("cpu", 0))
    whole = gradients(net, x, y, moment, 0)
    for size in (1, 7, 12):
        parts = gradients(net, x, y, moment, size)
        assert len(parts) == len(whole)
        for one, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_gradient_in_parts_includes_the_one_through_the_batch_statistics() -> None:
    """Against finite differences of the whole batch's loss in a weight below a BatchNorm layer."""
    net, x, y = double_problem("cnn3:width=2,batch_norm=true")
    moment = StepPlan(IBP(clean_weight=0.3), [], 1.0, 1.0, seeded("cpu", 0))
    gradient = gradients(net, x, y, moment, 7)[0].flatten()[3].item()
    weight = next(net.parameters()).data.view(-1)
    losses = []
    for step in (-1e-5, 1e-5):
        weight[3] += step
        terms = step_gradients(capture(net, x[:1]), x, y, moment, Settings(eps=0.05))
        losses.append(sum(term.item() for term in terms.values()))
        weight[3] -= step
    assert gradient == pytest.approx((losses[1] - losses[0]) / 2e-5, rel=1e-5)


def test_running_statistics_move_once_a_step_whatever_the_parts() -> None:
    net, x, y = double_problem("cnn3:width=2,batch_norm=true")
    before = {name: tensor.clone() for name, tensor in net.named_buffers()}
    found = []
    for size in (0, 5):
        net.load_state_dict({**net.state_dict(), **before})
        gradients(net, x, y, StepPlan(IBP(), [], 1.0, 1.0, seeded("cpu", 0)), size)
        found.append({name: tensor.clone() for name, tensor in net.named_buffers()})
    assert all(torch.allclose(found[0][name], found[1][name]) for name in before)
    assert any(not torch.equal(found[0][name], before[name]) for name in before if "running" in name)
    assert [int(v) for name, v in found[1].items() if name.endswith("num_batches_tracked")] == [1, 1]


@dataclass
class Seen:
    """What a run did at every step."""

    lr: list[float]
    eps: list[float]
    norms: list[float]
    objectives: list[str]


def observed(settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen([], [], [], [])
    whole, loss_of = trainer._Run._step, trainer.BatchLoss

    def step(self: Any, index: Tensor) -> dict[str, float]:
        values = whole(self, index)
        seen.lr.append(self.optimizer.param_groups[0]["lr"])
        seen.norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
        return values

    def noting(graph: Any, x: Tensor, y: Tensor, plan: StepPlan, *rest: Any) -> Any:
        seen.eps.append(plan.eps_fraction)
        seen.objectives.append(type(plan.objective).__name__)
        return loss_of(graph, x, y, plan, *rest)

    monkeypatch.setattr(trainer._Run, "_step", step)
    monkeypatch.setattr(trainer, "BatchLoss", noting)
    train(settings, out, progress=False)
    return seen


def test_schedules_act_step_by_step_and_the_warm_up_is_natural_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(
        optimizer="adam:lr=0.01", lr_schedule="cosine", eps_schedule="smooth:start=0.5,end=1.5", objective="ibp"
    )
    seen = observed(settings, tmp_path, monkeypatch)
    steps = len(seen.lr)
    per_epoch = steps // 2
    lr, eps = SCHEDULES.parse(settings.lr_schedule), SCHEDULES.parse(settings.eps_schedule)
    assert seen.lr == [0.01 * lr(step, per_epoch, 2) for step in range(steps)]
    assert seen.eps == [eps(step, per_epoch, 2) for step in range(steps)]
    assert seen.eps[0] == 0 and seen.eps[-1] == 1 and len(set(seen.eps)) > per_epoch // 2
    assert [name == "Natural" for name in seen.objectives] == [value == 0 for value in seen.eps]
    last = records(tmp_path)[-1]
    assert last["lr"] == seen.lr[-1] and last["eps"] == settings.eps and last["step"] == steps


def test_a_run_at_radius_zero_is_natural_training_bit_by_bit(tmp_path: Path) -> None:
    warm = tiny(objective="ibp", eps_schedule="linear:start=50,end=60", epochs=1)
    natural = tiny(objective="natural", eps_schedule="linear:start=50,end=60", epochs=1)
    assert same(trained(warm, tmp_path / "warm"), trained(natural, tmp_path / "natural"))


def test_gradients_are_clipped_to_the_norm_in_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = observed(tiny(epochs=1, clip_norm=0.5), tmp_path / "clipped", monkeypatch).norms
    assert max(norms) == pytest.approx(0.5, rel=1e-4)
    monkeypatch.undo()
    assert max(observed(tiny(epochs=1, clip_norm=0.0), tmp_path / "free", monkeypatch).norms) > 0.6


# --- data


def test_validation_images_are_none_of_the_training_images_and_the_test_set_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = DATASETS.parse("digits")(None)

    class Untouchable(MemoryImages):
        def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
            raise AssertionError("the test set was read in training")

        subset = center_crop = to = split = batch  # type: ignore[assignment]

    hidden = DataSet(**{**vars(digits), "test": Untouchable(digits.test.pixels, digits.test.labels)})  # type: ignore[attr-defined]
    monkeypatch.setattr(run_setup, "parse_dataset", lambda text: lambda root: hidden)
    for validation in (0.0, 0.2):
        train(tiny(validation=validation, epochs=1, select="last"), tmp_path / str(validation), progress=False)
    data = training_data(tiny(validation=0.2), None)
    everything = torch.arange(len(digits.train))
    whole = digits.train.batch(everything)[0].flatten(1)
    kept, held = (part.batch(torch.arange(len(part)))[0].flatten(1) for part in (data.train, data.test))
    assert len(kept) + len(held) == len(whole) and len(held) == round(0.2 * len(whole))
    # The multiset of images is kept, so nothing is on both sides or on neither.
    together = torch.cat([kept, held])
    assert torch.equal(_sorted_rows(together), _sorted_rows(whole))


def _sorted_rows(rows: Tensor) -> Tensor:
    keys = (rows.double() * torch.arange(1, rows.shape[1] + 1)).sum(dim=1)
    return rows[keys.argsort()]


def test_a_last_batch_of_one_image_takes_another_one_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = trainer._Run._step

    def step(self: Any, index: Tensor) -> dict[str, float]:
        sizes.append(index.tolist())
        return whole(self, index)

    monkeypatch.setattr(trainer._Run, "_step", step)
    # 1437 images less 144 for validation are 1293 = 4 * 323 + 1; BatchNorm on 1 x 1 maps would fail on one image.
    train(
        tiny(batch_size=323, epochs=2, model="mlp:hidden=4,batch_norm=true", eps_schedule="constant"),
        tmp_path,
        progress=False,
    )
    assert [len(index) for index in sizes] == [323, 323, 323, 323, 2] * 2
    for epoch in (sizes[:5], sizes[5:]):
        flat = [i for index in epoch for i in index]
        assert sorted(flat[:-1]) == list(range(1293)) and flat[-1] == flat[0]
    assert sizes[0] != sizes[5]


def test_a_data_set_without_enough_training_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = DATASETS.parse("digits")(None)
    small = DataSet(**{**vars(digits), "train": digits.train.subset(torch.arange(4))})
    monkeypatch.setattr(run_setup, "parse_dataset", lambda text: lambda root: small)
    with pytest.raises(TrainingError, match=r"validation=0\.1 of 4 images leaves 4 to train on and 0 to validate with"):
        training_data(tiny(validation=0.1), None)
    empty = DataSet(**{**vars(digits), "train": digits.train.subset(torch.arange(0))})
    monkeypatch.setattr(run_setup, "parse_dataset", lambda text: lambda root: empty)
    with pytest.raises(TrainingError, match="digits: no training images"):
        training_data(tiny(), None)


def test_without_augmentation_images_are_still_cut_to_the_models_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from robust.augmentation import Augmentation

    digits = DATASETS.parse("digits")(None)
    cut = DataSet(**{**vars(digits), "augmentation": Augmentation(crop_size=6), "input_shape": (1, 6, 6)})
    monkeypatch.setattr(run_setup, "parse_dataset", lambda text: lambda root: cut)
    for validation in (0.0, 0.1):
        data = training_data(tiny(augment=False, validation=validation), None)
        assert data.train.batch(torch.arange(2))[0].shape == (2, 1, 6, 6)
    assert training_data(tiny(), None).train.batch(torch.arange(2))[0].shape == (2, 1, 8, 8)


# --- what is kept


def test_best_keeps_the_best_certified_epoch_at_the_full_radius_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certified accuracies are scripted: the greatest one falls into the ramp and must not win."""
    script = [90.0, 80.0, 30.0, 50.0, 40.0]
    kept: list[dict[str, Tensor]] = []

    def scripted(model: nn.Module, *_: Any) -> dict[str, float]:
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"clean": 95.0, "certified": script[len(kept) - 1]}

    monkeypatch.setattr(trainer, "validate", scripted)
    settings = tiny(epochs=5, select="best", eps_schedule="linear:start=0,end=2", batch_size=400)
    assert same(trained(settings, tmp_path), kept[3])
    metrics = load_tensors(tmp_path / CHECKPOINT)[1]["metrics"]
    assert metrics == {"validation/clean": 95.0, "validation/certified": 50.0}
    assert [record["validation/certified"] for record in records(tmp_path)] == script


def test_validation_counts_what_the_model_in_evaluation_mode_gets_right(undisturbed: dict[str, Path]) -> None:
    checkpoint = train(SGD, undisturbed["sgd"], progress=False)
    data = training_data(SGD, None)
    x, y = data.test.batch(torch.arange(len(data.test)))
    with torch.no_grad():
        right = 100 * (checkpoint.model(x).argmax(dim=1) == y).double().mean().item()
    assert checkpoint.metrics["validation/clean"] == pytest.approx(right)
    assert 0 <= checkpoint.metrics["validation/certified"] <= right


def test_validate_every_leaves_epochs_out_but_never_the_last(tmp_path: Path) -> None:
    train(tiny(epochs=3, validate_every=2), tmp_path, progress=False)
    assert ["validation/clean" in record for record in records(tmp_path)] == [False, True, True]


def test_the_log_has_every_term_and_the_speed(tmp_path: Path) -> None:
    train(tiny(regularizers=("l1:weight=1e-5",), objective="ibp:clean_weight=0.5"), tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert {"step", "eps", "lr", "seconds", "images_per_second", "loss/clean", "loss/ibp", "loss/l1"} <= set(line)
        assert line["images_per_second"] == pytest.approx(1293 / line["seconds"])
    assert lines[0]["loss/clean"] + lines[0]["loss/ibp"] < 2 * F.cross_entropy(torch.zeros(1, 10), torch.tensor([0]))


def test_tensorboard_events_hold_the_log_and_a_continued_run_repeats_none(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = tiny(epochs=2)
    with pytest.raises(OSError, match="killed"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "_pause", _die_behind_first_epoch)
        train(settings, tmp_path, progress=False, tensorboard=True)
    train(settings, tmp_path, progress=False, tensorboard=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("loss/ibp", "validation/certified", "images_per_second"):
        assert [event.step for event in events.Scalars(name)] == [1, 2]
    logged = [record["loss/ibp"] for record in records(tmp_path)]
    assert [event.value for event in events.Scalars("loss/ibp")] == pytest.approx(logged)


def _die_behind_first_epoch(run: Any, at_once: bool = False) -> None:
    """With the epoch's events written and its state not."""
    if run.progress.step == run.steps_per_epoch:
        raise OSError("killed")


def test_two_hooks_that_average_weights_are_refused(tmp_path: Path) -> None:
    assert {"ema", "swa"} <= set(HOOKS.names())
    with pytest.raises(TrainingError, match="ema and swa both average"):
        train(tiny(hooks=("ema", "swa")), tmp_path, progress=False)


def test_a_rehearsal_spreads_its_steps_over_the_run_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places, step = [], trainer._Run._step
    monkeypatch.setattr(
        trainer._Run, "_step", lambda run, batch: (places.append(run.progress.step), step(run, batch))[1]
    )
    found = trainer.rehearse(tiny(epochs=4, objective="crown_ibp"), None, torch.device("cpu"), 4)
    count = 4 * found.steps_per_epoch
    assert places == [count // 8, *(count * share // 8 for share in (1, 3, 5, 7))]
    assert found.seconds_per_step > 0 and list(tmp_path.iterdir()) == []
