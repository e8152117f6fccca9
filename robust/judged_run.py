"""A run as a comparison reads it: its report, and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust.files import read_json_lines
from robust.lipschitz import LIPSCHITZ_FOLDER, Constants
from robust.nearest_examples import NearestExamples
from robust.report import ROWS_FILE, Report, ReportError
from robust.report_sources import Sources
from robust.run_setup import LOG, SETTINGS

REPORT_FOLDERS = ("certify", "attack")
"""Where `robust certify` and `robust attack` put a report of a run's checkpoint, the one that says more first."""


@dataclass(frozen=True)
class JudgedRun:
    """A run's name and what is known about it.

    Attributes:
        settings: of the training; empty where they are not beside the report.
        log: records of the training's epochs.
        sources, near, constants: None where the report's folder has none.
    """

    name: str
    report: Report
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    sources: Sources | None
    near: NearestExamples | None
    constants: Constants | None

    @property
    def training_seconds(self) -> float | None:
        """Time of all epochs' steps, None where the log is not there."""
        seconds = [record["seconds"] for record in self.log if isinstance(record.get("seconds"), int | float)]
        return sum(seconds) if seconds else None


def report_folder(path: Path) -> Path:
    """The folder of the report that `path` means: itself, or certify/ or attack/ in the folder of a run.

    Raises:
        ReportError: it holds none.
    """
    path = Path(path)
    if path.is_file():
        return path.parent
    found = [folder for folder in (path, *(path / name for name in REPORT_FOLDERS)) if (folder / ROWS_FILE).is_file()]
    if found:
        return found[0]
    if not path.is_dir():
        raise ReportError(f"{path / ROWS_FILE}: no such report; `robust certify` and `robust attack` write one")
    raise ReportError(
        f"{path}: no report in it ({ROWS_FILE}, {' or '.join(f'{name}/{ROWS_FILE}' for name in REPORT_FOLDERS)}); "
        "`robust certify` and `robust attack` write one"
    )


def judged_runs(paths: Sequence[Path]) -> list[JudgedRun]:
    """The runs of these folders or reports, each under a name of its own.

    Raises:
        ReportError: there is no report, it is damaged, or the same one is given twice.
    """
    folders = [report_folder(path).resolve() for path in paths]
    return [_read(name, folder) for name, folder in zip(names_of(folders), folders, strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last part of each path that is no report folder's; as many more parts as tell all of them apart."""
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ReportError(f"{twice} is given twice; a comparison needs different reports")
    parts = [folder.parts[:-1] if folder.name in REPORT_FOLDERS else folder.parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]  # certify/ and attack/ of one run


def _read(name: str, folder: Path) -> JudgedRun:
    sources = Sources.load(folder)
    log = Path(sources.log) if sources is not None and sources.log is not None else folder.parent / LOG
    report = Report.load(folder)
    return JudgedRun(
        name,
        report,
        _settings(log.parent / SETTINGS),
        read_json_lines(log) if log.is_file() else (),
        sources,
        NearestExamples.load(folder),
        Constants.load(folder.parent / LIPSCHITZ_FOLDER, report.header),
    )


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ReportError(f"{path}: damaged ({error}); remove it") from None
    return found
