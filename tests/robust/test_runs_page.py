"""Reports of several runs on one page: what it shows, what it refuses, and what it says cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust.cli import main
from robust.eps_curve import EpsCurve
from robust.files import encode
from robust.judged_run import judged_runs, names_of, report_folder
from robust.nearest_examples import NearestExamples
from robust.report import Report, ReportError, Row
from robust.report_sources import Sources
from robust.runs_page import incomparable, runs_page
from robust.runs_plots import front
from tests.robust.test_plots import report
from tests.robust.test_report_folder import Tags

ATTACK = '<script>alert("x")</script>'


def a_run(folder: Path, images: Path, model: str, objective: str, **header: Any) -> Path:
    """The folder of a run with everything that a comparison reads."""
    given = report()
    given = Report(
        {**given.header, "model": model, "data": "own", "data_hash": "h", "split": "test", **header}, given.rows
    )
    given.save(folder / "certify" / "rows.jsonl")
    (folder / "settings.json").write_text(json.dumps({"objective": objective, "epochs": 2, "seed": 0}))
    log = [{"epoch": e, "seconds": 90.0, "validation/clean": 50.0 * e, "validation/certified": 30.0} for e in (1, 2)]
    (folder / "log.jsonl").write_text("".join(encode(record) + "\n" for record in log))
    curve = EpsCurve("linf", (0.0, 8 / 255), (0.5, 0.25), (), 0.75, 12, "crown_ibp")
    Sources(f"npz:{images}", "test", None, str(folder / "log.jsonl"), curve).save(folder / "certify")
    NearestExamples("linf", {0: torch.rand(1, 6, 6)}, {0: 0.0625}, {0: 1}).save(folder / "certify")
    constants = folder / "lipschitz"
    constants.mkdir()
    ball = {"norm": "linf", "eps": 8 / 255}
    records = [{"kind": "header", "margins": True, "method": "crown", "ball": ball}]
    records += [{"kind": "example", "constant": 2.0 + i, "attained": 1.0 + i} for i in range(5)]
    (constants / "lipschitz.jsonl").write_text("".join(encode(record) + "\n" for record in records))
    return folder


def three_runs(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    images = folder / "own.npz"
    np.savez(images, x=np.zeros((12, 6, 6), np.uint8), y=np.array([0, 1] * 6))
    folders = [folder / name for name in ("sabr", "mtl_ibp", "a_run_with_quite_a_long_name")]
    for each in folders:
        each.mkdir()
    return [
        a_run(each, images, f"cnn{k}:width=16", objective)
        for k, (each, objective) in enumerate(zip(folders, ("sabr", "mtl_ibp:ibp_weight=0.05", "ibp"), strict=True))
    ]


def page_of(folders: list[Path]) -> tuple[str, str]:
    """The page and its text on one line."""
    page = runs_page(judged_runs(folders))
    return page, " ".join(re.sub(r"<[^>]*>", " ", page.replace("<wbr>", "")).split())


def test_the_page_stands_alone_and_has_every_part(tmp_path: Path) -> None:
    page, text = page_of(three_runs(tmp_path))
    tags = Tags(page)
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in tags.sources)
    assert {"script", "link", "iframe"}.isdisjoint(tags.names)
    for words in (
        "3 runs side by side",
        "25.0 % 8.9 to 53.2",
        "8/255",
        "3.0 min",
        "mtl_ibp:ibp_weight=0.05",
        "cnn2:width=16",
        "Clean against certified",
        "Certified share of the first 12 images, by crown_ibp alone.",
        "Accuracy per class",
        "Training: clean",
        "Training: certified",
        "Upper bounds of local Lipschitz constants of the margins around 5 images (L∞, ε = 8/255, method crown).",
        "L∞ 0.0625 → bee &amp; wasp",
        "What each stage decided",
        "3 certified",
        "Per class: certified",
    ):
        assert words in text, words
    assert "epochs" not in text and "cannot be compared" not in text, "what is the same is not listed"


def test_runs_that_were_judged_on_other_terms_are_told_apart(tmp_path: Path) -> None:
    first, second, third = three_runs(tmp_path)
    for folder, changed, word in (
        (second, {"ball": {"norm": "linf", "eps": 0.1, "pixel_range": [0, 1]}}, "norm, radius or pixel range"),
        (third, {"data_hash": "other"}, "the images"),
    ):
        given = Report.load(folder / "certify")
        Report({**given.header, **changed}, given.rows).save(folder / "certify")
        assert incomparable(judged_runs([first, folder])) == [word]
    for folder, digest, words in ((first, "one", []), (second, "other", ["norm, radius or pixel range"])):
        given = Report.load(folder / "certify")
        Report({**given.header, "image_hash": digest}, given.rows).save(folder / "certify")
        assert incomparable(judged_runs([folder, three_runs(tmp_path / digest)[0]])) == words, "that one has none"
    assert incomparable(judged_runs([first, second])) == ["the images", "norm, radius or pixel range"]
    given = Report.load(first / "certify")
    Report(given.header, given.rows[:5]).save(second / "certify")
    assert incomparable(judged_runs([first, second])) == ["which images of the data set were judged"]
    assert "These rates cannot be compared directly. The runs differ in which images" in page_of([first, second])[1]


def test_runs_with_little_beside_their_rows_are_compared_all_the_same(tmp_path: Path) -> None:
    report().save(tmp_path / "bare" / "rows.jsonl")
    attacked = dataclasses.replace(report(), header={**report().header, "verifier": None})
    rows = tuple(row for row in attacked.rows if row.status != "certified")
    Report(attacked.header, rows).save(tmp_path / "attacked" / "attack" / "rows.jsonl")
    Report().save(tmp_path / "empty" / "rows.jsonl")
    _, text = page_of([tmp_path / "bare", tmp_path / "attacked"])
    assert "Clean against under attack" in text and "nan" not in text
    assert "0 runs" not in page_of([tmp_path / "bare", tmp_path / "empty"])[1]


def test_the_front_joins_the_runs_that_no_other_beats(tmp_path: Path) -> None:
    folders = three_runs(tmp_path)
    better = [
        dataclasses.replace(row, status="certified", attacked=False, attack_margin=None, margin_lb=1.0)
        if row.status == "unknown"
        else row
        for row in report().rows
    ]
    right = [
        Row(row.index, row.label, row.label, "unknown", "crown") if row.status == "misclassified" else row
        for row in report().rows
    ]
    for folder, rows in zip(folders[1:], (better, right), strict=True):
        Report(Report.load(folder / "certify").header, tuple(rows)).save(folder / "certify")
    lines = front(judged_runs(folders), "certified").axes[0].get_lines()
    (joined,) = [line for line in lines if line.get_linestyle() == ":"]
    assert list(zip(joined.get_xdata(), joined.get_ydata(), strict=True)) == [(75.0, 50.0), (100.0, 25.0)]


def test_names_are_as_short_as_they_can_be() -> None:
    assert names_of([Path("/a/x/certify"), Path("/b/y")]) == ["x", "y"]
    assert names_of([Path("/a/x/certify"), Path("/b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("/a/x/certify"), Path("/a/x/attack")]) == ["/a/x/certify", "/a/x/attack"]
    with pytest.raises(ReportError, match="is given twice; a comparison needs different reports"):
        names_of([Path("/a/x"), Path("/a/x")])


def test_the_folder_of_a_run_means_its_report(tmp_path: Path) -> None:
    (folder, *_) = three_runs(tmp_path)
    assert report_folder(folder) == report_folder(folder / "certify") == folder / "certify"
    assert report_folder(folder / "certify" / "rows.jsonl") == folder / "certify"
    with pytest.raises(ReportError, match=r"no report in it \(rows.jsonl, certify/rows.jsonl or attack/rows.jsonl\)"):
        report_folder(tmp_path)
    with pytest.raises(ReportError, match=r"gone/rows.jsonl: no such report"):
        report_folder(tmp_path / "gone")


def test_text_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    folders = three_runs(tmp_path)
    (folders[0] / "settings.json").write_text(json.dumps({ATTACK: ATTACK}))
    header = {**Report.load(folders[0] / "certify").header, "classes": [ATTACK] * 2, "verifier": ATTACK}
    rows = tuple(dataclasses.replace(row, method=ATTACK) for row in report().rows)
    Report(header, rows).save(folders[0] / "certify")
    page, _ = page_of(folders)
    assert "<script" not in page and ATTACK in Tags(page).text


def test_the_command_writes_the_page_into_the_folder_of_all_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = three_runs(tmp_path)
    assert main(["report", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    assert f"comparison: {tmp_path / 'runs.html'}" in out and out.count("certified:") == 3
    assert main(["report", *map(str, folders[:2]), "--out", str(tmp_path / "two.html")]) == 0
    assert "2 runs side by side" in (tmp_path / "two.html").read_text()
    assert main(["report", str(folders[0]), "--out", "x.html"]) == 2
    assert "--out names the page of several runs" in capsys.readouterr().err
    (folders[1] / "settings.json").write_text("{")
    assert main(["report", *map(str, folders)]) == 2
    assert "settings.json: damaged" in capsys.readouterr().err
