"""Reports hold what happened, refuse contradictions, and count right."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certify.verdict import SoundnessError
from robust.files import encode
from robust.report import Report, ReportError, Row, read_row

HEADER = {"model": "mlp", "ball": {"norm": "linf", "eps": 8 / 255}}


def certified(index: int, label: int = 0, method: str = "ibp") -> Row:
    return Row(index, label, label, "certified", method, margin_lb=0.5, attack_margin=0.7, seconds=0.25)


def falsified(index: int, label: int = 0, method: str = "pgd") -> Row:
    return Row(index, label, label, "falsified", method, None, True, -0.1, 0.5, linf=0.03, l2=0.5)


def unknown(index: int, label: int = 0) -> Row:
    return Row(index, label, label, "unknown", "crown", margin_lb=-0.2, seconds=1.0)


def misclassified(index: int, label: int = 0) -> Row:
    return Row(index, label, label + 1, "misclassified", "clean")


MIXED = (certified(0), falsified(1), unknown(2), misclassified(3), certified(4, 2, "crown"), misclassified(9, 2))


def test_counts_by_hand() -> None:
    summary = Report(HEADER, MIXED).summary()
    overall = summary.rates
    assert (overall.clean.count, overall.under_attack.count, overall.certified.count) == (4, 3, 2)
    assert overall.clean.fraction == pytest.approx(4 / 6)
    assert summary.statuses == {"certified": 2, "unknown": 1, "falsified": 1, "misclassified": 2}
    assert summary.seconds == pytest.approx(0.25 + 0.5 + 1.0 + 0.25)
    assert {label: (r.clean.count, r.clean.total) for label, r in summary.classes.items()} == {0: (3, 4), 2: (1, 2)}
    assert summary.classes[2].certified.count == 1
    stages = {name: (s.certified, s.unknown, s.falsified, s.seconds) for name, s in summary.stages.items()}
    assert stages == {"ibp": (1, 0, 0, 0.25), "pgd": (0, 0, 1, 0.5), "crown": (1, 1, 0, 1.25)}


def test_undecided_rows_come_nearest_to_zero_first() -> None:
    bounds = {0: -0.3, 1: None, 2: -0.01, 3: 1e-9}
    rows = tuple(dataclasses.replace(unknown(i), margin_lb=bound, domains=i) for i, bound in bounds.items())
    report = Report(HEADER, (certified(9), *rows, falsified(8)))
    assert [row.index for row in report.undecided()] == [3, 2, 0, 1]
    assert report.summary().stages["crown"].domains == 6


def test_an_empty_report_has_rates_without_a_value() -> None:
    summary = Report(HEADER).summary()
    assert summary.examples == 0
    assert summary.rates.clean.interval == (0.0, 1.0)
    assert json.loads(encode(summary.facts()))["clean"] == {
        "count": 0,
        "total": 0,
        "fraction": None,
        "low": 0.0,
        "high": 1.0,
    }


def test_a_report_of_misclassified_examples_has_rates_of_zero() -> None:
    summary = Report(HEADER, tuple(misclassified(index) for index in range(5))).summary()
    assert summary.rates.clean.fraction == summary.rates.certified.fraction == 0.0
    assert summary.rates.clean.interval[0] == 0.0
    assert summary.stages == {}


def test_certified_and_attacked_is_a_loud_contradiction(tmp_path: Path) -> None:
    record = dataclasses.asdict(certified(7)) | {"attacked": True}
    with pytest.raises(SoundnessError, match=r"example 7 is certified by 'ibp' and attacked"):
        read_row(record)
    path = tmp_path / "rows.jsonl"
    path.write_text(encode({"header": HEADER}) + "\n" + encode(record) + "\n")
    with pytest.raises(SoundnessError, match=r"rows\.jsonl: example 7"):
        Report.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "safe"},
        {"status": "misclassified"},
        {"status": "falsified"},
        {"status": "unknown", "attacked": True},
        {"predicted": 5},
    ],
)
def test_impossible_rows_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="example 0"):
        dataclasses.replace(certified(0), **change)


def test_one_example_has_one_row() -> None:
    with pytest.raises(ReportError, match="example 3 has two rows"):
        Report(HEADER, (certified(3), unknown(3)))


def test_a_saved_report_comes_back_exactly(tmp_path: Path) -> None:
    Report(HEADER, MIXED).save(tmp_path / "run")
    assert (tmp_path / "run" / "rows.jsonl").is_file()
    assert Report.load(tmp_path / "run") == Report.load(tmp_path / "run" / "rows.jsonl") == Report(HEADER, MIXED)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Report(HEADER, MIXED).save(path)
    path.write_bytes(path.read_bytes()[:-5])
    assert Report.load(path).rows == MIXED[:-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line is no header"),
        ('{"epoch": 1}\n', "first line is no header"),
        ("some text\n", "line 1: expected one JSON object"),
        ('{"header": {}}\n{"index": 1, "colour": 2}\n', r"unknown fields \['colour'\] and without \['label'"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ReportError, match=message) as refusal:
        Report.load(path)
    assert str(refusal.value).count(str(path)) == 1
    with pytest.raises(ReportError, match="no such report"):
        Report.load(tmp_path / "absent")


def test_the_csv_has_one_line_per_row_and_empty_cells_for_none() -> None:
    lines = list(csv.DictReader(io.StringIO(Report(HEADER, MIXED).csv())))
    assert len(lines) == len(MIXED)
    assert lines[1]["attacked"] == "True"
    assert lines[1]["margin_lb"] == ""
    assert float(lines[0]["margin_lb"]) == 0.5


ROWS = st.lists(
    st.builds(
        lambda make, label: (make, label),
        st.sampled_from([certified, falsified, unknown, misclassified]),
        st.integers(0, 3),
    ),
    max_size=30,
)


@given(ROWS)
def test_certified_is_at_most_attacked_is_at_most_clean_in_every_class(choices: list[Any]) -> None:
    report = Report(HEADER, tuple(make(index, label) for index, (make, label) in enumerate(choices)))
    summary = report.summary()
    for rates in (summary.rates, *summary.classes.values()):
        assert rates.certified.count <= rates.under_attack.count <= rates.clean.count <= rates.clean.total
    assert sum(rates.clean.total for rates in summary.classes.values()) == summary.examples
    assert sum(summary.statuses.values()) == summary.examples
    decided = sum(stage.certified + stage.unknown + stage.falsified for stage in summary.stages.values())
    assert decided == summary.rates.clean.count
    records = [json.loads(encode(record)) for record in ({"header": HEADER}, *map(dataclasses.asdict, report.rows))]
    assert Report.from_records(records, Path("rows.jsonl")) == report
