"""Rows of an evaluation on the disk: written block by block, continued where they stop, never mixed with others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust.files import JsonLines, encode
from robust.report import Report, ReportError, Row, header_record, rows_path


class RowsOnDisk:
    """Rows of an evaluation in the file that `out` means, whole blocks only; nothing is written where `out` is None.

    Args:
        header: facts of the evaluation. `chosen`: indices of all its examples, decided `batch_size` at a time.

    Attributes:
        header, rows: what the file holds of this evaluation, else the given header and no rows.

    Raises:
        ReportError: the file is no report, or its header or its rows are of another evaluation.
    """

    def __init__(self, out: Path | None, header: dict[str, Any], chosen: Sequence[int], batch_size: int) -> None:
        self.header = header
        self.rows: list[Row] = []
        self._lines = None if out is None else JsonLines(rows_path(out))
        if self._lines is None:
            return
        try:
            self._resume(self._lines, chosen, batch_size)
        except BaseException:
            self._lines.close()
            raise

    def append(self, rows: Sequence[Row]) -> None:
        if self._lines is not None:
            self._lines.append(dataclasses.asdict(row) for row in rows)

    def __enter__(self) -> RowsOnDisk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    def _resume(self, lines: JsonLines, chosen: Sequence[int], batch_size: int) -> None:
        if not lines.records:
            lines.append([header_record(self.header)])
            return
        earlier = Report.from_records(lines.records, lines.path)
        _refuse_another_evaluation(lines.path, earlier, self.header, chosen)
        # A shorter last block is whole only where the evaluation ends with it.
        count = len(earlier.rows)
        whole = count if count == len(chosen) else count // batch_size * batch_size
        self.header, self.rows = earlier.header, list(earlier.rows[:whole])
        lines.keep(1 + whole)


def _refuse_another_evaluation(path: Path, earlier: Report, header: Mapping[str, Any], chosen: Sequence[int]) -> None:
    there, here = _flat(earlier.header), _flat(json.loads(encode(header)))
    different = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} now"
        for name in sorted({*there, *here})
        if name != "started" and there.get(name) != here.get(name)
    ]
    rows = [row.index for row in earlier.rows]
    if not different and rows != list(chosen[: len(rows)]):
        different = [f"it holds {len(rows)} rows that are not the first of the {len(chosen)} examples asked for"]
    if different:
        raise ReportError(f"{path} holds another evaluation: {'; '.join(different)}; give another output")


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in header.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
