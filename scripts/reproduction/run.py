"""Run the jobs of a plan: train, judge, and keep a record of each that is finished.

Jobs that are finished are not run again; one that was killed goes on where trainer and evaluation stopped. Started by
torchrun, the processes train different jobs at the same time, each on a device of its own, and then judge together.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from attacks.attack import ATTACKS
from attacks.threat import Ball
from certify.verifier import VERIFIERS
from robust.checkpoint import Checkpoint, load
from robust.crew import Crew
from robust.dataset import DataSet, parse_dataset
from robust.evaluate import evaluate
from robust.files import read_json_lines, write_whole
from robust.report import Report
from robust.run_setup import CHECKPOINT, LOG, STATE, TrainingError
from robust.settings import Settings
from robust.trainer import train
from robust.versions import versions
from scripts.reproduction.networks import load_network, stored_verdicts
from scripts.reproduction.plan import Job, Plan, load_plan

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where jobs run.

    Attributes:
        device: of this process.
        root: folder of the data sets; networks: of the published networks.
        progress: show progress bars.
    """

    device: str
    root: Path | None
    networks: Path
    progress: bool = True


def state_of(job: Job, out: Path) -> str:
    """How far a job has come: finished, trained, begun or to do."""
    folder = out / job.folder
    if (folder / RESULT).exists():
        return "finished"
    if (folder / CHECKPOINT).exists():
        return "trained"
    return "begun" if (folder / STATE).exists() or (folder / LOG).exists() else "to do"


