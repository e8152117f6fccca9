"""Tables, plans and results small enough for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust.settings import Settings
from scripts.reproduction.plan import Job, Order, Plan
from scripts.reproduction.table import Table, parse_table

RECIPE = """
title = "Tiny"
[settings]
model = "cnn3:width=2"
objective = "ibp:clean_weight=0.5"
epochs = 3
eps = 0.01
eps_schedule = "constant"
optimizer = "adam:lr=0.005"
[published]
clean = 60.0
certified = 40.0
source = "a paper"
"""

TABLE = """
title = "A table"
verifier = "ibp"
attack = "pgd:steps=2"
[[row]]
name = "first"
recipe = "{folder}/tiny.toml"
[[row]]
name = "second"
recipe = "{folder}/tiny.toml"
verifier = "crown_ibp"
[[row]]
name = "quoted"
absent = "nobody knows how"
[row.published]
clean = 99.0
source = "another paper"
"""


def written(folder: Path, text: str = TABLE) -> Path:
    """A table of tiny rows on digits, as a file."""
    (folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    path = folder / "own.toml"
    path.write_text(text.format(folder=folder), encoding="utf-8")
    return path


def table(text: str = TABLE, folder: Path | None = None) -> Table:
    """The same as a value; without a folder the recipe is one that comes with the suite."""
    if folder is None:
        return parse_table("own", text.replace("{folder}/tiny.toml", "digits_shi_ibp"))
    return parse_table("own", written(folder, text).read_text(encoding="utf-8"))


def job(row: str = "first", seed: int = 0, **changes: Any) -> Job:
    """A job of a hundred epochs, estimated."""
    settings = Settings(data="mnist", epochs=100).to_dict()
    chosen = {"settings": settings, "network": "", "verifier": "cascade:timeout=60", "attack": ""}
    return Job(**{"row": row, "seed": seed, **chosen, **changes})


def plan(jobs: Sequence[Job], **order: Any) -> Plan:
    return Plan(Order("own", **order), tuple(jobs))


def result(row: str = "first", seed: int = 0, unknown: int = 0, **measured: float) -> dict[str, Any]:
    """The record of a finished job."""
    return {
        "row": row,
        "seed": seed,
        "data": "digits",
        "measured": measured,
        "images": 100,
        "unknown": unknown,
        "training_seconds": 3000.0,
        "judging_seconds": 600.0,
        "stored": "",
        "hardware": "a machine",
        "versions": {},
        "finished": "today",
    }
