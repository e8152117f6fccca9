"""What a reproduction will do: one job for each row and seed, with what it differs in from the publication."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certify.verifier import VERIFIERS
from robust.dataset import parse_dataset
from robust.files import write_whole
from robust.run_setup import TrainingError, check_texts
from robust.settings import Settings, load_recipe
from scripts.reproduction.estimate import judging_seconds, training_seconds
from scripts.reproduction.networks import missing_network, network_images
from scripts.reproduction.reduce import cheaper_judge, image_counts, scaled, with_epochs
from scripts.reproduction.table import Row, Table

PLAN = "plan.json"

JUDGING_SHARE = 0.25
"""Of a budget, for judging; training has the rest."""

LEAST_SCHEDULE = 0.1
"""Share of its epochs below which a row is rather left out than trained on a budget."""

SCALED_NETWORK_IMAGES = 3


class PlanError(ValueError):
    """A plan that cannot be made or gone on with; one line."""


@dataclass(frozen=True)
class Job:
    """One row with one seed.

    Attributes:
        settings: of the training run; None for a network that is only verified.
        limit: judge only the first so many test images, 0 for all.
        seconds: estimate of training, and of judging at most; None where nothing was measured.
        remarks: how the job differs from what was published, for every output.
        left_out: why it is not run; "" where it is.
    """

    row: str
    seed: int
    settings: dict[str, Any] | None
    network: str
    verifier: str
    attack: str
    limit: int = 0
    training_seconds: float | None = None
    judging_seconds: float | None = None
    remarks: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def folder(self) -> Path:
        """Of the job below the reproduction's."""
        return Path(re.sub(r"[^\w.+-]+", "_", self.row)) / f"seed_{self.seed}"

    @property
    def seconds(self) -> float:
        """Estimate of the whole job."""
        return (self.training_seconds or 0.0) + (self.judging_seconds or 0.0)


@dataclass(frozen=True)
class Order:
    """What was asked for: a table at a scale, within a budget of seconds (0 for none), with these seeds.

    `rows` are those that share the budget; all of them without one.
    """

    table: str
    scale: float = 1.0
    budget: float = 0.0
    seeds: tuple[int, ...] = (0,)
    rows: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """JSON form."""
        return {**dataclasses.asdict(self), "seeds": list(self.seeds), "rows": list(self.rows)}


@dataclass(frozen=True)
class Plan:
    """The jobs of an order."""

    order: Order
    jobs: tuple[Job, ...]

    def save(self, out: Path) -> None:
        """Write the plan, which later calls go on with."""
        facts = {"order": self.order.facts(), "jobs": [dataclasses.asdict(job) for job in self.jobs]}
        write_whole(out / PLAN, json.dumps(facts, indent=1) + "\n")


def load_plan(out: Path, order: Order | None = None) -> Plan:
    """The plan in a folder.

    Raises:
        PlanError: it is the plan of another order; the message says what differs.
    """
    content = json.loads((out / PLAN).read_text(encoding="utf-8"))
    there = content["order"]
    if order is not None and there != order.facts():
        differing = [f"{name} {there.get(name)!r}" for name, value in order.facts().items() if there.get(name) != value]
        raise PlanError(f"{out} holds a reproduction with {', '.join(differing)}; choose another --out")
    jobs = tuple(Job(**{**job, "remarks": tuple(job["remarks"])}) for job in content["jobs"])
    return Plan(Order(**{**there, "seeds": tuple(there["seeds"]), "rows": tuple(there["rows"])}), jobs)


