"""How far the cascade exceeds its budget on hard examples: the worst overrun of wall time at each budget.

    python scripts/bench/budget.py [NETWORK ...] [--budgets 1 5 20] [--count 100] [--out rows.jsonl]

Hard examples are those that use their budget up: images of the published networks (see verify_golden.py for where they
lie) at their own radius and at larger ones, taken in turn until `count` of them came out unknown. The budget holds if
no example, hard or not, takes more than 10 % or 1 s longer, whichever is more. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from attacks.threat import LinfBall
from certify.verifier import VERIFIERS
from robust.allocator import keep_freed_memory
from tests.golden.networks import NAMES, load

FACTORS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2.0)
"""Times the published radius."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NAMES, metavar="NETWORK", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 5.0, 20.0], help="seconds per example")
    parser.add_argument("--count", type=int, default=100, help="hard examples per budget")
    parser.add_argument("--verifier", default="cascade", help="text of a verifier with a field timeout")
    parser.add_argument("--out", type=Path, help="file for one JSON line per example")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for budget in arguments.budgets:
        some = list(measure(arguments.networks, arguments.verifier, budget, arguments.count))
        worst = max(some, key=lambda row: float(row["overrun"]))
        print(
            f"budget {budget:g} s: {sum(row['status'] == 'unknown' for row in some)} hard examples of {len(some)}, "
            f"worst overrun {worst['overrun']:.2f} s ({worst['network']} image {worst['image']}, "
            f"eps x {worst['factor']}, {worst['status']}), allowed {max(0.1 * budget, 1.0):.2f} s",
            flush=True,
        )
        rows += some
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(names: list[str], text: str, budget: float, count: int) -> Iterator[dict[str, object]]:
    """One row per example, until `count` were unknown."""
    verifier = VERIFIERS.parse(f"{text}{',' if ':' in text else ':'}timeout={budget}")
    golden = {name: load(name) for name in names}
    most = max(len(g.x) for g in golden.values())
    hard = 0
    for factor, i, name in itertools.product(FACTORS, range(most), names):
        if hard >= count:
            return
        if i >= len(golden[name].x):
            continue
        x, y, eps = golden[name].x[i : i + 1], golden[name].y[i : i + 1], float(golden[name].eps[i]) * factor
        begin = time.perf_counter()
        (verdict,) = verifier(golden[name].model, x, y, LinfBall(eps))
        seconds = time.perf_counter() - begin
        hard += verdict.status == "unknown"
        yield {
            "network": name,
            "image": i,
            "factor": factor,
            "budget": budget,
            "status": verdict.status,
            "method": verdict.method,
            "seconds": round(seconds, 3),
            "overrun": round(max(seconds - budget, 0.0), 3),
        }


if __name__ == "__main__":
    main()
