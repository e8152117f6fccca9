"""Whole runs made of several pieces: on the command line, killed and continued, and in parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robust import run_setup, trainer
from robust.active import Active, Moment, RunFacts
from robust.augmentation import Augmentation
from robust.auxiliary import AveragedModel, FrozenModel, PastLogits, TrainedAlong
from robust.cli import main
from robust.dataset import DATASETS, DataSet
from robust.objective import OBJECTIVES, cross_entropy
from robust.run_setup import CHECKPOINT, SETTINGS
from robust.settings import Settings, parse_recipe
from robust.trainer import train
from robust.views import Views
from robust.weighting import WEIGHTINGS, Weighting, normalised
from tests.robust.objectives import oracle
from tests.robust.runs import records, same, tiny, trained, weights

STEP = "attack=(pgd:steps=2,step_size=0.5,keep=last,mode=keep)"
PIECES = [
    *("--objective", f"sovr:{STEP}", "--weight-perturbation", "awp:gamma=0.01,start_epoch=1"),
    *("--weightings", "dafa:warmup_epochs=1", "--hooks", "ema:decay=0.9"),
]
EVERYTHING = tiny(
    objective=f"sovr:{STEP}",
    weight_perturbation="awp:gamma=0.01,start_epoch=1",
    weightings=("dafa:warmup_epochs=2",),
    hooks=("ema:decay=0.9",),
    optimizer="sgd:lr=0.05",
    eps_schedule="constant",
    epochs=3,
    batch_size=300,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_awp_sovr_dafa_and_ema_go_together_on_one_command_line(tmp_path: Path) -> None:
    common = ["--model", "cnn3:width=2,batch_norm=true", "--eps-schedule", "constant", "--epochs", "2", "--quiet"]
    assert main(["train", *PIECES, *common, "--batch-size", "300", "--device", "cpu", "--out", str(tmp_path)]) == 0
    log = records(tmp_path)
    assert {"loss/adversarial", "loss/ovr"} <= set(log[-1])
    settings = robust_settings(tmp_path)
    assert settings.weight_perturbation == "awp:gamma=0.01,start_epoch=1"
    assert settings.weightings == ("dafa:warmup_epochs=1",)
    toml = (
        'title = "t"\n[settings]\nobjective = "sovr"\nweightings = ["dafa:warmup_epochs=1"]\n'
        'weight_perturbation = "awp:gamma=0.01"'
    )
    assert parse_recipe("t", toml).settings.weight_perturbation == "awp:gamma=0.01"


def robust_settings(out: Path) -> Settings:
    import json

    return Settings.from_dict(json.loads((out / SETTINGS).read_text()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "objective": f"mtl_ibp:{STEP}",
            "micro_batch": 100,
            "regularizers": ("shi:weight=0.5",),
            "eps_schedule": "linear:start=0.1,end=2.5",
        },
        {"objective": "free_for_test", "weight_perturbation": "sam", "weightings": ()},
        {"weight_perturbation": "rwp:iterations=2", "weightings": ("doubt_for_test",), "objective": f"trades:{STEP}"},
        {
            "objective": f"lbgat:teacher=cnn3,{STEP}",
            "weightings": ("kl_dro:momentum=0.5",),
            "regularizers": ("elle_a:weight=2,sensitivity=0", "saf:start_epoch=1,epochs_back=1", "mesa:start_epoch=1"),
            "hooks": ("ema:decay=0.9,warmup=true,start_epoch=0.5,batch_norm=average",),
        },
        {
            "objective": f"trades:kl_weight=1,{STEP}",
            "weightings": ("cfa:start_epoch=1", "frl:attack=(fgsm),clean_bound=-1,boundary_bound=-1"),
            "hooks": ("fawa:threshold=0,attack=(fgsm)",),
            "validation": 0.1,
        },
    ],
    ids=["all", "certified", "state", "rwp", "memories", "fairness"],
)
@pytest.mark.usefixtures("pieces")
def test_a_run_of_many_pieces_stopped_behind_any_step_ends_bit_by_bit_like_an_undisturbed_one(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_dict({**EVERYTHING.to_dict(), **changes})
    whole = trained(settings, tmp_path / "whole")
    step = trainer._Run._step

    def stopping(self: Any, index: Tensor) -> dict[str, float]:
        values = step(self, index)
        self.interruption.asked = self.progress.step % 3 == 0
        return values

    monkeypatch.setattr(trainer._Run, "_step", stopping)
    goes = 0
    while not (tmp_path / "parts" / CHECKPOINT).exists():
        goes += 1
        try:
            train(settings, tmp_path / "parts", progress=False)
        except KeyboardInterrupt:
            pass
    assert goes > 4
    assert same(whole, weights(tmp_path / "parts"))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_every_piece_changes_the_run_and_none_changes_it_when_it_is_left_out(tmp_path: Path) -> None:
    plain = {"weight_perturbation": "none", "weightings": (), "hooks": ()}
    base = trained(Settings.from_dict({**EVERYTHING.to_dict(), **plain}), tmp_path / "base")
    for name in plain:
        one = {key: value for key, value in plain.items() if key != name}
        assert not same(base, trained(Settings.from_dict({**EVERYTHING.to_dict(), **one}), tmp_path / name))
    late = {**plain, "weight_perturbation": "awp:start_epoch=3"}
    assert same(base, trained(Settings.from_dict({**EVERYTHING.to_dict(), **late}), tmp_path / "late"))


# --- the interfaces: an objective with state and replays, a weighting of a path


@dataclass(frozen=True)
class Remembering:
    """An objective with a teacher trained along, an average, past logits and a perturbation that outlives the step."""

    replays: ClassVar[int] = 2

    def start(self, run: RunFacts) -> Active:
        return _Remembering(run)


class _Remembering(Active):
    def __init__(self, run: RunFacts) -> None:
        self.teacher = TrainedAlong("cnn3:width=2,batch_norm=true", run)
        self.average = AveragedModel(0.9, run)
        self.past = PastLogits(1, run)
        self.delta = torch.zeros(run.input_shape)

    def companions(self) -> list[Active]:
        return [self.teacher, self.average, self.past]

    def __call__(self, views: Views) -> dict[str, Tensor]:
        self.leaf = self.delta.clone().requires_grad_()
        logits = views.train((views.x + self.leaf).clamp(0, 1))
        views.logits["adversarial"] = logits
        old = self.past(views.index, views.epoch)
        old = torch.where(old.isnan(), self.average(views.x), old)
        return {
            "adversarial": cross_entropy(logits, views.y),
            "teacher": cross_entropy(self.teacher(views.x), views.y),
            "kl": 0.1 * (logits - old).square().sum(1),
        }

    def see(self, views: Views, moment: Moment) -> None:
        self.past.keep(views.index, moment.epoch, views.adversarial)

    def after_step(self, moment: Moment) -> None:
        self.delta = (self.delta + 0.05 * self.leaf.grad.sign()).clamp(-0.1, 0.1)

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.delta = state["delta"].clone()


@dataclass(frozen=True)
class Doubt(Weighting):
    """Weights that fall with the number of right iterates, normalised to mean 1, from the second epoch on."""

    needs_kappa: ClassVar[bool] = True

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        assert 0 <= int(views.kappa.min()) and int(views.kappa.max()) <= 2
        weight = normalised(1.0 + views.kappa, "mean_one") if views.epoch >= 1 else torch.ones_like(terms["clean"])
        return {**terms, "clean": weight * terms["clean"]}


@pytest.fixture
def pieces():
    OBJECTIVES.register("free_for_test")(Remembering)
    WEIGHTINGS.register("doubt_for_test")(Doubt)
    yield
    del OBJECTIVES._entries["free_for_test"], WEIGHTINGS._entries["doubt_for_test"]


@pytest.mark.usefixtures("pieces")
def test_replays_show_each_mini_batch_twice_with_the_same_augmentation_and_train_the_second_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Any]] = []
    whole = trainer._Run._step

    def step(self: Any, index: Tensor) -> dict[str, float]:
        values = whole(self, index)
        seen.append((index, copy.deepcopy(self.objective.teacher.model.state_dict())))
        return values

    images: list[Tensor] = []
    loss_of = trainer.BatchLoss

    def noting(graph: Any, x: Tensor, *rest: Any) -> Any:
        images.append(x)
        return loss_of(graph, x, *rest)

    digits = DATASETS.parse("digits")(None)
    moved = DataSet(**{**vars(digits), "augmentation": Augmentation(crop_padding=2)})
    monkeypatch.setattr(run_setup, "parse_dataset", lambda text: lambda root: moved)
    monkeypatch.setattr(trainer, "BatchLoss", noting)
    monkeypatch.setattr(trainer._Run, "_step", step)
    train(tiny(objective="free_for_test", epochs=1, batch_size=400, eps_schedule="constant"), tmp_path, progress=False)
    assert all(torch.equal(images[i], images[i + 1]) for i in range(0, 8, 2))
    assert not torch.equal(images[0], digits.train.batch(seen[0][0])[0])
    orders = [index for index, _ in seen]
    assert len(orders) == 8 and all(torch.equal(orders[i], orders[i + 1]) for i in range(0, 8, 2))
    assert sorted(torch.cat(orders[::2]).tolist()) == list(range(1293))
    assert not torch.equal(*(state["1.weight"] for _, state in seen[-2:]))
    assert records(tmp_path)[0]["step"] == 8


def test_a_frozen_teacher_is_the_checkpoint_and_must_fit_the_run(tmp_path: Path) -> None:
    checkpoint = train(tiny(epochs=1), tmp_path, progress=False)
    run = RunFacts(checkpoint.model, (1, 8, 8), 10, 5, 1, 1, lambda text: nn.Identity())
    teacher = FrozenModel(str(tmp_path / CHECKPOINT), run)
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    torch.testing.assert_close(teacher(x), checkpoint.model(x))
    assert teacher(x).requires_grad and not any(p.requires_grad for p in teacher.model.parameters())
    other = RunFacts(checkpoint.model, (3, 8, 8), 10, 5, 1, 1, lambda text: nn.Identity())
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\) and 10 classes; the run has \(3, 8, 8\) and 10"):
        FrozenModel(str(tmp_path / CHECKPOINT), other)


def test_an_averaged_model_holds_copies_of_weights_and_statistics_never_the_networks_own() -> None:
    net = oracle.small_net(batch_norm=True)
    run = RunFacts(net, oracle.SHAPE, 4, 5, 1, 1, lambda text: nn.Identity())
    average = AveragedModel(0.75, run)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for value in net.state_dict().values():
            value += 1
    average.after_step(Moment(net, 1, 0.1, lambda: iter(())))
    for name, value in average.model.state_dict().items():
        expected = before[name] + (0.25 if value.is_floating_point() else 1)
        torch.testing.assert_close(value, expected)
        assert value.data_ptr() != net.state_dict()[name].data_ptr()


def test_past_logits_are_those_of_the_image_so_many_epochs_ago() -> None:
    past = PastLogits(2, RunFacts(oracle.small_net(), oracle.SHAPE, 2, 4, 9, 1, lambda text: nn.Identity()))
    for epoch in range(5):
        index = torch.tensor([3, epoch % 3])
        past.keep(index, epoch + 0.5, torch.full((2, 2), float(epoch)))
        found = past(torch.tensor([3]), epoch + 0.9)
        assert found.isnan().all() if epoch < 2 else torch.equal(found, torch.full((1, 2), epoch - 2.0))


def test_features_are_the_input_of_the_last_layer_in_training_mode() -> None:
    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    views = oracle.views_of(net, x, y, 0.1)
    logits, features = views.train_with_features(x)
    torch.testing.assert_close(logits, oracle.clean_pass(net, x)[0])
    torch.testing.assert_close(net[-1](features), logits)


def test_what_is_asked_of_an_objective_that_does_not_have_it_is_refused_with_advice() -> None:
    views = oracle.views_of(oracle.small_net(), *oracle.images(), 0.1)
    for name in ("adversarial", "kappa"):
        with pytest.raises(ValueError, match=r"this needs .*; try pgd"):
            getattr(views, name)


def test_weights_are_normalised_to_mean_or_sum_one() -> None:
    weight = torch.tensor([1.0, 2.0, 5.0])
    assert float(normalised(weight, "mean_one").mean()) == pytest.approx(1)
    assert float(normalised(weight, "sum_one").sum()) == pytest.approx(1)
    assert normalised(weight, "none") is weight
    assert not normalised(0 * weight, "mean_one").isnan().any()
