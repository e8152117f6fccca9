"""The training loop.

A run lives in a folder: `settings.json`, `log.jsonl` (one record per epoch), `state.safetensors` (for going on after a
kill) and at its end `checkpoint.safetensors`, beside which `last.safetensors` holds the last epoch's weights where the
best ones were selected. All randomness is keyed by (seed, purpose, step), so a run that was
killed continues from its last state with the same result, bit by bit on a CPU. What it did behind that state is done
again: the state is saved by the clock, since a run of short epochs would spend its time on waiting for the disk.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.noise import Share
from certify.tracing import capture
from robust.active import Active, Moment, RunFacts, active_among, begin
from robust.batch_norm import has_batch_norm, reestimate_statistics
from robust.checkpoint import Checkpoint, load
from robust.files import JsonLines, remove_parts, write_whole
from robust.hook import HOOKS
from robust.interruption import Interruption
from robust.model import names_file
from robust.objective import OBJECTIVES
from robust.objectives.natural import Natural
from robust.optimizer import OPTIMIZERS
from robust.own_model import own_network
from robust.regularizer import REGULARIZERS
from robust.run_setup import (
    BEST,
    CHECKPOINT,
    LAST,
    LOG,
    SETTINGS,
    STATE,
    TrainingError,
    build_model,
    check_texts,
    parse_perturbation,
    refuse_misfits,
    refuse_other_settings,
    refuse_undivided,
    refuse_unlike,
    settings_facts,
    training_data,
)
from robust.schedule import SCHEDULES, ramp_progress
from robust.seeds import seeded
from robust.settings import Settings
from robust.step import BatchLoss, StepPlan, parts_of
from robust.team import Team
from robust.tensor_file import CheckpointError, load_tensors, save_tensors
from robust.validation import decisive, parse_validator, validate, validation_batches
from robust.weight_perturbation import Perturbed
from robust.weighting import WEIGHTINGS

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and metadata of a saved state."""


