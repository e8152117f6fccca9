"""What a report was drawn from besides its rows, kept beside it, so that `robust report` can draw all of it again."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robust.dataset import parse_dataset
from robust.eps_curve import EpsCurve
from robust.files import encode, write_whole
from robust.images import Images
from robust.report import ReportError

SOURCES_FILE = "sources.json"


@dataclass(frozen=True)
class Sources:
    """Where a report's pictures come from.

    Attributes:
        data: text of the data set. split: which of its parts. root: folder of the data sets.
        log: of the training run, relative to the report's folder where it is stored; None for none.
        curve: accuracies over radii; None where they were not measured.
    """

    data: str
    split: Literal["train", "test"]
    root: str | None = None
    log: str | None = None
    curve: EpsCurve | None = None

    def save(self, folder: Path) -> None:
        """Write them to `folder`."""
        facts = dataclasses.asdict(self)
        if self.log is not None:
            facts["log"] = os.path.relpath(self.log, folder)
        write_whole(folder / SOURCES_FILE, encode(facts) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Sources | None:
        """Those in `folder`, None where there are none; ReportError where the file is damaged."""
        path = folder / SOURCES_FILE
        if not path.exists():
            return None
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["curve"] is not None:
                facts["curve"] = _curve(facts["curve"])
            if facts["log"] is not None:
                facts["log"] = str(folder / facts["log"])
            return cls(**facts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ReportError(f"{path}: damaged ({type(error).__name__}: {error}); remove it") from None

    def images(self) -> Images:
        """The split that the report's indices count; MissingData where the data set is gone."""
        data = parse_dataset(self.data)(None if self.root is None else Path(self.root))
        return data.test if self.split == "test" else data.train


def _curve(facts: dict[str, Any]) -> EpsCurve:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
    return EpsCurve(**values)
