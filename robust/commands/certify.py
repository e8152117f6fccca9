"""`robust certify`: certified accuracy of a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from certify.verifier import VERIFIERS
from robust.flags import add_dry_run
from robust.judging import add_evaluation, judge

WORDS = "certified accuracy of a checkpoint, as a report"
EXAMPLES = """examples:
  robust certify runs/digits_mtl_ibp/checkpoint.safetensors
  robust certify model.safetensors --eps 2/255 --verifier cascade:timeout=20 --limit 1000 --out reports/2_255
  robust certify weights.pt --model cnn7 --data cifar10 --eps 8/255
  torchrun --nproc-per-node 4 --max-restarts 9 -m robust certify model.safetensors    four processes, one report"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_evaluation(parser)
    add_dry_run(parser)
    parser.add_argument("--verifier", default="cascade", help="verifier and its fields (default: cascade)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    return judge(options, VERIFIERS.parse(options.verifier), None)
