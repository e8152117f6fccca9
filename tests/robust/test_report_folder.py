"""The folder of a report: files that others can read, and a page that stands alone."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import re
from pathlib import Path

import pytest
import torch

from robust.eps_curve import EpsCurve
from robust.files import encode
from robust.html_report import html_page
from robust.images import MemoryImages
from robust.page import duration, percent
from robust.report import Report, Row
from robust.report_folder import write_report
from tests.robust.test_plots import HEADER, report

ATTACK = '<script>alert("x")</script>'
VOID = {"meta", "source", "img", "br", "wbr"}


class Tags(html.parser.HTMLParser):
    """Checks that tags are balanced; collects text, sources and tag names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def images() -> MemoryImages:
    pixels = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return MemoryImages(pixels, torch.zeros(12, dtype=torch.long))


def test_the_folder_holds_rows_summary_pictures_and_page(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(encode({"epoch": 1, "validation/clean": 50.0, "loss/total": 2.0}) + '\n{"epoch": 2, "cl')
    curve = EpsCurve("linf", (0.0, 8 / 255), (0.5, 0.25), (0.5, 0.5), 0.75, 12)
    page = write_report(report(), tmp_path / "run", images=images(), log=log, curve=curve)
    assert page == tmp_path / "run" / "report.html"
    names = {"rows.jsonl", "rows.csv", "summary.json", "summary.csv", "report.html"}
    names |= {"over_eps.png", "per_class.png", "examples.png", "training.png"}
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == names
    assert Report.load(tmp_path / "run") == report()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["certified"]["count"], summary["header"]) == (3, HEADER)
    with (tmp_path / "run" / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == ["all"] * 3 + ["0"] * 3 + ["1"] * 3
    assert {line["rate"]: line["count"] for line in lines[:3]} == {"clean": "9", "under_attack": "6", "certified": "3"}


def test_the_rows_that_an_evaluation_wrote_stay_as_they_are(tmp_path: Path) -> None:
    report().save(tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"index": 12, "la')
    before = (tmp_path / "rows.jsonl").read_bytes()
    write_report(Report.load(tmp_path), tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_the_page_stands_alone_and_says_what_matters(tmp_path: Path) -> None:
    page = write_report(report(), tmp_path, images=images()).read_text()
    tags = Tags(page)
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in tags.sources)
    assert not re.search(r"https?://|url\(|@import", page)
    assert {"script", "link", "iframe"}.isdisjoint(tags.names)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    text = " ".join(tags.text.split())
    for fact in ("25.0 %", "3 of 12 examples", "8.9 to 53.2 %", "L∞ distance", "ε = 8/255", "bee & wasp", "no bound"):
        assert fact in text, fact


def test_the_page_says_which_examples_stayed_unknown_and_how_far_from_a_proof() -> None:
    rows = tuple(
        Row(i, 0, 0, "unknown", "cascade", margin_lb=-0.1 * i, attack_margin=0.5, seconds=2.0, domains=1000 * i)
        for i in range(1, 60)
    )
    text = " ".join(re.sub(r"<[^>]*>", " ", html_page(Report(HEADER, rows))).split())
    assert "What stayed unknown" in text and "And 9 more, with bounds further from zero." in text
    assert text.index("#1 ") < text.index("-0.1") < text.index("#2 ") < text.index("-0.2")
    assert "2,000" in text and "1,770,000" in text, "the domains of an example and of the stage"
    decided = dataclasses.replace(rows[0], status="certified", margin_lb=0.1, domains=0)
    assert "What stayed unknown" not in html_page(Report(HEADER, (decided,)))


def test_text_from_outside_cannot_become_markup() -> None:
    rows = tuple(dataclasses.replace(row, method=ATTACK) for row in report().rows)
    header = {"model": ATTACK, "data": ATTACK, "classes": [ATTACK] * 2, "attack": ATTACK, ATTACK: {ATTACK: [ATTACK]}}
    header["ball"] = {"norm": ATTACK, "eps": 0.1, "pixel_range": None}
    page = html_page(Report(header, rows))
    assert "<script" not in page
    assert ATTACK in Tags(page).text


@pytest.mark.parametrize(
    "given",
    [
        Report(),
        Report(HEADER),
        Report(HEADER, (Row(0, 0, 1, "misclassified", "clean"),)),
        Report({}, (Row(5, 7, 7, "certified", "ibp", 1.0),)),
    ],
)
def test_every_report_has_a_page(tmp_path: Path, given: Report) -> None:
    text = Tags(write_report(given, tmp_path).read_text()).text
    assert "Certified accuracy" in text
    assert "nan" not in text


def test_a_report_of_an_attack_alone_claims_nothing_about_certificates(tmp_path: Path) -> None:
    rows = tuple(row for row in report().rows if row.status != "certified")
    page = write_report(Report({**HEADER, "verifier": None, "attack": "pgd"}, rows), tmp_path).read_text()
    text = " ".join(Tags(page).text.split())
    assert "Certified accuracy" not in text and "What is certified" not in text
    assert "No verifier ran, so the accuracy under attack is an upper bound" in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "50.0 %"), (0.0, "0.0 %"), (1.0, "100.0 %"), (0.99995, "99.995 %"), (float("nan"), "-")]
)
def test_fractions_are_written_so_that_nearly_all_is_not_all(value: float, text: str) -> None:
    assert percent(value) == text


def test_times_are_written_in_fitting_units() -> None:
    assert [duration(s) for s in (0.0123, 5.0, 300.0, 36000.0)] == ["12.3 ms", "5 s", "5.0 min", "10.0 h"]


def test_a_report_of_bounds_alone_claims_nothing_about_attacks(tmp_path: Path) -> None:
    rows = tuple(row for row in report().rows if row.status == "certified")
    bounded = Report({**HEADER, "searched": False}, rows)
    assert bounded.measured() == ["certified", "clean"]
    page = html_page(bounded)
    assert "Accuracy under attack" not in page
    assert "Certified accuracy" in page
    assert "Accuracy under attack" in html_page(Report({**HEADER, "searched": True}, rows))
