"""`robust methods`: everything that can be named in a run, with its fields."""

from __future__ import annotations

import argparse

from robust.listing import KINDS, print_methods

WORDS = "list methods and their fields"
EXAMPLES = """examples:
  robust methods
  robust methods verifiers"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", choices=list(KINDS), help="only this kind: " + ", ".join(KINDS), metavar="KIND"
    )


def run(options: argparse.Namespace) -> None:
    print_methods(options.kind)
