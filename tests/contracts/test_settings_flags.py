"""Run-level flags are settings and a short frozen list; a method's hyper-parameters never become flags."""

from __future__ import annotations

import dataclasses

from robust import cli
from robust.settings import Settings

FLAGS = {
    "train": {"recipe", "out", "tensorboard"},
    "certify": {
        *("data", "split", "eps", "norm", "model", "layout", "limit", "batch-size", "out", "no-curve"),
        "verifier",
    },
    "attack": {"data", "split", "eps", "norm", "model", "layout", "limit", "batch-size", "out", "no-curve", "attack"},
    "lipschitz": {
        *("data", "split", "eps", "norm", "model", "layout", "limit", "batch-size", "out", "no-curve"),
        *("method", "margins", "states", "timeout"),
    },
    "export": set(),
    "vnnlib": {"timeout", "out"},
    "compare": {"attacks", "limit", "batch-size", "out"},
    "masking": {"data", "split", "eps", "norm", "model", "layout", "limit", "out"},
    "sweep": {"over", "trials", "out"},
    "report": {"out"},
    "methods": set(),
    "recipes": set(),
}
MACHINE = {"device", "root", "quiet"}


def test_no_command_has_grown_a_flag() -> None:
    (commands,) = [action.choices for action in cli._parser()._actions if isinstance(action.choices, dict)]
    assert set(commands) == set(FLAGS)
    for name, expected in FLAGS.items():
        flags = {flag.removeprefix("--") for action in commands[name]._actions for flag in action.option_strings}
        settings = {field.name for field in dataclasses.fields(Settings)} if name == "train" else set()
        settings |= {field.replace("_", "-") for field in settings}
        machine = MACHINE if name not in ("vnnlib", "export", "report", "methods", "recipes") else set()
        assert flags - {"-h", "help", "debug"} == expected | settings | machine
