"""`robust report`: draw what an evaluation has found so far, or several runs side by side."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from robust.dataset import MissingData
from robust.flags import add_json, output
from robust.judged_run import judged_runs, report_folder
from robust.judging import draw, summary_lines
from robust.report import Report
from robust.report_sources import Sources
from robust.runs_page import facts, incomparable, write_runs_page

WORDS = "draw the report of an evaluation again, or compare those of several runs on one page"
EXAMPLES = """examples:
  robust report runs/digits_mtl_ibp                          also while its evaluation is running
  robust report runs/sabr runs/mtl_ibp --out comparison.html"""

PAGE = "runs.html"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a report, or of a run with one")
    parser.add_argument(
        "--out", type=output, help=f"page of several runs (default: {PAGE} in the folder that holds all of them)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if len(options.folders) > 1:
        return _compare(options)
    if options.out is not None:
        raise ValueError("--out names the page of several runs; the report of one is drawn in its own folder")
    folder = report_folder(options.folders[0])
    report = Report.load(folder)
    sources = Sources.load(folder)
    images = None
    if sources is not None:
        try:
            images = sources.images()
        except MissingData as error:
            print(f"robust: note: without pictures of the examples: {error}", file=sys.stderr)
    return draw(report, folder, sources, images)


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    runs = judged_runs(options.folders)
    common = Path(os.path.commonpath([report_folder(path).resolve() for path in options.folders]))
    path = write_runs_page(runs, options.out or common / PAGE)
    for each in runs:
        print(f"{each.name}\n{summary_lines(each.report)}")
    different = incomparable(runs)
    if different:
        print(
            f"robust: note: the rates cannot be compared directly; different: {'; '.join(different)}", file=sys.stderr
        )
    print(f"comparison: {path}")
    return {"comparison": str(path), "differ_in": different, "runs": facts(runs)}
