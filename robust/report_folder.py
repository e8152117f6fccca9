"""Everything that is made of a report, in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from robust import lipschitz_plots, plots
from robust.eps_curve import EpsCurve
from robust.files import encode, read_json_lines, write_whole
from robust.html_report import Example, html_page
from robust.images import Images
from robust.lipschitz import Constants
from robust.masking import Masking
from robust.nearest_examples import NearestExamples
from robust.page import Picture
from robust.report import ROWS_FILE, Report, Row


def write_report(
    report: Report,
    folder: Path,
    *,
    images: Images | None = None,
    log: Path | Sequence[Mapping[str, Any]] | None = None,
    curve: EpsCurve | None = None,
    constants: Constants | None = None,
) -> Path:
    """Write summary.json, summary.csv, rows.csv, PNG pictures and report.html to `folder`; return the path of the page.

    rows.jsonl is written, too, unless the evaluation has put it there. Every file is replaced whole. The page shows
    the checks for masked gradients and nearest adversarial examples where the folder holds their records.

    Args:
        images: the split that the report's indices count, for the page of examples.
        log: JSON lines of the training run, or their records, for the training curves.
        curve: accuracies over radii.
        constants: local Lipschitz constants around the images (`robust lipschitz`).
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
    for name, title, text, draw in _drawings(report, records, curve, constants):
        plots.save(draw(plots.LIGHT), folder / f"{name}.png")
        pictures.append(Picture(title, text, plots.svg(draw(plots.LIGHT)), plots.svg(draw(plots.DARK))))
    shown: list[Example] = []
    if images is not None and report.rows:
        rows = plots.choose_examples(report)
        x, _ = images.batch(torch.tensor([row.index for row in rows]))
        plots.save(plots.examples(report, rows, x), folder / "examples.png")
        near = NearestExamples.load(folder)
        shown = [_example(report, row, image, near) for row, image in zip(rows, x, strict=True)]
    page = folder / "report.html"
    write_whole(page, html_page(report, pictures, shown, Masking.load(folder)))
    return page


def _example(report: Report, row: Row, image: Tensor, near: NearestExamples | None) -> Example:
    if near is None or row.index not in near.points:
        return Example(row, plots.thumbnail(image))
    point = plots.thumbnail(near.points[row.index])
    return Example(row, plots.thumbnail(image), point, near.words(report, row.index))


Drawing = tuple[str, str, str, Callable[[plots.Theme], Figure]]


def _drawings(
    report: Report, records: Sequence[Mapping[str, Any]] | None, curve: EpsCurve | None, constants: Constants | None
) -> list[Drawing]:
    """Name of the file, title, text and function of every picture that there is something to draw for."""
    found: list[Drawing] = []
    if curve is not None and curve.eps:
        eps = report.header.get("ball", {}).get("eps")
        text = "Accuracy against the radius of the ball; the vertical line is the radius of this report."
        text += curve_words(curve)
        found.append(("over_eps", "Over the radius", text, lambda theme: plots.over_eps(curve, eps, theme)))
    if report.rows:
        text = "Each bar holds the next: right without perturbation, still right under attack, proved robust."
        found.append(("per_class", "Accuracy per class", text, lambda theme: plots.per_class(report, theme)))
    if records:
        text = "Accuracies and terms of the loss during training."
        found.append(("training", "Training", text, lambda theme: plots.training_curves(records, theme)))
    if constants is not None:
        text = f"Local Lipschitz constants {constants.words}: upper bounds, and the largest slopes that were attained."
        groups = {"upper bound": constants.upper, "attained": constants.attained}
        histogram = partial(lipschitz_plots.constants_histogram, groups)
        found.append(("lipschitz", "Lipschitz constants", text, histogram))
    return found


def curve_words(curve: EpsCurve) -> str:
    """What the lines of accuracies over radii are, where the record says it."""
    words = ""
    if curve.certified and curve.verifier:
        words += f" Certified here means by {curve.verifier} alone, which may prove less than the report's verifier."
    if curve.under_attack and curve.attack:
        words += f" The attack was {curve.attack}."
    return words
