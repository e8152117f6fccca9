"""`robust methods`: everything that can be named in a run, with its fields."""

from __future__ import annotations

import argparse
from typing import Any

from robust.flags import add_json
from robust.listing import KINDS, method_facts, print_methods

WORDS = "list methods and their fields"
EXAMPLES = """examples:
  robust methods
  robust methods verifiers"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", choices=list(KINDS), help="only this kind: " + ", ".join(KINDS), metavar="KIND"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    print_methods(options.kind)
    return method_facts(options.kind)
