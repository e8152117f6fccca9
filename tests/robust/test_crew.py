"""Several processes, one report: whoever is lost, the rows are those of one process."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

import robust.crew as crew_module
from robust.crew import Crew, CrewError, Records
from robust.report import Report
from robust.settings import Settings
from robust.trainer import train
from tests.robust.runs import REPOSITORY, free_port

HEADER = {"verifier": "exact"}


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Crew]]:
    """Makes crews of one store, each with a connection of its own, as processes have."""
    monkeypatch.setattr(crew_module, "LOST_AFTER", 0.5)
    monkeypatch.setattr(crew_module, "BEAT", 0.05)
    monkeypatch.setattr(crew_module, "POLL", 0.01)
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    crews: list[Crew] = []

    def make(rank: int, size: int) -> Crew:
        crews.append(Crew(TCPStore("127.0.0.1", server.port, None, False), rank, size))
        return crews[-1]

    yield make
    for crew in crews:
        crew._end()


def rows_of(number: int) -> Records:
    return [{"index": 10 * number + k} for k in range(2)]


def led(
    leader: Crew, todo: Sequence[int], decide: Callable[[int], Records], header: dict[str, Any] = HEADER
) -> dict[int, Records]:
    """What a leader was given, by number of the block; rows are those of `rows_of`."""
    got: dict[int, Records] = {}
    leader.lead(header, todo, decide, lambda rows: got.update({rows[0]["index"] // 10: rows}))
    return got


def in_thread(target: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A started thread, and the list that its result, or its exception, will be put in."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(target())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_every_block_is_decided_once_and_every_rank_gets_the_report(join: Callable[[int, int], Crew]) -> None:
    decided: list[tuple[int, int]] = []

    def decide(rank: int) -> Callable[[int], Records]:
        def one(number: int) -> Records:
            decided.append((rank, number))
            time.sleep(random.random() * 0.02)
            return rows_of(number)

        return one

    followers = [in_thread(lambda r=r: join(r, 3).follow(HEADER, decide(r))) for r in (1, 2)]
    leader = join(0, 3)
    todo = [n for n in range(40) if n != 7]
    assert led(leader, todo, decide(0), {**HEADER, "device": "cpu"}) == {n: rows_of(n) for n in todo}
    assert sorted(number for _, number in decided) == todo
    assert {rank for rank, _ in decided} == {0, 1, 2}
    leader.dismiss([{"index": 1}])
    for thread, results in followers:
        thread.join(10)
        assert results == [[{"index": 1}]]


def test_blocks_of_a_lost_rank_are_taken_up_again(join: Callable[[int, int], Crew]) -> None:
    leader = join(0, 3)
    # Rank 1 took block 0 and was killed; rank 2 drew a ticket and was killed before it took the block.
    leader._store.add("tickets", 2)
    leader._store.set("owner/0", "1-gone")
    leader._store.add("pulse/1-gone", 5)
    begin = time.monotonic()
    assert led(leader, range(6), rows_of) == {n: rows_of(n) for n in range(6)}
    assert time.monotonic() - begin > 0.5, "a rank is not given up at the first look"
    leader.dismiss([])


def test_a_store_that_outlived_its_processes_does_not_stop_the_next_ones(join: Callable[[int, int], Crew]) -> None:
    before = join(0, 2)

    def killed(number: int) -> Records:
        if number == 3:
            raise OSError("killed")
        return rows_of(number)

    with pytest.raises(OSError, match="killed"):
        led(before, range(8), killed)
    before._end()
    # Its fourth block has an owner of rank 0 and no rows.
    assert led(join(0, 2), range(8), rows_of) == {n: rows_of(n) for n in range(8)}


def test_a_slow_rank_with_a_pulse_keeps_its_block(join: Callable[[int, int], Crew]) -> None:
    def slowly(number: int) -> Records:
        time.sleep(1.5)
        return [{"index": -1}]

    thread, results = in_thread(lambda: join(1, 2).follow(HEADER, slowly))
    leader = join(0, 2)

    def late(number: int) -> Records:
        while leader._store.add("tickets", 0) < 2:
            time.sleep(0.01)
        return rows_of(number)

    got: Records = []
    leader.lead(HEADER, range(2), late, got.extend)
    assert min(row["index"] for row in got) == -1
    leader.dismiss([])
    thread.join(10)
    assert results == [[]]


def test_ranks_that_evaluate_something_else_are_refused(join: Callable[[int, int], Crew]) -> None:
    thread, results = in_thread(lambda: join(1, 2).follow({"verifier": "other"}, rows_of))
    assert len(led(join(0, 2), range(3), rows_of)) == 3
    thread.join(10)
    assert isinstance(results[0], CrewError) and "rank 1 evaluates something else than rank 0: verifier" in str(
        results[0]
    )


def test_an_error_of_a_decision_reaches_the_caller(join: Callable[[int, int], Crew]) -> None:
    def fails(number: int) -> Records:
        raise ValueError("no bound rule")

    with pytest.raises(ValueError, match="no bound rule"):
        led(join(0, 2), range(3), fails)


def test_rows_that_cannot_be_kept_end_the_work(join: Callable[[int, int], Crew]) -> None:
    decided: list[int] = []

    def decide(number: int) -> Records:
        decided.append(number)
        time.sleep(0.05)
        return rows_of(number)

    def full(rows: Records) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        join(0, 2).lead(HEADER, range(100), decide, full)
    assert len(decided) < 50


def test_rows_decided_before_an_interruption_are_kept(
    join: Callable[[int, int], Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = join(0, 2)
    monkeypatch.setattr(crew_module, "POLL", 0.3)

    def decide(number: int) -> Records:
        if number == 3:
            raise KeyboardInterrupt
        return rows_of(number)

    kept: Records = []
    with pytest.raises(KeyboardInterrupt):
        leader.lead(HEADER, range(8), decide, kept.extend)
    assert kept == rows_of(0) + rows_of(1) + rows_of(2)


def test_one_process_is_no_crew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Crew.join() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Crew.join() is None


IMAGES = 100
CERTIFY = (
    f"--verifier alpha_crown:iterations=40 --limit {IMAGES} --batch-size 4 --quiet --no-curve --device cpu".split()
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Report]:
    """Arguments of a certification of a few seconds, and its report by one process."""
    folder = tmp_path_factory.mktemp("run")
    train(Settings(model="cnn3:width=4", objective="natural", epochs=2, batch_size=256), folder, progress=False)
    arguments = ["certify", str(folder / "checkpoint.safetensors"), "--eps", "0.02", *CERTIFY]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "robust", *arguments, "--out", str(folder / "alone")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    report = Report.load(folder / "alone")
    assert {row.status for row in report.rows} >= {"certified", "unknown"}
    return arguments, report


def verdicts(report: Report) -> list[tuple[Any, ...]]:
    return [dataclasses.astuple(dataclasses.replace(row, seconds=0.0, margin_lb=None)) for row in report.rows]


def wait_for_rows(out: Path, count: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "rows.jsonl").exists() and (out / "rows.jsonl").read_bytes().count(b"\n") > count:
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_of_four_is_killed_and_the_report_is_that_of_one_process(
    problem: tuple[list[str], Report], tmp_path: Path
) -> None:
    arguments, alone = problem
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "4"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "robust", *arguments, "--out", str(tmp_path)]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(4)]
    wait_for_rows(tmp_path, 12, workers[0])
    assert all(worker.poll() is None for worker in workers)
    workers[2].send_signal(signal.SIGKILL)
    assert [worker.wait(240) for worker in workers] == [0, 0, -signal.SIGKILL, 0]
    assert verdicts(Report.load(tmp_path)) == verdicts(alone)
    # In the order of the examples, though they were not decided in it.
    assert [row.index for row in Report.load(tmp_path).rows] == list(range(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "3"])
def test_torchrun_restarts_its_workers_and_they_go_on(
    victim: str, problem: tuple[list[str], Report], tmp_path: Path
) -> None:
    arguments, alone = problem
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "3", "-m"]
    command = [sys.executable, "-m", *launcher, "robust", *arguments, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    wait_for_rows(tmp_path, 12, process)
    os.kill(child(process.pid, victim), signal.SIGKILL)
    before = Report.load(tmp_path).rows
    assert process.wait(240) == 0
    report = Report.load(tmp_path)
    assert verdicts(report) == verdicts(alone)
    # What was on the disk was not decided again: it took the same time to the last digit.
    kept = {row.index: row.seconds for row in report.rows}
    assert len(before) >= 12 and all(kept[row.index] == row.seconds for row in before)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_are_terminated_say_so_and_go_on_later(
    processes: int, problem: tuple[list[str], Report], tmp_path: Path
) -> None:
    arguments, alone = problem
    command = [sys.executable, "-m", "robust", *arguments, "--out", str(tmp_path)]
    counted = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}

    def started() -> list[subprocess.Popen[str]]:
        environment = {**os.environ, **counted, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]

    workers = started()
    wait_for_rows(tmp_path, 12, workers[0])
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    said = [worker.communicate(timeout=60)[1] for worker in workers]
    # An abort (-6) where a thread was still at work when the interpreter ended.
    assert [worker.returncode for worker in workers] == [130] * processes, said
    lines = [line for text in said for line in text.splitlines() if line.startswith("robust: ")]
    assert lines == ["robust: interrupted; the same command goes on where it stopped"]
    assert "Traceback" not in "".join(said)
    before = Report.load(tmp_path).rows
    assert 12 <= len(before) < IMAGES
    workers = started()
    assert [(worker.communicate(timeout=240), worker.returncode)[1] for worker in workers] == [0] * processes
    assert verdicts(Report.load(tmp_path)) == verdicts(alone)


def child(parent: int, rank: str) -> int:
    """Process of a rank below torchrun."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            if above == parent and f"RANK={rank}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
