"""Evaluation: a model and a data set, attacked first and verified then, give a report that survives interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.attack import ATTACKS, Attack, Ensemble
from attacks.mode import attack_mode
from attacks.registry import Registry
from attacks.threat import Ball
from certify.precision import exact_arithmetic
from certify.verdict import SoundnessError, Status, Verdict, falsified, logits_of
from certify.verifier import VERIFIERS
from robust.checkpoint import Checkpoint, ball_facts
from robust.crew import Crew, Records
from robust.dataset import DataSet
from robust.files import encode
from robust.images import Images
from robust.report import NO_CLASS, STATUSES, Report, Row, read_row
from robust.resume import RowsOnDisk
from robust.tensor_file import content_hash
from robust.versions import versions

BLOCK = 100
"""Examples that are decided and written together where the verifier does not say how many suit it."""

HASHED_IMAGES = 16
"""Images whose pixels tell versions of a data set apart; all of them would have to be decoded before the first row."""


class AnyVerifier(Protocol):
    """What `evaluate` needs of a verifier: one verdict per example, in order; `index` keys its noise.

    A class fact `block` says how many examples at a time suit it: few where each takes long, so that a row is on the
    disk soon after it was decided.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]: ...


def evaluate(
    checkpoint_or_model: Checkpoint | nn.Module,
    data: DataSet,
    ball: Ball,
    verifier: AnyVerifier | None,
    attack: Attack | None = None,
    *,
    out: Path | None = None,
    split: Literal["train", "test"] = "test",
    indices: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    crew: Crew | None = None,
) -> Report:
    """Decide examples of a data set: misclassified, falsified by the attack, or what the verifier says.

    Examples are decided in fixed blocks of `batch_size`, each under its own random seed, so that a row does not depend
    on the rows before it, nor on the process that decides it. Rows are on the disk once their block is decided. Where
    `out` already holds rows of the same evaluation, it goes on behind them, and a block that was cut off is decided
    again.

    Args:
        ball: threat model with one eps, which need not be the radius of training.
        verifier: None leaves what the attack did not falsify unknown.
        attack: run first, on correctly classified examples; its points are checked like any witness.
        out: folder (rows go to rows.jsonl in it) or JSON-lines file; None keeps the report in memory.
        indices: examples of the split to decide, in this order; all of them by default.
        limit: only the first so many of these.
        batch_size: examples of a block; by default as many as suit the verifier (its class fact `block`, else 100).
        device: where the model is moved to; by default it stays where it is.
        progress: show a progress bar with the count of each verdict and the time left.
        crew: the processes that share the work; every one of them makes this call and gets the whole report, and rank
            0 alone writes to `out`.

    Raises:
        ReportError: `out` holds rows of another evaluation; the message says what differs.
        FileInUse: another process is writing to `out`.
        CrewError: the processes of a crew do not evaluate the same thing, or rank 0 is gone.
    """
    model = checkpoint_or_model.model if isinstance(checkpoint_or_model, Checkpoint) else checkpoint_or_model
    if device is not None:
        model.to(device)
    images: Images = getattr(data, split)
    chosen = _chosen(len(images), indices, limit)
    if batch_size is None:
        batch_size = getattr(verifier, "block", BLOCK)
    if batch_size < 1:
        raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
    header = {
        **model_facts(checkpoint_or_model),
        **data_facts(data, split),
        "ball": ball_facts(ball),
        "verifier": describe(VERIFIERS, verifier),
        "attack": describe(ATTACKS, attack),
        "searched": attack is not None or getattr(verifier, "falsifies", True),
        "batch_size": batch_size,
        "device": _device_name(_device(model)),
        "versions": versions(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    record = RowsOnDisk(out, header, chosen, batch_size) if crew is None or crew.rank == 0 else None

    def decided(block: int) -> list[Row]:
        start = block * batch_size
        index = torch.tensor(chosen[start : start + batch_size])
        x, y = images.batch(index, _device(model))
        with seeded(start, x.device):
            return decide(model, x, y, index.tolist(), ball, verifier, attack)

    def records(block: int) -> Records:
        return [dataclasses.asdict(row) for row in decided(block)]

    with attack_mode(model):
        if record is None:
            assert crew is not None
            shared = {name: value for name, value in header.items() if name not in ("started", "device")}
            return Report(header, tuple(map(read_row, crew.follow(_json(shared), records))))
        with record, _bar(len(chosen), len(record.rows), progress) as bar:

            def keep(rows: list[Row]) -> None:
                record.append(rows)
                _count(bar, record.rows)
                bar.update(len(rows))

            _count(bar, record.rows)
            if crew is None:
                for block in record.todo():
                    keep(decided(block))
            else:
                crew.lead(_json(header), record.todo(), records, lambda rows: keep([read_row(row) for row in rows]))
            report = record.finished()
        if crew is not None:
            crew.dismiss([dataclasses.asdict(row) for row in report.rows])
        return report


def _json(header: dict[str, Any]) -> dict[str, Any]:
    """The header as another process reads it."""
    return json.loads(encode(header))


def decide(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Sequence[int],
    ball: Ball,
    verifier: AnyVerifier | None,
    attack: Attack | None,
) -> list[Row]:
    """Rows of one batch: clean prediction, then the attack, then the verifier on what is left."""
    logits = logits_of(model, x)
    right = classified(logits, y).tolist()
    wrong = [
        Row(i, label, other, "misclassified", "clean")
        for i, label, other in zip(index, y.tolist(), _rivals(logits, y).tolist(), strict=True)
    ]
    rows = [
        Row(row.index, row.label, row.label, "unknown", "none") if ok else row
        for row, ok in zip(wrong, right, strict=True)
    ]
    if attack is not None:
        rows = _attacked(rows, model, x, y, ball, attack)
    if verifier is not None:
        rows = _verified(rows, wrong, model, x, y, ball, verifier)
    return rows


def _attacked(rows: list[Row], model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack) -> list[Row]:
    """Rows after the attack, or the attacks of an ensemble one after the other."""
    if not isinstance(attack, Ensemble):
        name = (describe(ATTACKS, attack) or "").partition(":")[0]
        return _attempted(rows, model, x, y, ball, name, attack, ("unknown",))
    tried: tuple[Status, ...] = ("unknown", "falsified") if attack.individual else ("unknown",)
    for name, stage in attack.stages(ball).items():
        rows = _attempted(rows, model, x, y, ball, name, stage, tried)
    return rows


def _attempted(
    rows: list[Row],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    name: str,
    attack: Attack,
    tried: Sequence[Status],
) -> list[Row]:
    """Rows after one attack on those with a status in `tried`: falsified where its point is a witness."""
    rows, left = list(rows), _with_status(rows, x, tried)
    if not len(left):
        return rows
    started = time.perf_counter()
    x, y, ball = x[left], y[left], ball.select(left)
    with exact_arithmetic():
        # Projected, because foreign attacks stay in the ball only up to rounding, and then their points are no witness.
        x_adv = ball.project(attack(model, x, y, ball, index=_numbers(rows, left)), x)
    logits = logits_of(model, x_adv)
    margin, suspected = _margins(logits, y).tolist(), (logits.argmax(dim=1) != y).tolist()
    seconds = (time.perf_counter() - started) / len(left)
    for k, i in enumerate(left.tolist()):
        row = dataclasses.replace(rows[i], seconds=rows[i].seconds + seconds)
        verdict = (
            _witnessed(model, x_adv[k], x[k], y[k], ball.select(torch.tensor([k])), name, seconds)
            if suspected[k]
            else None
        )
        row = dataclasses.replace(row, attempts={**row.attempts, name: verdict is not None})
        if row.status == "unknown":
            known = [m for m in (row.attack_margin, _finite(margin[k])) if m is not None]
            row = dataclasses.replace(row, attack_margin=min(known, default=None))
        if row.status == "unknown" and verdict is not None:
            found = {"status": verdict.status, "method": name, "attacked": True, "precision": verdict.precision}
            row = dataclasses.replace(row, attack_margin=_finite(margin[k]), **found, **_distances(x_adv[k], x[k]))
        rows[i] = row
    return rows


def _witnessed(
    model: nn.Module, point: Tensor, x: Tensor, y: Tensor, ball: Ball, method: str, seconds: float
) -> Verdict | None:
    """The verdict that confirms `point` as a witness, None where it is none."""
    try:
        return falsified(model, point, x, y, ball, method=method, seconds=seconds)
    except SoundnessError:  # misclassified in its batch by a rounding error, and not alone
        return None


def _verified(
    rows: list[Row], wrong: list[Row], model: nn.Module, x: Tensor, y: Tensor, ball: Ball, verifier: AnyVerifier
) -> list[Row]:
    """Rows after the verifier on the unknown ones; `wrong` are the rows of misclassified examples."""
    rows, left = list(rows), _with_status(rows, x, ("unknown",))
    verdicts = verifier(model, x[left], y[left], ball.select(left), index=_numbers(rows, left)) if len(left) else []
    for i, verdict in zip(left.tolist(), verdicts, strict=True):
        # Right in this batch, wrong in the verifier's: a margin of a rounding error. The verifier has the last word.
        row = wrong[i] if verdict.status == "misclassified" else rows[i]
        rows[i] = dataclasses.replace(
            row,
            status=verdict.status,
            method=verdict.method,
            margin_lb=_finite(verdict.margin_lb),
            attacked=verdict.status == "falsified",
            attack_margin=rows[i].attack_margin,
            seconds=rows[i].seconds + verdict.seconds,
            precision=verdict.precision,
            domains=verdict.domains,
        )
        if verdict.witness is not None:
            margin = _margins(logits_of(model, verdict.witness[None]), y[i : i + 1]).item()
            rows[i] = dataclasses.replace(rows[i], attack_margin=margin, **_distances(verdict.witness, x[i]))
    return rows


def _with_status(rows: Sequence[Row], x: Tensor, statuses: Sequence[Status]) -> Tensor:
    """Positions of the rows with one of these statuses, on the device of x."""
    return torch.tensor([i for i, row in enumerate(rows) if row.status in statuses], dtype=torch.long, device=x.device)


def _distances(witness: Tensor, x: Tensor) -> dict[str, Any]:
    delta = (witness.double() - x.double()).flatten()
    return {"linf": delta.abs().max().item(), "l2": delta.norm().item()}


def classified(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each example is classified as y: bool [B]; False where a logit is not finite."""
    return (logits.argmax(dim=1) == y) & torch.isfinite(logits).all(dim=1)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The label's logit minus the largest other one, [B]."""
    others = logits.scatter(1, y[:, None], -math.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.max(dim=1).values


def _rivals(logits: Tensor, y: Tensor) -> Tensor:
    """The class other than y with the largest logit, [B]; NO_CLASS where a logit is not finite."""
    rivals = logits.scatter(1, y[:, None], -math.inf).argmax(dim=1)
    return torch.where(torch.isfinite(logits).all(dim=1), rivals, NO_CLASS)


def _numbers(rows: Sequence[Row], left: Tensor) -> Tensor:
    """Numbers in the data set of the rows at `left`, which key the noise of attacks."""
    return torch.tensor([rows[i].index for i in left.tolist()])


def _chosen(total: int, indices: Sequence[int] | None, limit: int | None) -> list[int]:
    """Examples to decide; ValueError where one of them does not exist or comes twice."""
    chosen = [int(i) for i in (range(total) if indices is None else indices)]
    outside = [i for i in chosen if not 0 <= i < total]
    if outside or (limit is not None and limit < 0):
        raise ValueError(f"expected indices from 0 to {total - 1} and a limit from 0, got {outside[:3]} and {limit}")
    if len(set(chosen)) < len(chosen):
        raise ValueError("an index is given twice, and a report holds one row per example")
    return chosen[:limit]


def describe(registry: Registry, method: object | None) -> str | None:
    """A method as the registry spells it, or by its own representation where it is not registered; None for None."""
    if method is None:
        return None
    if any(type(method) is registry[name] for name in registry.names()):
        return registry.spell(method)
    if dataclasses.is_dataclass(method):
        return repr(method)
    return getattr(method, "__qualname__", type(method).__qualname__)


def model_facts(checkpoint_or_model: Checkpoint | nn.Module) -> dict[str, Any]:
    """Name, hash and precision of a network, and the hash of its code where it is the user's own."""
    if isinstance(checkpoint_or_model, Checkpoint):
        model, digest = checkpoint_or_model.model, checkpoint_or_model.hash()
        name = checkpoint_or_model.settings["model"]
    else:
        model, name = checkpoint_or_model, type(checkpoint_or_model).__name__
        digest = content_hash(model.state_dict(), {"architecture": repr(model)})
    precision = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    facts = {"model": name, "checkpoint": digest, "precision": " and ".join(sorted(precision))}
    code = checkpoint_or_model.code if isinstance(checkpoint_or_model, Checkpoint) else None
    return facts if code is None else {**facts, "code": code}


def data_facts(data: DataSet, split: str) -> dict[str, Any]:
    """Name and classes, a hash of all labels and the first image, and one of some images spread over the split, which
    tell versions of a data set apart."""
    images: Images = getattr(data, split)
    spread = [i * len(images) // HASHED_IMAGES for i in range(HASHED_IMAGES)] if len(images) else []
    # One by one, because images in files may differ in size.
    some = {str(i): images.batch(torch.tensor([i]))[0] for i in spread}
    first = {"image": some["0"]} if some else {}
    return {
        "data": data.name,
        "split": split,
        "data_hash": content_hash({"labels": images.labels, **first}, {}),
        "image_hash": content_hash(some, {}),
        "classes": list(data.classes),
    }


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch's global noise depends on `seed` alone, for methods that draw from it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _bar(total: int, done: int, progress: bool) -> tqdm:
    # What an earlier run decided is no measure of this one's speed.
    return tqdm(total=total, initial=done, disable=not progress, unit="example", dynamic_ncols=True)


def _count(bar: tqdm, rows: Sequence[Row]) -> None:
    seen = Counter(row.status for row in rows)
    bar.set_postfix({status: seen[status] for status in STATUSES}, refresh=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
