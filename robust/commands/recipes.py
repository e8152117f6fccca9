"""`robust recipes`: published settings with their published results."""

from __future__ import annotations

import argparse
from typing import Any

from robust.flags import add_json
from robust.listing import print_recipes, recipe_facts

WORDS = "list recipes with their published results"
EXAMPLES = """examples:
  robust recipes
  robust recipes digits_mtl_ibp"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one recipe's settings")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    print_recipes(options.name)
    return recipe_facts(options.name)
