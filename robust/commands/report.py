"""`robust report`: draw what an evaluation has found so far."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from robust.dataset import MissingData
from robust.judging import draw
from robust.report import Report
from robust.report_sources import Sources

WORDS = "draw the report of a finished or running evaluation again"
EXAMPLES = """example:
  robust report runs/digits_mtl_ibp/certify"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with rows.jsonl")


def run(options: argparse.Namespace) -> None:
    report = Report.load(options.folder)
    folder = options.folder.parent if options.folder.is_file() else options.folder
    sources = Sources.load(folder)
    images = None
    if sources is not None:
        try:
            images = sources.images()
        except MissingData as error:
            print(f"robust: note: without pictures of the examples: {error}", file=sys.stderr)
    draw(report, folder, sources, images)
