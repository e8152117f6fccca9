"""`robust attack`: accuracy of a checkpoint under an attack."""

from __future__ import annotations

import argparse
from typing import Any

from attacks.attack import ATTACKS
from robust.flags import add_dry_run
from robust.judging import add_evaluation, judge

WORDS = "accuracy of a checkpoint under an attack, as a report"
EXAMPLES = """examples:
  robust attack runs/digits_mtl_ibp/checkpoint.safetensors
  robust attack model.safetensors --attack pgd:steps=50,restarts=10 --limit 1000"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_evaluation(parser)
    add_dry_run(parser)
    parser.add_argument("--attack", default="apgd", help="attack and its fields (default: apgd)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return judge(options, None, ATTACKS.parse(options.attack))