@dataclass
class Progress:
    """Where a run stands, besides weights and optimiser.

    Attributes:
        step: optimiser steps done.
        sums: of the loss terms over the present epoch's steps.
        seconds: spent on the present epoch's steps.
        best: validation accuracy of the kept weights, certified or under attack; -1 before there are any.
        metrics: of the last validation.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: float = -1.0
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    root: Path | None = None,
    progress: bool = True,
    tensorboard: bool = False,
    save_every: float = 60.0,
    team: Team | None = None,
) -> Checkpoint:
    """Train a model, or go on with the run in `out`.

    Args:
        settings: of the run; a run that is continued must have the same.
        out: folder of the run; made if absent.
        device: "cpu", "cuda" ...
        root: folder of the data sets, see `robust.dataset.data_root`.
        progress: show a progress bar.
        tensorboard: also write TensorBoard events to `out`.
        save_every: seconds between saved states.
        team: processes that train together, each with its share of every mini-batch; the first one writes the files.

    Returns:
        the checkpoint, also in `out/checkpoint.safetensors`; that of a finished run without training again.

    Raises:
        TrainingError: other settings in `out`, a damaged state, too few images, a loss that is not finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the state was saved behind the step that was under way.
        FileInUse: another process is training in `out`.
        OSError: a full disk and the like, or somebody removed `out` under the run.
    """
    out = Path(out)
    check_texts(settings)
    if team is not None:
        refuse_undivided(settings)

    def finished() -> bool:
        refuse_other_settings(settings, out)
        done = (out / CHECKPOINT).exists()
        if done:
            with contextlib.suppress(OSError):  # a finished run may be where nobody can write
                _remove_working_files(out)
        return done

    if finished() if team is None else team.from_lead(finished):
        own = own_network(settings.model) if names_file(settings.model) else None
        return load(out / CHECKPOINT, own)
    return _Run(settings, out, torch.device(device), root, progress, tensorboard, save_every, team).run()


@dataclass(frozen=True)
class Rehearsal:
    """What a run is about to do: counts of the whole run, and mean seconds of a step."""

    images: int
    parameters: int
    steps_per_epoch: int
    seconds_per_step: float


def rehearse(settings: Settings, root: Path | None, device: torch.device, steps: int) -> Rehearsal:
    """Some steps, spread evenly over the run, of which nothing is kept or written; one more goes before to warm up.

    A step may cost many times more in one part of a run than in another: CROWN-IBP ends as IBP.
    """
    check_texts(settings)
    run = _Run(settings, Path(), device, root, progress=False, tensorboard=False, save_every=math.inf)
    run.model.train()
    batch = run._batch_of(run._order(settings.epochs - 1), 0)
    count = settings.epochs * run.steps_per_epoch
    seconds = []
    for number in (0, *range(steps)):
        run.progress.step = count * (2 * number + 1) // (2 * steps)
        started = time.perf_counter()
        run._step(batch)  # the loss is read, so a GPU has finished
        seconds.append(time.perf_counter() - started)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return Rehearsal(len(run.train_images), parameters, run.steps_per_epoch, sum(seconds[1:]) / steps)


class _Run:
    def __init__(
        self,
        settings: Settings,
        out: Path,
        device: torch.device,
        root: Path | None,
        progress: bool,
        tensorboard: bool,
        save_every: float,
        team: Team | None = None,
    ) -> None:
        self.settings, self.out, self.device, self.team = settings, out, device, team
        self.leads = team is None or team.leads
        self.show, self.save_every = progress and self.leads, save_every
        self.data = training_data(settings, root)
        self.train_images = self.data.train.to(device)
        self.model = build_model(settings, self.data).to(device)
        self.validator = parse_validator(settings.validator)
        self.eps_schedule = SCHEDULES.parse(settings.eps_schedule)
        self.lr_schedule = SCHEDULES.parse(settings.lr_schedule)
        objective = OBJECTIVES.parse(settings.objective)
        self.epoch_size = self.train_images.epoch_size(settings.batch_size)
        self.replays, self.steps_alone = getattr(objective, "replays", 1), getattr(objective, "steps_alone", 0)
        self.steps_per_epoch = self.replays * max(1, math.ceil(self.epoch_size / settings.batch_size))
        if team is not None:
            self._refuse_small_batches()
        refuse_misfits(settings, self.train_images.labels, self.steps_per_epoch)
        facts = self._facts(objective)
        self.objective = begin(objective, facts)
        self.regularizers = [begin(REGULARIZERS.parse(text), facts) for text in settings.regularizers]
        self.weightings = [begin(WEIGHTINGS.parse(text), facts) for text in settings.weightings]
        self.perturbation = parse_perturbation(settings)
        hooks = [begin(HOOKS.parse(text), facts) for text in settings.hooks]
        self.active = active_among([self.objective, *self.regularizers, *self.weightings, *hooks])
        averaging = [text for text, hook in zip(settings.hooks, hooks, strict=True) if hook.averages]
        if len(averaging) > 1:
            raise TrainingError(f"{' and '.join(averaging)} both average the weights; keep one of them")
        back = [text for text, hook in zip(settings.hooks, hooks, strict=True) if hook.goes_back]
        if averaging and back:
            raise TrainingError(
                f"{back[0]} puts earlier weights back, and the average of {averaging[0]} has the later ones in it; "
                "keep one of them"
            )
        self.parameters = [*self.model.parameters(), *(p for active in self.active for p in active.parameters())]
        factory = OPTIMIZERS.parse(settings.optimizer)
        self.lr = factory.lr
        self.optimizer = factory(self.parameters)
        self.graph = dataclasses.replace(capture(self.model, self._example()), group=facts.group)
        self.progress = Progress()
        self.summary_writer = _summary_writer_class() if tensorboard and self.leads else None
        self.writer: Any = None
        self.log: JsonLines | None = None
        self.interruption = Interruption()
        self.saved_at = time.monotonic()

    def _refuse_small_batches(self) -> None:
        """TrainingError where a mini-batch of the run has fewer images than there are processes."""
        size = self.settings.batch_size
        try:
            for count in (min(size, self.epoch_size), self.epoch_size % size or size):
                parts_of(count, self.settings, self.team)
        except ValueError as error:
            raise TrainingError(str(error)) from None

    def run(self) -> Checkpoint:
        with contextlib.ExitStack() as stack:

            def begin_folder() -> State | None:
                self.log = stack.enter_context(JsonLines(self.out / LOG))
                # Only now nobody else can be writing to the folder.
                refuse_other_settings(self.settings, self.out)
                for name in (STATE, BEST, CHECKPOINT, LAST, SETTINGS):
                    remove_parts(self.out / name)
                write_whole(self.out / SETTINGS, json.dumps(settings_facts(self.settings), indent=2) + "\n")
                return self._saved()

            state = begin_folder() if self.team is None else self.team.from_lead(begin_folder)
            if state is not None:
                self._restore(*state)
            first = self.progress.step // self.steps_per_epoch
            if self.log is not None:
                # Records behind the restored state belong to steps that are now done again.
                self.log.keep(first)
            if self.summary_writer is not None:
                self.writer = stack.enter_context(self.summary_writer(str(self.out), purge_step=first + 1))
            stack.enter_context(self.interruption)
            for epoch in range(first, self.settings.epochs):
                if self._finished():
                    break
                best = self.progress.best
                record = self._epoch(epoch)
                if self.log is not None:
                    self.log.append([record])
                self._pause(at_once=self.progress.best > best)
            return self._finish()

    def _finished(self) -> bool:
        """Whether a method has ended the run before its time."""
        return self._agreed(any(active.finished() for active in self.active))

    def _agreed(self, fact: bool) -> bool:
        """Whether the fact holds on any of the processes, which must not part ways."""
        return fact if self.team is None else self.team.any(fact)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        order = self._order(epoch)
        done = self.progress.step - epoch * self.steps_per_epoch
        self.model.train()
        bar = tqdm(
            total=self.steps_per_epoch,
            initial=done,
            desc=f"epoch {epoch + 1}/{self.settings.epochs}",
            disable=not self.show,
            leave=False,
        )
        with bar:
            for place in range(done, self.steps_per_epoch):
                started = time.perf_counter()
                terms = self._step(self._batch_of(order, place // self.replays))
                # Each kind of step has terms of its own, whose means are over the steps of its kind.
                kind = self.steps_alone if self._alone(place) else self.replays - self.steps_alone
                for name, value in terms.items():
                    self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value * self.replays / kind
                self.progress.seconds += time.perf_counter() - started
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items()}, refresh=False)
                # Behind the last step a state would claim an epoch whose record and hooks are still to come.
                if place + 1 < self.steps_per_epoch:
                    self._pause()
        return self._close_epoch(epoch)

    def _pause(self, at_once: bool = False) -> None:
        """Between two steps or epochs: save the state if it is time, and stop where an interruption asks for it."""
        asked = self._agreed(self.interruption.asked)
        if self.leads and (asked or at_once or time.monotonic() - self.saved_at > self.save_every):
            self._save()
        if asked:
            raise KeyboardInterrupt

    def _step(self, index: Tensor) -> dict[str, float]:
        """One optimiser step; the loss terms' values."""
        settings, step = self.settings, self.progress.step
        parts = parts_of(len(index), settings, self.team)
        noise = seeded(self.device, settings.seed, "augmentation", step // self.replays)
        if self.team is not None:
            rows = torch.cat([torch.arange(len(index)).split(parts[0].count)[n][p.share] for n, p in enumerate(parts)])
            noise, index = Share(noise, rows, len(index)), index[rows]
        x, y = self.train_images.batch(index, self.device)
        if settings.augment and self.data.augmentation is not None:
            x = self.data.augmentation(x, noise)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.lr_schedule(step, self.steps_per_epoch, settings.epochs)
        moment = self._moment()
        plan = self._plan(moment)
        loss = BatchLoss(self.graph, x, y, plan, settings, index, self.team, parts)
        self.optimizer.zero_grad(set_to_none=True)
        perturbation = None if self._alone(step) else self.perturbation
        if perturbation is None or plan.eps_fraction == 0 or moment.epoch < perturbation.start_epoch:
            perturbed, terms = Perturbed([], "after_step"), loss.backward()
        else:
            perturbed = Perturbed(perturbation(self.model, loss), perturbation.restore)
            terms = loss.backward(move_statistics=perturbation.statistics_follow != "unperturbed")
        if self.team is not None:
            self.team.add_up(parameter.grad for parameter in self.parameters)
        values = {name: float(value) for name, value in terms.items()}
        self._check(values)
        perturbed.restore("before_step")
        if settings.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm, error_if_nonfinite=False)
            self._check({"gradient norm": float(norm)})
        self.optimizer.step()
        perturbed.restore("after_step")
        self.progress.step += 1
        moment = self._moment()
        for active in self.active:
            active.after_step(moment)
        return values

    def _plan(self, moment: Moment) -> StepPlan:
        """What the loss of the coming step is made of; at radius 0 it is natural training."""
        step = moment.step
        fraction = self.eps_schedule(step, self.steps_per_epoch, self.settings.epochs)
        ramp = ramp_progress(self.eps_schedule, step, self.steps_per_epoch)
        noise = seeded(self.device, self.settings.seed, "attack", step)
        if self._alone(step):
            return StepPlan(self.objective, [], fraction, ramp, noise, moment=moment)
        if fraction == 0:
            return StepPlan(Natural(), self.regularizers, fraction, ramp, noise, [], self.active, moment)
        return StepPlan(self.objective, self.regularizers, fraction, ramp, noise, self.weightings, self.active, moment)

    def _alone(self, step: int) -> bool:
        """Whether the step is the objective's alone."""
        return step % self.replays < self.steps_alone

    def _check(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {self.progress.step}: {name} is {value}. Try a lower learning rate, a longer radius ramp "
                    "(eps_schedule), gradient clipping (clip_norm) or init='ibp'"
                )

    def _check_weights(self) -> None:
        """What the loss of a next step would show, before weights are judged or saved."""
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                self._check({f"largest weight of {name}": float(tensor.abs().max())})

    def _close_epoch(self, epoch: int) -> dict[str, Any]:
        self._check_weights()
        moment = self._moment()
        for active in self.active:
            active.after_epoch(moment)
        means = {name: total / self.steps_per_epoch for name, total in self.progress.sums.items()}
        seconds = self.progress.seconds
        self.progress.sums, self.progress.seconds = {}, 0.0
        last = self.progress.step - 1
        fraction = self.eps_schedule(last, self.steps_per_epoch, self.settings.epochs)
        ends = epoch + 1 == self.settings.epochs or self._finished()
        due = (epoch + 1) % self.settings.validate_every == 0 or ends
        if due and self.settings.validation:
            model = self._judged()
            ball = self.settings.ball()
            self.progress.metrics = validate(model, self.data, ball, self.validator, self.device, self.team)
            self._select(model, fraction)
        record = {
            "epoch": epoch + 1,
            "step": self.progress.step,
            "eps": self.settings.eps * self.settings.train_eps_factor * fraction,
            "lr": self.lr * self.lr_schedule(last, self.steps_per_epoch, self.settings.epochs),
            **{f"loss/{name}": value for name, value in means.items()},
            **({f"validation/{name}": value for name, value in self.progress.metrics.items()} if due else {}),
            "seconds": seconds,
            "images_per_second": self.epoch_size / seconds,
        }
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, epoch + 1)
        if self.show:
            tqdm.write(_line(record))
        return record

    def _judged(self) -> nn.Module:
        """The model whose weights count: the averaged one where a hook averages."""
        averaged = [weights for active in self.active if (weights := active.weights()) is not None]
        if not averaged:
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict({**model.state_dict(), **averaged[-1]})
        if has_batch_norm(model) and averaged[-1].keys().isdisjoint(dict(model.named_buffers())):
            reestimate_statistics(model, self._moment().batches())
        return model

    def _select(self, model: nn.Module, fraction: float) -> None:
        """Keep these weights if they are the best yet at the full radius."""
        accuracy = decisive(self.progress.metrics)
        if self.settings.select == "best" and fraction >= 1 and accuracy > self.progress.best:
            self.progress.best = accuracy
            if not self.leads:
                return
            metadata = {"step": self.progress.step, "metrics": self.progress.metrics}
            self._require_own_folder()
            save_tensors(self.out / BEST, model.state_dict(), metadata)

    def _finish(self) -> Checkpoint:
        model, metrics = self._judged(), self.progress.metrics
        if not self.leads:
            assert self.team is not None
            self.team.follow_lead(model)
            return self._checkpoint(model, metrics)
        self._require_own_folder()
        if (self.out / BEST).exists():
            self._checkpoint(model, metrics).save(self.out / LAST)
            weights, metadata = load_tensors(self.out / BEST)
            model.load_state_dict(weights)
            metrics = metadata["metrics"]
        checkpoint = self._checkpoint(model, metrics)
        checkpoint.save(self.out / CHECKPOINT)
        _remove_working_files(self.out)
        if self.team is not None:
            self.team.follow_lead(model)
        return checkpoint

    def _checkpoint(self, model: nn.Module, metrics: Mapping[str, float]) -> Checkpoint:
        return Checkpoint(
            model.eval(),
            {
                **self.settings.to_dict(),
                "input_shape": list(self.data.input_shape),
                "classes": len(self.data.classes),
                "class_names": list(self.data.classes),
                "mean": list(self.data.mean),
                "std": list(self.data.std),
            },
            self.settings.ball(),
            {f"validation/{name}": value for name, value in metrics.items()},
        )

    def _order(self, epoch: int) -> Tensor:
        """Indices of the training images in an epoch's order.

        A last batch of one image, of which BatchNorm has no statistics, takes the epoch's first image along.
        """
        order = self.train_images.epoch(self.settings.batch_size, seeded("cpu", self.settings.seed, "order", epoch))
        if len(order) % self.settings.batch_size == 1 and len(order) > 1:
            order = torch.cat([order, order[:1]])
        return order

    def _batch_of(self, order: Tensor, place: int) -> Tensor:
        return order[place * self.settings.batch_size : (place + 1) * self.settings.batch_size]

    def _moment(self) -> Moment:
        epoch = self.progress.step / self.steps_per_epoch
        return Moment(self.model, self.progress.step, epoch, self._batches, self._labelled, self._held_out)

    def _batches(self) -> Iterator[Tensor]:
        return (x for x, _ in self._labelled())

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.progress.step // self.steps_per_epoch
        order = self._order(epoch)
        for place in range(self.steps_per_epoch // self.replays):
            x, y = self.train_images.batch(self._batch_of(order, place), self.device)
            if self.settings.augment and self.data.augmentation is not None:
                x = self.data.augmentation(x, seeded(self.device, self.settings.seed, "statistics", epoch, place))
            yield x, y

    def _held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.settings.validation:
            yield from ((x, y) for _, x, y in validation_batches(self.data, self.device))

    def _facts(self, objective: Any) -> RunFacts:
        return RunFacts(
            self.model,
            self.data.input_shape,
            len(self.data.classes),
            len(self.train_images),
            self.settings.epochs,
            self.steps_per_epoch,
            lambda text: build_model(dataclasses.replace(self.settings, model=text), self.data).to(self.device),
            self.settings.train_ball(),
            None if self.team is None else self.team.group,
            self.settings.model if names_file(self.settings.model) else None,
            objective,
        )

    def _example(self) -> Tensor:
        return torch.zeros(1, *self.data.input_shape, device=self.device)

    def _save(self) -> None:
        """Write the state whole: weights, optimiser, hooks, and where the run stands."""
        self._check_weights()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        plain: dict[str, Any] = {}
        for number, entry in self.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{name}"] = value
                else:
                    plain[f"{number}.{name}"] = value
        for number, active in enumerate(self.active):
            tensors.update({f"active.{number}.{name}": tensor for name, tensor in active.state().items()})
        self._require_own_folder()
        metadata = {"progress": vars(self.progress), "optimizer": plain, "settings": settings_facts(self.settings)}
        save_tensors(self.out / STATE, tensors, metadata)
        self.saved_at = time.monotonic()

    def _saved(self) -> State | None:
        """What `_save` wrote; None where it has not."""
        if not (self.out / STATE).exists():
            return None
        try:
            tensors, metadata = load_tensors(self.out / STATE)
        except CheckpointError as error:
            raise TrainingError(f"{error}. Remove the file to train from the start") from None
        if "settings" in metadata:  # states of older versions have none
            refuse_unlike(self.settings, metadata["settings"], self.out / STATE)
        return tensors, metadata

    def _require_own_folder(self) -> None:
        """OSError where somebody removed the run's folder: it is not made anew, and another run may have done so."""
        if self.log is not None:
            self.log.require_in_place()

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self.model.load_state_dict(_part(tensors, "model."))
        state: dict[int, dict[str, Any]] = {}
        for key, value in [*_part(tensors, "optimizer.").items(), *metadata["optimizer"].items()]:
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for number, active in enumerate(self.active):
            _restore_active(active, _part(tensors, f"active.{number}."), self.device)
        self.progress = Progress(**metadata["progress"])


def _remove_working_files(out: Path) -> None:
    """Remove what only a run that is not finished needs, also where it was killed on the way to its end."""
    (out / STATE).unlink(missing_ok=True)
    (out / BEST).unlink(missing_ok=True)


def _restore_active(active: Active, state: dict[str, Tensor], device: torch.device) -> None:
    active.restore({name: tensor.to(device) if tensor.dim() else tensor for name, tensor in state.items()})


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("TensorBoard is not installed; pip install 'robust-suite[tensorboard]'") from None
    return SummaryWriter


def _line(record: dict[str, Any]) -> str:
    words = [f"epoch {record['epoch']:>3}", f"eps {record['eps']:.4f}"]
    words += [f"{name.removeprefix('loss/')} {value:.3f}" for name, value in record.items() if name.startswith("loss/")]
    words += [f"{n.removeprefix('validation/')} {v:.1f} %" for n, v in record.items() if n.startswith("validation/")]
    return "  ".join([*words, f"{record['images_per_second']:.0f} images/s"])
