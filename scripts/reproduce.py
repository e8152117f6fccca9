"""Reproduce a table of the literature: train, attack and certify its rows, published next to reproduced.

    python scripts/reproduce.py                                    which tables there are
    python scripts/reproduce.py mnist_small --dry-run              what would be done, and how long it would take
    python scripts/reproduce.py mnist_small                        all of it; the same command goes on after a kill
    python scripts/reproduce.py cifar10_certified --scale 0.01     a trial run from end to end, in minutes
    python scripts/reproduce.py mnist_small --budget 30min         the rows and schedules that fit
    torchrun --nproc-per-node 8 --max-restarts 9 scripts/reproduce.py cifar10_certified    every GPU of the machine

The folder of the results holds table.md, table.csv and table.png, written anew behind every finished row, and a folder
for every row and seed with its run and its report.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robust.allocator import keep_freed_memory
from robust.cli import USER_ERRORS
from robust.flags import add_machine, output, usable_device
from robust.interruption import leave_at_a_signal, termination_interrupts
from scripts.reproduction.networks import default_folder
from scripts.reproduction.plan import PLAN, Order, Plan, load_plan, make_plan, plan_text, require_data
from scripts.reproduction.publish import write_table
from scripts.reproduction.run import (
    Machine,
    finished_results,
    follow_jobs,
    lead_jobs,
    left_of,
    own_device,
    processes,
    run_jobs,
    state_of,
)
from scripts.reproduction.table import Table, load_table, table_names

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


def main(arguments: list[str] | None = None) -> int:
    """Run the script; 0 for success, 1 where rows failed, 2 for a mistake in what was asked for."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with termination_interrupts():
            return _reproduce(options)
    except USER_ERRORS as error:
        if options.debug:
            raise
        print(f"reproduce: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if processes()[0] == 0:  # torchrun interrupts all its processes; one of them says so
            print("reproduce: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", nargs="?", help="table, or a TOML file; without one all are listed")
    parser.add_argument("--scale", type=_scale, default=1.0, help="share of images and epochs, for trial runs (0.01)")
    parser.add_argument("--budget", type=_seconds, default=0.0, metavar="TIME", help="such as 30min or 8h")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of every row (default: 0)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its estimates, and do nothing")
    parser.add_argument("--no-estimate", action="store_true", help="plan without measuring steps")
    parser.add_argument("--out", type=output, help="folder (default: runs/reproduce/TABLE with scale and budget)")
    parser.add_argument("--networks", type=Path, help="published networks (default: golden in $ROBUST_REFERENCE)")
    add_machine(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9.]+)\s*(s|min|h|d)", text)
    if found is None or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 30min, 8h or 2d, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def _reproduce(options: argparse.Namespace) -> int:
    if options.table is None:
        for name in table_names():
            table = load_table(name)
            print(f"{name:<26} {len(table.rows):>3} rows  {table.title}")
        return 0
    table = load_table(options.table)
    rows = table.names(options.rows)
    budgeted = rows if options.budget else ()
    order = Order(table.name, options.scale, options.budget, tuple(options.seeds), budgeted)
    out = options.out or Path("runs") / "reproduce" / _folder_name(order)
    device = usable_device(own_device(options.device))
    machine = Machine(device, options.root, options.networks or default_folder(), not options.quiet)
    if processes()[0] == 0:
        return _lead(options, table, order, rows, out, machine)
    if not options.dry_run:
        follow_jobs(out, machine)
    return 0


def _lead(
    options: argparse.Namespace, table: Table, order: Order, rows: Sequence[str], out: Path, machine: Machine
) -> int:
    plan = _plan(options, table, order, rows, out, machine)
    print(plan_text(plan, rows, {(job.row, job.seed): state_of(job, out) for job in plan.jobs}))
    if options.dry_run:
        return 0
    require_data(left_of(plan, rows, out), options.root)
    plan.save(out)

    def each() -> None:
        write_table(table, plan, finished_results(plan, out), out)

    each()
    failures = (run_jobs if processes()[1] == 1 else lead_jobs)(plan, rows, out, machine, each)
    for failure in failures:
        print(f"reproduce: failed: {failure}", file=sys.stderr)
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"table: {out / 'table.md'}, table.csv and table.png beside it")
    return 1 if failures else 0


def _plan(
    options: argparse.Namespace, table: Table, order: Order, rows: Sequence[str], out: Path, machine: Machine
) -> Plan:
    if (out / PLAN).exists():
        print(f"going on with the plan in {out}")
        return load_plan(out, order)
    return make_plan(
        table,
        order,
        rows,
        device=machine.device,
        root=machine.root,
        networks=machine.networks,
        workers=processes()[1],
        estimate=not options.no_estimate,
    )


def _folder_name(order: Order) -> str:
    scale = f"_scale_{order.scale:g}" if order.scale < 1 else ""
    budget = f"_budget_{order.budget / 60:g}min" if order.budget else ""
    return f"{order.table}{scale}{budget}"


if __name__ == "__main__":
    leave_at_a_signal("reproduce")
    sys.exit(main())
