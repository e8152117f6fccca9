"""Rows of an evaluation on the disk: written block by block, continued where they stop, never mixed with others.

Several processes finish blocks out of order; the file holds them as they come, and in order when all are there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust.files import JsonLines, encode
from robust.report import Report, ReportError, Row, header_record, rows_path

LATER_FACTS = frozenset({"code", "image_hash"})
"""Facts that the reports of earlier versions lack; such reports are gone on with as far as the others agree."""


class RowsOnDisk:
    """Rows of an evaluation in the file that `out` means, whole blocks only; nothing is written where `out` is None.

    Args:
        header: facts of the evaluation. `chosen`: indices of all its examples, decided `batch_size` at a time.

    Attributes:
        header, rows: what the file holds of this evaluation and what was appended, else the given header and no rows.

    Raises:
        ReportError: the file is no report, or its header or its rows are of another evaluation.
    """

    def __init__(self, out: Path | None, header: dict[str, Any], chosen: Sequence[int], batch_size: int) -> None:
        self.header = header
        self.rows: list[Row] = []
        self._chosen, self._batch_size = list(chosen), batch_size
        self._lines = None if out is None else JsonLines(rows_path(out))
        if self._lines is None:
            return
        try:
            self._resume(self._lines)
        except BaseException:
            self._lines.close()
            raise

    def todo(self) -> list[int]:
        """Numbers of the blocks that have no rows yet, ascending."""
        there = {row.index for row in self.rows}
        starts = range(0, len(self._chosen), self._batch_size)
        return [number for number, start in enumerate(starts) if self._chosen[start] not in there]

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of a block; they are on the disk when this returns."""
        self.rows += rows
        if self._lines is not None:
            self._lines.append(dataclasses.asdict(row) for row in rows)

    def finished(self) -> Report:
        """The report of all rows, in the order of the examples, in memory and on the disk."""
        place = {index: number for number, index in enumerate(self._chosen)}
        ordered = sorted(self.rows, key=lambda row: place[row.index])
        report = Report(self.header, tuple(ordered))
        if self._lines is not None and ordered != self.rows:
            self._lines.require_in_place()
            report.save(self._lines.path)
        return report

    def __enter__(self) -> RowsOnDisk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def _resume(self, lines: JsonLines) -> None:
        earlier = Report.from_records(lines.records, lines.path) if lines.records else Report()
        if not earlier.rows:
            # Nothing was decided yet, so an evaluation that failed at once does not stand in the way of the next.
            lines.keep(0)
            lines.append([header_record(self.header)])
            return
        whole = self._whole_blocks([row.index for row in earlier.rows])
        _refuse_another_evaluation(lines.path, earlier, self.header, len(self._chosen), whole)
        assert whole is not None
        self.header, self.rows = earlier.header, list(earlier.rows[:whole])
        lines.keep(1 + whole)

    def _whole_blocks(self, indices: Sequence[int]) -> int | None:
        """How many of the file's rows are whole blocks, a last one cut off left out; None where they are no blocks."""
        place = {index: number for number, index in enumerate(self._chosen)}
        done = 0
        while done < len(indices):
            start = place.get(indices[done], -1)
            if start < 0 or start % self._batch_size:
                return None
            block = self._chosen[start : start + self._batch_size]
            there = list(indices[done : done + len(block)])
            if there != block:
                return done if there == block[: len(there)] and done + len(there) == len(indices) else None
            done += len(block)
        return done


def _refuse_another_evaluation(
    path: Path, earlier: Report, header: Mapping[str, Any], examples: int, whole: int | None
) -> None:
    there, here = _flat(earlier.header), _flat(json.loads(encode(header)))
    different = [
        "the network's code changed"
        if name == "code"
        else f"{name} is {there.get(name)!r} there and {here.get(name)!r} now"
        for name in sorted({*there, *here} - {"started"} - (LATER_FACTS - there.keys()))
        if there.get(name) != here.get(name)
    ]
    if not different and whole is None:
        different = [f"it holds {len(earlier.rows)} rows that are not blocks of the {examples} examples asked for"]
    if different:
        raise ReportError(f"{path} holds another evaluation: {'; '.join(different)}; give another --out")


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in header.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
