"""Branch and bound against mixed-integer programming on random small networks: every verdict must be the same.

    python scripts/bench/bab_against_milp.py [--count 20000] [--first 0] [--out bab_against_milp.jsonl]

Problem number s (`tests.certify.bab.problems`) is decided by both verifiers, with even s in float32 and odd s in
float64. One row per problem is written as soon as it is decided; a run that was stopped goes on where it was. At the
end the counts of all pairs of verdicts are printed, and the numbers of the problems that have no verdict or two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from certify.verifier import VERIFIERS
from tests.certify.bab.problems import random_problem

MILP_ALLOWANCE = 1e-2
"""Share of a margin by which `milp` may have lowered it for the solver's tolerances; up to 0.7 % in 20,000 problems."""


def row(seed: int, bab: str, milp: str) -> dict[str, object]:
    """Both verdicts on one problem."""
    problem = random_problem(seed, torch.float64 if seed % 2 else torch.float32)
    (ours,), (exact,) = (VERIFIERS.parse(text)(*problem) for text in (bab, milp))
    return {
        "seed": seed,
        "bab": ours.status,
        "milp": exact.status,
        "margin_lb": ours.margin_lb,
        "exact": exact.margin_lb,
        "domains": ours.domains,
        "seconds": round(ours.seconds, 4),
        "milp_seconds": round(exact.seconds, 4),
    }


def summary(rows: list[dict[str, object]]) -> None:
    """Print what the rows say."""
    for (ours, exact), count in Counter((r["bab"], r["milp"]) for r in rows).most_common():
        print(f"{count:6d}  bab {ours:12s} milp {exact}")
    for title, seeds in {
        "contradictions": [r["seed"] for r in rows if {r["bab"], r["milp"]} == {"certified", "falsified"}],
        "unknown to bab": [r["seed"] for r in rows if r["bab"] == "unknown"],
        "bounds above the exact margin": [
            r["seed"]
            for r in rows
            if r["milp"] == "certified" and r["margin_lb"] > r["exact"] + MILP_ALLOWANCE * max(1, r["exact"])
        ],
    }.items():
        print(f"{title}: {len(seeds)}", *seeds[:50])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--bab", default="bab:timeout=30")
    parser.add_argument("--milp", default="milp:timeout=30")
    parser.add_argument("--out", type=Path, default=Path("bab_against_milp.jsonl"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {r["seed"] for r in rows}
    with options.out.open("a") as file:
        for seed in range(options.first, options.first + options.count):
            if seed not in done:
                rows.append(row(seed, options.bab, options.milp))
                print(json.dumps(rows[-1]), file=file, flush=True)
    summary(rows)


if __name__ == "__main__":
    main()
