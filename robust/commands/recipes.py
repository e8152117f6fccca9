"""`robust recipes`: published settings with their published results."""

from __future__ import annotations

import argparse

from robust.listing import print_recipes

WORDS = "list recipes with their published results"
EXAMPLES = """examples:
  robust recipes
  robust recipes digits_mtl_ibp"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one recipe's settings")


def run(options: argparse.Namespace) -> None:
    print_recipes(options.name)