def make_plan(
    table: Table,
    order: Order,
    rows: Sequence[str],
    *,
    device: str,
    root: Path | None,
    networks: Path,
    workers: int = 1,
    estimate: bool = True,
) -> Plan:
    """Jobs of the table's rows, reduced to the order's scale, estimated, and fitted into its budget.

    Args:
        rows: names of those that are asked for; only these are estimated, and only these share a budget.
        networks: folder of the published networks.
        workers: processes that share the jobs.
        estimate: whether steps are measured; needed for a budget.

    Raises:
        MissingData: at full scale, a data set that is not at hand; PlanError: a budget that no row fits into.
    """
    jobs = [_job(row, seed, order.scale, root, networks) for row in table.rows for seed in order.seeds]
    if order.budget:
        jobs = [job if job.row in rows else dataclasses.replace(job, left_out="not asked for") for job in jobs]
    if estimate or order.budget:
        jobs = [_estimated(job, device) if job.row in rows else job for job in jobs]
    if order.budget:
        jobs = fitted(jobs, order.budget * workers)
    return Plan(order, tuple(jobs))


def require_data(jobs: Sequence[Job], root: Path | None) -> None:
    """Read every data set of the jobs once, so that a missing one is an error before anything has run."""
    for text in dict.fromkeys(job.settings["data"] for job in jobs if job.settings is not None):
        parse_dataset(text)(root)


def _job(row: Row, seed: int, scale: float, root: Path | None, networks: Path) -> Job:
    judges = (row.verifier, row.attack) if scale == 1 else cheaper_judge(row.verifier, row.attack, scale)
    words = [
        f"judged by {judge}" for judge, own in zip(judges, (row.verifier, row.attack), strict=True) if judge != own
    ]
    base = Job(row.name, seed, None, row.network, *judges, remarks=tuple(words))
    if row.absent:
        return dataclasses.replace(base, remarks=(), left_out=row.absent)
    if row.network:
        return _network_job(base, scale, networks)
    settings = dataclasses.replace(load_recipe(row.recipe).settings, seed=seed)
    if scale < 1:
        settings, words = scaled(settings, scale, root)
        base = dataclasses.replace(base, remarks=(*words, *base.remarks))
    check_texts(settings)
    return dataclasses.replace(base, settings=settings.to_dict())


def _network_job(base: Job, scale: float, networks: Path) -> Job:
    missing = missing_network(networks, base.network)
    if missing:
        return dataclasses.replace(base, left_out=missing)
    images = network_images(networks, base.network)
    limit = images if scale == 1 else min(SCALED_NETWORK_IMAGES, images)
    remarks = base.remarks if scale == 1 else (f"scale {scale:g}: the first {limit} images", *base.remarks)
    most = getattr(VERIFIERS.parse(base.verifier), "timeout", None)
    seconds = None if most is None else most * limit
    return dataclasses.replace(base, limit=limit, judging_seconds=seconds, remarks=remarks)


def _estimated(job: Job, device: str) -> Job:
    if job.left_out or job.settings is None:
        return job
    settings = Settings.from_dict(job.settings)
    images, test = image_counts(settings)
    try:
        training = training_seconds(settings, images, device)
    except TrainingError as error:
        raise PlanError(f"{job.row}: its steps cannot be timed ({error}); plan with --no-estimate") from None
    return dataclasses.replace(
        job,
        training_seconds=training,
        judging_seconds=judging_seconds(settings, job.verifier, job.attack, job.limit or test, device),
    )


def fitted(jobs: Sequence[Job], budget: float) -> list[Job]:
    """The jobs that fit into `budget` seconds, with as much of their schedules as they can all have.

    The cheapest ones are kept, as many as can be trained for LEAST_SCHEDULE of their epochs; judging has
    JUDGING_SHARE of the budget, and takes shorter times per image, then fewer images, to keep to it.

    Raises:
        PlanError: not even the cheapest job fits.
    """
    trained = sorted(
        (job for job in jobs if job.settings is not None and not job.left_out),
        key=lambda job: job.training_seconds or 0.0,
    )
    if not trained:
        return list(jobs)
    costs = [job.training_seconds or 0.0 for job in trained]
    for count in range(len(trained), 0, -1):
        share = min(1.0, (1 - JUDGING_SHARE) * budget / max(sum(costs[:count]), 1e-9))
        if share >= LEAST_SCHEDULE:
            kept = {(job.row, job.seed) for job in trained[:count]}
            return [_within(job, share, JUDGING_SHARE * budget / count, kept) for job in jobs]
    raise PlanError(
        f"no row fits into the budget: {trained[0].row}, the cheapest, takes {costs[0] * LEAST_SCHEDULE / 3600:.2g} h "
        f"for a tenth of its epochs; give more time or --scale"
    )