def finished_results(plan: Plan, out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Records of the finished jobs."""
    found = {}
    for job in plan.jobs:
        path = out / job.folder / RESULT
        if not job.left_out and path.exists():
            found[job.row, job.seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


def run_jobs(plan: Plan, rows: Sequence[str], out: Path, machine: Machine, each: Callable[[], None]) -> list[str]:
    """Run what is left of these rows of a plan by this one process; failures, in words.

    `each` is called behind every job.
    """
    failures = []
    for job in left_of(plan, rows, out):
        failure = _train(job, out, machine)
        if failure:
            failures.append(failure)
        else:
            _judge(job, out, machine, None, 1)
        each()
    return failures


def lead_jobs(plan: Plan, rows: Sequence[str], out: Path, machine: Machine, each: Callable[[], None]) -> list[str]:
    """As `run_jobs`, by rank 0 of a torchrun; the other ranks call `follow_jobs`."""
    left = left_of(plan, rows, out)
    trainers = _crew("train")
    numbers = [plan.jobs.index(job) for job in left]
    trained: list[dict[str, Any]] = []
    trainers.lead({}, numbers, lambda number: _trained(plan.jobs[number], number, out, machine), trained.extend)
    failures = [record["failure"] for record in trained if record["failure"]]
    to_judge = [{"number": number} for number in numbers if (out / plan.jobs[number].folder / CHECKPOINT).exists()]
    to_judge += [{"number": number} for number in numbers if plan.jobs[number].settings is None]
    trainers.dismiss(to_judge)
    for record in to_judge:
        number = record["number"]
        _judge(plan.jobs[number], out, machine, _crew(f"judge/{number}"), trainers.size)
        each()
    return failures


def follow_jobs(out: Path, machine: Machine) -> None:
    """Ranks other than 0: train jobs that nobody has, then help to judge each."""
    trainers = _crew("train")
    jobs: list[Job] = []

    def train_number(number: int) -> list[dict[str, Any]]:
        if not jobs:  # rank 0 writes the plan before it hands out its jobs
            jobs.extend(load_plan(out).jobs)
        return _trained(jobs[number], number, out, machine)

    for record in trainers.follow({}, train_number):
        number = record["number"]
        jobs = jobs or list(load_plan(out).jobs)
        _judge(jobs[number], out, machine, _crew(f"judge/{number}"), trainers.size)


def processes() -> tuple[int, int]:
    """(rank, count) of the processes that torchrun started; (0, 1) without it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")) if count > 1 else 0), count


def _crew(task: str) -> Crew:
    crew = Crew.join(task)
    assert crew is not None
    return crew


def left_of(plan: Plan, rows: Sequence[str], out: Path) -> list[Job]:
    """Jobs of these rows that are neither finished nor left out."""
    jobs = [job for job in plan.jobs if job.row in rows and not job.left_out]
    return [job for job in jobs if state_of(job, out) != "finished"]


def _trained(job: Job, number: int, out: Path, machine: Machine) -> list[dict[str, Any]]:
    return [{"number": number, "failure": _train(job, out, machine)}]


def _train(job: Job, out: Path, machine: Machine) -> str:
    """Train the job's network, or go on; why it failed, in words, "" where it did not."""
    if job.settings is None:
        return ""
    try:
        train(
            Settings.from_dict(job.settings),
            out / job.folder,
            device=machine.device,
            root=machine.root,
            progress=machine.progress,
        )
    except TrainingError as error:
        return f"{job.row}, seed {job.seed}: {error}"
    return ""


def _judge(job: Job, out: Path, machine: Machine, crew: Crew | None, processes: int) -> None:
    """Attack and verify the job's network, and write the record of the finished job."""
    folder = out / job.folder
    model, data, ball = _problem(job, folder, machine)
    report = evaluate(
        model,
        data,
        ball,
        VERIFIERS.parse(job.verifier) if job.verifier else None,
        ATTACKS.parse(job.attack) if job.attack else None,
        out=folder / "judged",
        limit=job.limit or None,
        device=machine.device,
        progress=machine.progress,
        crew=crew,
    )
    if crew is not None and crew.rank:
        return
    stored = stored_verdicts(machine.networks, job.network, job.limit) if job.network else ""
    record = {
        "row": job.row,
        "seed": job.seed,
        "data": data.name,
        **_measured(report),
        "training_seconds": sum(record["seconds"] for record in _log(folder)),
        "judging_seconds": sum(row.seconds for row in report.rows),
        "stored": stored,
        "hardware": hardware(machine.device, processes),
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_whole(folder / RESULT, json.dumps(record, indent=1) + "\n")


def _problem(job: Job, folder: Path, machine: Machine) -> tuple[Checkpoint | torch.nn.Module, DataSet, Ball]:
    if job.settings is None:
        return load_network(machine.networks, job.network)
    settings = Settings.from_dict(job.settings)
    return load(folder / CHECKPOINT), parse_dataset(settings.data)(machine.root), settings.ball()


def _measured(report: Report) -> dict[str, Any]:
    """Accuracies in percent by the names of a table's metrics, of what the report has measured."""
    summary = report.summary()
    words = {"clean": "clean", "under_attack": "adversarial", "certified": "certified"}
    found: dict[str, float] = {}
    for rate in report.measured():
        found[words[rate]] = 100 * getattr(summary.rates, rate).fraction
        if words[rate] != "certified":
            worst = getattr(summary.classes[summary.worst_class(rate)], rate)
            found[f"{words[rate]}_worst"] = 100 * worst.fraction
    return {"measured": found, "images": summary.examples, "unknown": summary.statuses.get("unknown", 0)}


def _log(folder: Path) -> Iterator[dict[str, Any]]:
    if (folder / LOG).exists():
        yield from read_json_lines(folder / LOG)


def hardware(device: str, processes: int) -> str:
    """What the job ran on, such as "4 x NVIDIA H200" or "AMD EPYC 7B13, 1 thread"."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if processes == 1 else f"{processes} x {name}"
    threads = torch.get_num_threads()
    name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return name if processes == 1 else f"{processes} processes: {name}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def own_device(device: str) -> str:
    """Under torchrun every process of a host takes a GPU of its own where the device names none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if processes()[1] > 1 and device == "cuda" else device
