"""The written table: published next to reproduced, and nothing that misleads."""

from __future__ import annotations

import csv
import io

import pytest

from scripts.reproduction.publish import as_csv, as_markdown, lines_of, marks, picture, write_table
from scripts.reproduction.table import load_table
from tests.scripts.tables import job, plan, result, table


@pytest.fixture
def small(tmp_path):
    return table(folder=tmp_path)


def lines(small, jobs=None, results=(), **order):
    made = plan(jobs or [job("first"), job("second"), job("quoted", left_out="nobody knows how")], **order)
    return lines_of(small, made, {(r["row"], r["seed"]): r for r in results}), made


def markdown(small, jobs=None, results=(), **order):
    found, made = lines(small, jobs, results, **order)
    return as_markdown(small, found, marks(made, found))


def test_published_stands_next_to_reproduced_with_difference_hours_seeds_and_notes(small):
    text = markdown(small, results=[result(clean=58.5, adversarial=50.0, certified=41.25, unknown=3)])
    (line,) = [line for line in text.splitlines() if line.startswith("| first")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("first", "60.00", "58.50 (-1.50)", "", "50.00", "40.00", "41.25 (+1.25)", "0", "1", "1 2")
    ]
    assert "1. a paper" in text and "2. undecided: 3 of 100 images" in text and "Hardware: a machine" in text
    assert "not run yet" in text and "nobody knows how" in text and "SCALED" not in text


def test_several_seeds_give_mean_and_spread(small):
    jobs = [job("first", seed) for seed in (0, 1)] + [job("second"), job("quoted", left_out="x")]
    results = [result(clean=58.0), result(seed=1, clean=62.0)]
    (line, *_), _ = lines(small, jobs, results)
    assert line.reproduced == {"clean": 60.0} and line.spread["clean"] == pytest.approx(8**0.5)
    assert line.seeds == (0, 1) and line.seconds == 7200 and line.difference("clean") == 0
    assert "60.00 ± 2.83 (+0.00)" in markdown(small, jobs, results)


def test_a_scaled_run_is_marked_everywhere_and_compared_with_nothing(small):
    remarks = ("scale 0.01: 200 training images", "STAND-IN data (resized digits)")
    jobs = [job("first", remarks=remarks), job("second", remarks=remarks), job("quoted", left_out="x")]
    found, made = lines(small, jobs, [result(clean=58.5)], scale=0.01)
    text = as_markdown(small, found, marks(made, found))
    assert "**SCALED RUN (scale 0.01)" in text and "**STAND-IN DATA" in text and "58.50 |" in text
    assert found[0].difference("clean") is None and "(-1.50)" not in text
    rows = list(csv.DictReader(io.StringIO(as_csv(found, made))))
    assert rows[0]["scale"] == "0.01" and "STAND-IN" in rows[0]["remarks"] and rows[0]["difference"] == ""
    title = picture(small, found, marks(made, found))._suptitle.get_text()
    assert "SCALED RUN (scale 0.01)" in title and "STAND-IN DATA" in title


def test_a_shortened_run_is_marked_and_compared_with_nothing(small):
    jobs = [job("first", remarks=("3 of 30 epochs (budget)",)), job("second"), job("quoted", left_out="x")]
    results = [result(clean=58.5), result("second", clean=61.0)]
    text = markdown(small, jobs, results, budget=1800.0)
    assert "**BUDGET of 30.0 min" in text and "3 of 30 epochs (budget)" in text
    assert "58.50 |" in text and "61.00 (+1.00)" in text


def test_the_csv_has_a_line_for_every_value(small):
    found, made = lines(small, results=[result(clean=58.5, certified=41.25)])
    rows = list(csv.DictReader(io.StringIO(as_csv(found, made))))
    assert [(row["row"], row["metric"]) for row in rows] == [
        *(("first", "clean"), ("first", "certified"), ("second", "clean"), ("second", "certified"), ("quoted", "clean"))
    ]
    assert (rows[0]["published"], rows[0]["reproduced"], rows[0]["difference"]) == ("60", "58.5", "-1.5")
    assert rows[0]["hardware"] == "a machine" and rows[0]["source"] == "a paper"


def test_the_published_fairness_is_lee_et_als_own():
    small = load_table("fairness_cifar10")
    made = plan([job(row.name, left_out=row.absent) for row in small.rows])
    found = {line.row: line.published.get("fairness") for line in lines_of(small, made, {})}
    known = {"FRL": 0.11, "cifar10_8_255_trades_cfa_resnet18": 0.32, "BAT": -0.24, "WAT": 0.27}
    known["cifar10_8_255_trades_dafa_resnet18"] = 0.42
    assert found.pop("cifar10_8_255_trades_resnet18") is None
    assert {name: round(value, 2) for name, value in found.items()} == known


@pytest.mark.parametrize(("accuracy", "start"), [(57.0, 50), (0.0, 0), (99.9, 60), (100.0, 60)])
def test_axes_hold_every_mark_and_begin_at_the_ten_below(small, accuracy, start):
    found, made = lines(small, results=[result(clean=accuracy)])  # 60 % is published
    panel = picture(small, found, marks(made, found)).axes[0]
    assert panel.get_xlim() == (start, 100)


def test_worst_classes_are_shown_only_where_they_were_published(small):
    text = markdown(small, results=[result(clean=58.5, clean_worst=12.0)])
    assert "worst class" not in text


def test_the_files_are_written_and_written_again(small, tmp_path):
    _, made = lines(small)
    page = write_table(small, made, {}, tmp_path / "out")
    before = page.read_text(encoding="utf-8")
    write_table(small, made, {("first", 0): result(clean=58.5)}, tmp_path / "out")
    assert page.read_text(encoding="utf-8") != before and "58.50" in page.read_text(encoding="utf-8")
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "table.csv").read_text(encoding="utf-8").startswith("row,metric,published,reproduced")
