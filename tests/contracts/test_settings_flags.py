"""Run-level flags are settings and a short frozen list; a method's hyper-parameters never become flags."""

from __future__ import annotations

import dataclasses

from robust import cli
from robust.settings import Settings

RESULT = {"json", "dry-run"}
PROBLEM = {"data", "split", "eps", "norm", "model", "layout", "limit"}
EVALUATION = {*PROBLEM, "batch-size", "out", "no-curve"}
FLAGS = {
    "train": {"recipe", "out", "tensorboard", *RESULT},
    "certify": {*EVALUATION, "verifier", *RESULT},
    "attack": {*EVALUATION, "attack", *RESULT},
    "lipschitz": {*EVALUATION, "method", "margins", "states", "timeout", "json"},
    "export": {"model", "json"},
    "push": {"reports", "private", "model", "json"},
    "vnnlib": {"timeout", "out", "json"},
    "compare": {"attacks", "limit", "batch-size", "out", "model", "json"},
    "masking": {*PROBLEM, "out", "json"},
    "sweep": {"over", "trials", "out", "json"},
    "report": {"out", "json"},
    "methods": {"json"},
    "recipes": {"json"},
    "doctor": {"root", "json"},
    "completion": set(),
}
MACHINE = {"device", "root", "quiet"}


def test_no_command_has_grown_a_flag() -> None:
    (commands,) = [action.choices for action in cli.command_parser()._actions if isinstance(action.choices, dict)]
    assert set(commands) == set(FLAGS)
    for name, expected in FLAGS.items():
        flags = {flag.removeprefix("--") for action in commands[name]._actions for flag in action.option_strings}
        settings = {field.name for field in dataclasses.fields(Settings)} if name == "train" else set()
        settings |= {field.replace("_", "-") for field in settings}
        alone = ("vnnlib", "export", "push", "report", "methods", "recipes", "doctor", "completion")
        machine = set() if name in alone else MACHINE
        assert flags - {"-h", "help", "debug"} == expected | settings | machine


def test_every_command_but_the_shells_script_answers_programs() -> None:
    assert {name for name, flags in FLAGS.items() if "json" not in flags} == {"completion"}
