"""`robust compare`: best and last weights of runs under the same attacks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from attacks.attack import ATTACKS
from robust.comparison import as_text
from robust.comparison_folder import compare_runs
from robust.flags import add_json, add_machine, count, output, usable_device

WORDS = "attack best and last weights of runs, side by side"
EXAMPLES = """examples:
  robust compare runs/trades runs/trades_dafa --attacks pgd:steps=20 apgd_t
  robust compare runs/pgd --limit 1000                                  PGD and AutoAttack"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs; fairness is against the first")
    parser.add_argument(
        "--attacks",
        nargs="+",
        default=["pgd:steps=20", "autoattack"],
        metavar="ATTACK",
        help="attacks (default: pgd:steps=20 autoattack)",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N test images")
    parser.add_argument(
        "--batch-size", type=count, metavar="N", default=100, help="images decided and written together (default: 100)"
    )
    parser.add_argument("--out", type=output, help="folder of the comparison (default: comparison/ in the first run)")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="FILE.py:NAME",
        help="your own networks, whose files are run; where runs are of such",
    )
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out or options.runs[0] / "comparison"
    for text in options.attacks:
        ATTACKS.parse(text)
    lines = compare_runs(
        options.runs,
        options.attacks,
        out,
        root=options.root,
        models=options.model,
        limit=options.limit,
        batch_size=options.batch_size,
        device=usable_device(options.device),
        progress=not options.quiet,
    )
    print(as_text(lines))
    print(f"comparison: {out / 'comparison.html'}")
    return {"comparison": str(out / "comparison.html"), "lines": [dataclasses.asdict(line) for line in lines]}
