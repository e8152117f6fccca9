"""Everything that is made of a report, in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from robust import plots
from robust.eps_curve import EpsCurve
from robust.files import encode, read_json_lines, write_whole
from robust.html_report import Example, Picture, html_page
from robust.images import Images
from robust.masking import Masking
from robust.report import ROWS_FILE, Report


def write_report(
    report: Report,
    folder: Path,
    *,
    images: Images | None = None,
    log: Path | Sequence[Mapping[str, Any]] | None = None,
    curve: EpsCurve | None = None,
) -> Path:
    """Write summary.json, summary.csv, rows.csv, PNG pictures and report.html to `folder`; return the path of the page.

    rows.jsonl is written, too, unless the evaluation has put it there. Every file is replaced whole. The page shows
    the checks for masked gradients where the folder holds their record (`robust masking`).

    Args:
        images: the split that the report's indices count, for the page of examples.
        log: JSON lines of the training run, or their records, for the training curves.
        curve: accuracies over radii.
    """
    folder = Path(folder)
    if not (folder / ROWS_FILE).exists():
        report.save(folder / ROWS_FILE)
    summary = report.summary()
    facts = {"header": report.header, **summary.facts()}
    write_whole(folder / "summary.json", json.dumps(json.loads(encode(facts)), indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / "summary.csv", summary.csv())
    write_whole(folder / "rows.csv", report.csv())
    records = read_json_lines(Path(log)) if isinstance(log, str | Path) else log
    pictures = []
    for name, title, text, draw in _drawings(report, records, curve):
        light, dark = plots.png(draw(plots.LIGHT)), plots.png(draw(plots.DARK))
        write_whole(folder / f"{name}.png", light)
        pictures.append(Picture(title, text, light, dark))
    shown: list[Example] = []
    if images is not None and report.rows:
        rows = plots.choose_examples(report)
        x, _ = images.batch(torch.tensor([row.index for row in rows]))
        plots.save(plots.examples(report, rows, x), folder / "examples.png")
        shown = [Example(row, plots.thumbnail(image)) for row, image in zip(rows, x, strict=True)]
    page = folder / "report.html"
    write_whole(page, html_page(report, pictures, shown, Masking.load(folder)))
    return page


Drawing = tuple[str, str, str, Callable[[plots.Theme], Figure]]


def _drawings(report: Report, records: Sequence[Mapping[str, Any]] | None, curve: EpsCurve | None) -> list[Drawing]:
    """Name of the file, title, text and function of every picture that there is something to draw for."""
    found: list[Drawing] = []
    if curve is not None and curve.eps:
        eps = report.header.get("ball", {}).get("eps")
        text = "Accuracy against the radius of the ball; the vertical line is the radius of this report."
        found.append(("over_eps", "Over the radius", text, lambda theme: plots.over_eps(curve, eps, theme)))
    if report.rows:
        text = "Each bar holds the next: right without perturbation, still right under attack, proved robust."
        found.append(("per_class", "Accuracy per class", text, lambda theme: plots.per_class(report, theme)))
    if records:
        text = "Accuracies and terms of the loss during training."
        found.append(("training", "Training", text, lambda theme: plots.training_curves(records, theme)))
    return found