def _within(job: Job, share: float, judging: float, kept: set[tuple[str, int]]) -> Job:
    """The job with `share` of its epochs and `judging` seconds to be judged; left out where it is not one of `kept`."""
    if job.settings is None or job.left_out:
        return job
    if (job.row, job.seed) not in kept:
        return dataclasses.replace(job, left_out="does not fit into the budget")
    full = Settings.from_dict(job.settings)
    settings = with_epochs(full, max(1, int(share * full.epochs)))
    remarks = list(job.remarks)
    if settings.epochs < full.epochs:
        remarks.append(f"{settings.epochs} of {full.epochs} epochs (budget)")
    test = job.limit or image_counts(full)[1]
    verifier, limit, seconds = job.verifier, job.limit, job.judging_seconds or 0.0
    if seconds > judging:
        verifier, limit, seconds = _shorter_judge(job, test, judging)
        if verifier != job.verifier:
            remarks.append(f"judged by {verifier} (budget)")
        if limit:
            remarks.append(f"judged on {limit} of {test} test images (budget)")
    return dataclasses.replace(
        job,
        settings=settings.to_dict(),
        verifier=verifier,
        limit=limit,
        training_seconds=(job.training_seconds or 0.0) * settings.epochs / full.epochs,
        judging_seconds=seconds,
        remarks=tuple(remarks),
    )


def _shorter_judge(job: Job, test: int, judging: float) -> tuple[str, int, float]:
    """(verifier, limit, seconds at most) that keep to `judging` seconds."""
    per_image = (job.judging_seconds or 0.0) / test
    verifier = job.verifier
    method = VERIFIERS.parse(verifier) if verifier else None
    if method is not None and hasattr(method, "timeout"):
        fixed = per_image - method.timeout
        timeout = min(method.timeout, max(1.0, judging / test - fixed))
        verifier = VERIFIERS.spell(dataclasses.replace(method, timeout=round(timeout, 2)))
        per_image = fixed + timeout
    limit = max(1, int(judging / per_image))
    return (verifier, job.limit, per_image * test) if limit >= test else (verifier, limit, per_image * limit)


def plan_text(plan: Plan, rows: Sequence[str], states: Mapping[tuple[str, int], str]) -> str:
    """The plan of these rows as people read it: a line for each job, and what is left to do in all."""
    lines = []
    jobs = [job for job in plan.jobs if job.row in rows]
    width = max(len(job.row) for job in jobs)
    for job in jobs:
        state = "left out" if job.left_out else states[job.row, job.seed]
        lines.append(f"{state:<9} {job.row:<{width}}  seed {job.seed}  {_times_text(job)}".rstrip())
        does = f"train {job.settings['model']} by {job.settings['objective']}" if job.settings else ""
        does = does or (f"network {job.network}" if job.network else "")
        judged = " and ".join(text for text in (job.attack, job.verifier) if text)
        if job.left_out:
            lines.append(f"          {job.left_out}")
        else:
            lines.append(f"          {does}; judge by {judged}")
        lines += [f"          {remark}" for remark in job.remarks]
    left = [job for job in jobs if not job.left_out and states[job.row, job.seed] != "finished"]
    training = sum(job.training_seconds or 0.0 for job in left)
    judging = sum(job.judging_seconds or 0.0 for job in left)
    times = f": about {duration(training)} of training and at most {duration(judging)} of judging on one device"
    lines.append(f"{len(jobs)} jobs, {len(left)} to do{times if training + judging else ', not estimated'}")
    return "\n".join(lines)


def _times_text(job: Job) -> str:
    parts = [] if job.training_seconds is None else [f"training about {duration(job.training_seconds)}"]
    parts += [] if job.judging_seconds is None else [f"judging at most {duration(job.judging_seconds)}"]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
