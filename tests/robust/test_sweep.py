"""Sweeps: what is varied, how they go on, which trials make the front, and that test images take no part."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from robust import sweep as module
from robust.cli import main
from robust.files import read_json_lines
from robust.run_setup import TrainingError
from robust.settings import SettingsError
from robust.sweep import Range, SweepError, Trial, parse_range, sweep, with_validation
from robust.sweep_front import as_csv, as_text, front, picture
from tests.robust.runs import start, stop_once, tiny

RECIPE = """
title = "Tiny"
[settings]
model = "cnn3:width=2"
objective = "ibp:clean_weight=0.5"
epochs = 1
eps = 0.01
eps_schedule = "constant"
optimizer = "adam:lr=0.005"
"""
WEIGHT = Range("objective.clean_weight", 0.1, 0.9)


def ibp(**changes):
    return tiny(objective="ibp:clean_weight=0.5", epochs=1, eps_schedule="constant", model="cnn3:width=2", **changes)


def plain(trials):
    return [dataclasses.replace(trial, seconds=0.0) for trial in trials]


def test_a_sweep_varies_what_it_is_asked_for_and_reports_validation_accuracies(tmp_path):
    pytest.importorskip("optuna")
    trials = sweep(ibp(validation=0.0), [WEIGHT, Range("batch_size", 64, 128, whole=True)], 2, tmp_path, progress=False)
    assert [trial.number for trial in trials] == [0, 1]
    weights = [float(trial.values["objective.clean_weight"]) for trial in trials]
    assert all(0.1 <= weight <= 0.9 for weight in weights) and weights[0] != weights[1]
    assert all(64 <= int(trial.values["batch_size"]) <= 128 for trial in trials)
    settings = [(tmp_path / f"trial_000{i}" / "settings.json").read_text() for i in range(2)]
    assert all(trial.values["objective.clean_weight"] in text for trial, text in zip(trials, settings, strict=True))
    assert all(0 <= trial.robust <= trial.clean <= 100 for trial in trials)


def test_test_images_take_no_part(tmp_path):
    pytest.importorskip("optuna")
    random = np.random.default_rng(0)
    x, y = random.random((120, 8, 8), dtype=np.float32), np.arange(120) % 10
    found = []
    for part, test in enumerate((x[:20], 1 - x[:20])):
        file = tmp_path / f"{part}.npz"
        np.savez(file, x_train=x, y_train=y, x_test=test, y_test=y[:20][::-1] if part else y[:20])
        trials = sweep(ibp(data=f"npz:{file}"), [WEIGHT], 1, tmp_path / str(part), progress=False)
        found.append(plain(trials))
    assert found[0] == found[1]


def test_a_sweep_that_was_cut_off_goes_on_with_the_trial_that_was_under_way(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    whole = plain(sweep(ibp(), [WEIGHT], 3, tmp_path / "whole", progress=False))
    real, calls = module.train, []

    def killed(settings, out, **options):
        calls.append(out.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(settings, out, **options)

    monkeypatch.setattr(module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(ibp(), [WEIGHT], 3, tmp_path / "cut", progress=False)
    proposed, proposals = module._proposed, []

    def counted(*arguments):
        proposals.append(arguments)
        return proposed(*arguments)

    monkeypatch.setattr(module, "_proposed", counted)
    again = plain(sweep(ibp(), [WEIGHT], 3, tmp_path / "cut", progress=False))
    assert again == whole and len(proposals) == 1  # the second trial has its values already
    assert calls == ["trial_0000", "trial_0001", "trial_0001", "trial_0002"]
    assert plain(sweep(ibp(), [WEIGHT], 3, tmp_path / "cut", progress=False)) == whole and len(calls) == 4


def test_a_trial_that_fails_is_recorded_and_the_next_one_is_run(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    real = module.train

    def failing(settings, out, **options):
        if out.name == "trial_0000":
            raise TrainingError("step 3: loss is nan")
        return real(settings, out, **options)

    monkeypatch.setattr(module, "train", failing)
    trials = sweep(ibp(), [WEIGHT], 2, tmp_path, progress=False)
    assert trials[0].failure == "step 3: loss is nan" and trials[0].clean is None and trials[1].clean is not None
    assert front(trials) == [trials[1]] and "step 3: loss is nan" in as_csv(trials, "certified")


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    pytest.importorskip("optuna")
    sweep(ibp(), [WEIGHT], 1, tmp_path, progress=False)
    with pytest.raises(SweepError, match="holds a sweep with other --over"):
        sweep(ibp(), [dataclasses.replace(WEIGHT, high=0.8)], 1, tmp_path, progress=False)
    with pytest.raises(SweepError, match="holds a sweep with other settings"):
        sweep(ibp(batch_size=100), [WEIGHT], 1, tmp_path, progress=False)


def test_trials_of_an_edited_network_are_not_mixed_with_those_before(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    file, journal = Path("my_net.py"), Path("out/trials.jsonl")
    file.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    settings = dataclasses.replace(ibp(), model="my_net.py:net")
    first = sweep(settings, [WEIGHT], 1, Path("out"), progress=False)
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(SweepError, match="holds a sweep with other code of the network; choose another --out"):
        sweep(settings, [WEIGHT], 2, Path("out"), progress=False)
    header, *rest = journal.read_text().splitlines()
    asked = json.loads(header)
    del asked["sweep"]["code"]
    journal.write_text("\n".join([json.dumps(asked), *rest]) + "\n")
    assert sweep(settings, [WEIGHT], 1, Path("out"), progress=False) == first, "a sweep of an earlier version"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("objective.clean_weight=0.1..0.9", WEIGHT),
        ("optimizer.lr=log:1e-4..1e-2", Range("optimizer.lr", 1e-4, 1e-2, log=True)),
        ("epochs=2..9", Range("epochs", 2, 9, whole=True)),
        ("eps=1/255..8/255", Range("eps", 1 / 255, 8 / 255)),
        ("objective=ibp | shi_ibp", Range("objective", choices=("ibp", "shi_ibp"))),
    ],
)
def test_ranges_are_read(text, expected):
    assert parse_range(text, ibp()) == expected


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("objective.clean_weight", SweepError, "expected PATH=LOW..HIGH, PATH=log:LOW..HIGH or PATH=A"),
        ("eps=0.2", SweepError, "expected PATH=LOW..HIGH"),
        ("eps=0.2..0.1", SweepError, "expected a lower end below the upper one"),
        ("objective.clean_weight=log:0..1", SweepError, "below the upper one, above 0"),
        ("objective.clean=0..1", SettingsError, "no field 'clean'"),
        ("objective=ibp|ipb", ValueError, "no objective named 'ipb'"),
        ("epochs=0.5..2", SettingsError, "epochs: expected int"),
    ],
)
def test_mistakes_in_ranges_are_answered_in_one_line(text, error, message):
    with pytest.raises(error, match=message):
        parse_range(text, ibp())


def test_a_recipe_that_holds_out_nothing_is_given_validation_images():
    assert with_validation(ibp(validation=0.0)).validation == 0.1
    assert with_validation(ibp(validation=0.02)).validation == 0.02


def points(*pairs):
    return [Trial(i, {"objective.ibp_weight": f"0.{i + 1}"}, *pair, 1.0) for i, pair in enumerate(pairs)]


def test_the_front_holds_what_nothing_beats():
    trials = points((90, 10), (80, 20), (80, 30), (70, 25), (60, 40), (95, 10), (60, 40))
    assert [trial.number for trial in front(trials)] == [4, 2, 5]


def test_no_trial_of_a_random_front_is_beaten_and_every_other_one_is():
    random = np.random.default_rng(0)
    trials = points(*random.integers(0, 30, (60, 2)).astype(float).tolist())
    best = front(trials)
    for trial in trials:
        beaten = [t for t in trials if t.clean >= trial.clean and t.robust >= trial.robust and t != trial]
        strictly = [t for t in beaten if (t.clean, t.robust) != (trial.clean, trial.robust)]
        assert (trial in best) <= (not strictly)
        assert strictly or any((t.clean, t.robust) == (trial.clean, trial.robust) for t in best)


def test_the_front_is_written_as_a_table_and_drawn():
    trials = points((90, 10), (80, 20), (70, 15))
    lines = as_csv(trials, "certified").splitlines()
    assert lines[0] == "trial,objective.ibp_weight,validation clean,validation certified,front,seconds,failure"
    assert [line.split(",")[4] for line in lines[1:]] == ["yes", "yes", "no"]
    assert as_text(trials, "certified").splitlines()[1].endswith("objective.ibp_weight=0.2")
    axes = picture(trials, "certified").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.2", "0.1"]
    assert picture([], "certified").axes


def test_the_command_writes_the_front_and_says_where(tmp_path, capsys):
    pytest.importorskip("optuna")
    recipe = tmp_path / "own.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    over = "objective.clean_weight=0.1..0.9"
    command = ["sweep", str(recipe), "--over", over, "--trials", "1", "--out", str(tmp_path / "s"), "--quiet"]
    assert main(command) == 0
    assert (tmp_path / "s" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "front.png" in capsys.readouterr().out
    assert len((tmp_path / "s" / "trials.csv").read_text().splitlines()) == 2
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["front"] == [0] and told["out"] == str(tmp_path / "s") and told["robust"] == "certified"
    assert told["trials"][0]["values"].keys() == {"objective.clean_weight"} and 0 <= told["trials"][0]["clean"] <= 100


def test_without_optuna_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    command = ["sweep", "digits_mtl_ibp", "--over", "epochs=1..2", "--out", str(tmp_path), "--quiet"]
    assert main(command) == 2
    assert capsys.readouterr().err == "robust: robust sweep needs Optuna; pip install 'robust-suite[sweep]'\n"
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.slow
def test_a_killed_sweep_ends_as_one_that_was_left_alone(tmp_path):
    pytest.importorskip("optuna")
    recipe = tmp_path / "own.toml"
    recipe.write_text(RECIPE.replace("epochs = 1", "epochs = 3"), encoding="utf-8")
    over = "objective.clean_weight=0.1..0.9"

    def command(name):
        return ["sweep", str(recipe), "--over", over, "--trials", "3", "--out", str(tmp_path / name), "--quiet"]

    assert stop_once(start(*command("killed")), tmp_path / "killed" / "trials.jsonl", 4)
    assert main(command("killed")) == main(command("whole")) == 0
    found = [
        [
            {**record.get("finished", record), "seconds": 0}
            for record in read_json_lines(tmp_path / name / "trials.jsonl")
        ]
        for name in ("killed", "whole")
    ]
    assert found[0] == found[1]
