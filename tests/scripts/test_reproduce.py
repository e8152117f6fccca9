"""The script as a user runs it: rows are trained, judged, gone on with and not run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import robust
from robust.run_setup import CHECKPOINT, LOG
from scripts import reproduce
from scripts.reproduction import run
from scripts.reproduction.table import load_table
from tests.golden.networks import reference_folder
from tests.robust.runs import stamp
from tests.scripts.tables import written

REPOSITORY = Path(robust.__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "reproduce.py"


def call(*arguments: object) -> int:
    return reproduce.main([*map(str, arguments), "--quiet", "--device", "cpu"])


def results(out: Path) -> dict[str, dict[str, object]]:
    """Records of the finished jobs, without what the clock says."""
    found = {}
    for path in sorted(out.rglob(run.RESULT)):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[str(path.relative_to(out))] = {
            name: value
            for name, value in record.items()
            if name not in ("finished", "versions", "hardware") and not name.endswith("seconds")
        }
    return found


def test_a_table_runs_from_end_to_end_and_is_not_run_twice(tmp_path, capsys, monkeypatch):
    table, out = written(tmp_path), tmp_path / "out"
    assert call(table, "--scale", "0.1", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "3 jobs, 2 to do: about" in printed and "SCALED RUN (scale 0.1)" in printed
    found = results(out)
    assert list(found) == ["first/seed_0/result.json", "second/seed_0/result.json"]
    assert set(found["first/seed_0/result.json"]["measured"]) >= {"clean", "adversarial", "certified"}
    for name in ("table.md", "table.csv", "table.png", "plan.json", f"first/seed_0/{CHECKPOINT}"):
        assert (out / name).exists()
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(run, "evaluate", None)
    assert call(table, "--scale", "0.1", "--out", out) == 0
    assert "going on with the plan" in capsys.readouterr().out and results(out) == found


def test_what_was_cut_off_is_done_and_what_was_finished_is_not_done_again(tmp_path, monkeypatch):
    table, out = written(tmp_path), tmp_path / "out"
    order = (table, "--scale", "0.1", "--no-estimate", "--out", out)
    real = run.evaluate

    def cut_off(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "evaluate", cut_off)
    assert call(*order) == 130
    trained = stamp(out / "first" / "seed_0" / CHECKPOINT)
    assert trained is not None and not results(out)
    monkeypatch.setattr(run, "evaluate", real)
    assert call(*order, "--rows", "first") == 0
    assert stamp(out / "first" / "seed_0" / CHECKPOINT) == trained and len(results(out)) == 1
    assert "not run yet" in (out / "table.md").read_text(encoding="utf-8")
    first = stamp(out / "first" / "seed_0" / run.RESULT)
    assert call(*order) == 0
    assert stamp(out / "first" / "seed_0" / run.RESULT) == first and len(results(out)) == 2


def test_a_terminated_reproduction_says_so_once(tmp_path, capsys, monkeypatch):
    order = (written(tmp_path), "--scale", "0.1", "--no-estimate", "--rows", "first", "--out", tmp_path / "out")

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run, "evaluate", terminated)
    assert call(*order) == 130
    assert capsys.readouterr().err == "reproduce: interrupted; the same command goes on where it stopped\n"
    monkeypatch.setattr(reproduce, "_reproduce", terminated)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(*order) == 130 and capsys.readouterr().err == ""


def test_a_row_that_fails_leaves_the_others_and_is_told(tmp_path, capsys, monkeypatch):
    table, out = written(tmp_path), tmp_path / "out"
    real = run.train

    def failing(settings, folder, **options):
        if folder.parent.name == "first":
            raise run.TrainingError("step 3: loss is nan")
        return real(settings, folder, **options)

    monkeypatch.setattr(run, "train", failing)
    assert call(table, "--scale", "0.1", "--no-estimate", "--out", out) == 1
    assert "failed: first, seed 0: step 3: loss is nan" in capsys.readouterr().err
    assert list(results(out)) == ["second/seed_0/result.json"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert call(written(tmp_path), "--dry-run", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "train cnn3:width=2 by ibp:clean_weight=0.5; judge by pgd:steps=2 and ibp" in printed
    assert "training about" in printed and not (tmp_path / "out").exists()


def test_missing_data_at_full_scale_is_one_line_that_names_the_path_before_anything_runs(tmp_path, capsys):
    out = tmp_path / "out"
    assert call("tinyimagenet_certified", "--no-estimate", "--root", tmp_path, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "tiny-imagenet-200" / "train") in error
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mnist_smal",), "no table 'mnist_smal' (did you mean mnist_small"),
        (("mnist_small", "--rows", "x"), "no row 'x'; rows: mnist_01_gowal_medium_ibp"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message, capsys):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--scale", "2", "expected a share above 0 and up to 1, got '2'"),
        ("--scale", "0", "expected a share above 0 and up to 1"),
        ("--budget", "30", "expected a time such as 30min, 8h or 2d, got '30'"),
    ],
)
def test_impossible_flags_are_refused(flag, value, message, capsys):
    with pytest.raises(SystemExit):
        call("mnist_small", flag, value)
    assert message in capsys.readouterr().err


def test_tables_are_listed(capsys):
    assert call() == 0
    printed = capsys.readouterr().out
    assert "mnist_small" in printed and "7 rows" in printed


@pytest.mark.skipif(not (reference_folder() / "golden").is_dir(), reason="the reference networks are not here")
def test_published_networks_are_verified_and_absent_ones_left_out(tmp_path, capsys):
    rows = ("CNN-A-Adv, beta-CROWN", "ResNet-4B, CROWN")
    assert call("verification", "--scale", "0.01", "--out", tmp_path, "--rows", *rows) == 0
    (record,) = results(tmp_path).values()
    assert record["images"] == 3 and record["measured"]["clean"] == 100
    assert record["stored"].startswith("alpha-beta-CROWN on the same 3 images")
    assert "resnet4b/network.json" in capsys.readouterr().out


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments), "--quiet", "--device", "cpu", "--no-estimate"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_killed_reproduction_ends_as_one_that_was_left_alone(tmp_path):
    table = written(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert call(table, "--no-estimate", "--out", whole) == 0
    process = subprocess.Popen(command(table, "--out", killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "second" / "seed_0" / LOG).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(results(killed)) == 1
    assert call(table, "--no-estimate", "--out", killed) == 0
    assert results(killed) == results(whole)


@pytest.mark.slow
def test_two_processes_of_torchrun_come_to_the_same_table_as_one(tmp_path):
    table = written(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(table, "--no-estimate", "--out", one) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *command(table, "--out", two)[1:]], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert results(two) == results(one)
    assert (two / "table.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svhn_adversarial", "l2_cifar100"])
def test_a_table_of_the_literature_runs_scaled_without_its_data(name, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(name, "--scale", "0.01", "--no-estimate", "--root", tmp_path, "--out", out) == 0
    runnable = [row for row in load_table(name).rows if not row.absent]
    assert len(results(out)) == len(runnable)
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "SCALED RUN (scale 0.01)" in text and "STAND-IN DATA" in text
