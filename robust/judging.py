"""What `robust certify` and `robust attack` share: evaluate every image, write rows, draw the report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from attacks.threat import Ball
from certify.verifier import VERIFIERS
from robust.checkpoint import Checkpoint
from robust.crew import Crew
from robust.dataset import data_root, from_anywhere
from robust.dry_run import dry_judgement, memory_advice
from robust.eps_curve import EpsCurve, eps_curve
from robust.evaluate import BLOCK, evaluate
from robust.flags import add_json, add_machine, count, output, own_device, usable_device
from robust.images import Images
from robust.lipschitz import LIPSCHITZ_FOLDER, Constants
from robust.nearest_examples import nearest_examples
from robust.problem import add_problem, images_of, problem
from robust.report import ROWS_FILE, Rate, Report
from robust.report_folder import write_report
from robust.report_sources import SOURCES_FILE, Sources
from robust.run_setup import LOG

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CURVE_IMAGES = 200


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    parser.add_argument(
        "--batch-size", type=count, metavar="N", help="images decided and written together (default: the verifier's)"
    )
    parser.add_argument(
        "--out", type=output, help="folder of the results (default: one beside the checkpoint, named after the command)"
    )
    parser.add_argument("--no-curve", action="store_true", help="leave out what is measured for the pictures alone")
    add_machine(parser)
    add_json(parser)


def judge(options: argparse.Namespace, verifier: Any, attack: Any) -> dict[str, Any]:
    """Facts of the report, as `draw` gives them; none from a process that does not lead."""
    crew = Crew.join()
    options.device = device = usable_device(own_device(options.device, crew is not None))
    checkpoint, data, ball = problem(options)
    images = images_of(options, data)
    out = options.out or options.checkpoint.parent / ("certify" if verifier is not None else "attack")
    leads = crew is None or crew.rank == 0
    if options.dry_run:
        return dry_judgement(checkpoint, data, ball, verifier, attack, out, vars(options)) if leads else {}
    batch = options.batch_size or getattr(verifier, "block", BLOCK)
    note = memory_advice(checkpoint.model, images, ball, batch, verifier, device)
    if leads and note is not None:
        print(f"robust: note: {note}", file=sys.stderr)
    sources = _sources(options, checkpoint)
    if leads and not (out / ROWS_FILE).exists() and not (out / SOURCES_FILE).exists():
        sources.save(out)  # so that `robust report` can draw the evaluation while it runs
    report = evaluate(
        checkpoint,
        data,
        ball,
        verifier,
        attack,
        out=out,
        split=options.split,
        limit=options.limit,
        batch_size=options.batch_size,
        device=device,
        progress=not options.quiet,
        crew=crew,
    )
    if not leads:
        return {}
    if not options.no_curve:
        sources = dataclasses.replace(sources, curve=_curve(options, checkpoint, images, ball, verifier, attack))
        nearest_examples(checkpoint.model, images, report, ball).save(out)
    sources.save(out)
    return draw(report, out, sources, images)


def _curve(
    options: argparse.Namespace, checkpoint: Checkpoint, images: Images, ball: Ball, verifier: Any, attack: Any
) -> EpsCurve:
    count = min(CURVE_IMAGES, options.limit or CURVE_IMAGES, len(images))
    x, y = images.batch(torch.arange(count), options.device)
    cheap = VERIFIERS.parse("crown_ibp") if verifier is not None else None
    return eps_curve(checkpoint.model, x, y, ball, CURVE_FACTORS, cheap, attack)


def _sources(options: argparse.Namespace, checkpoint: Checkpoint) -> Sources:
    log = options.checkpoint.parent / LOG
    return Sources(
        data=from_anywhere(options.data or checkpoint.settings["data"]),
        split=options.split,
        root=str(data_root(options.root).resolve()),
        log=str(log) if log.exists() else None,
    )


def draw(report: Report, out: Path, sources: Sources | None, images: Images | None) -> dict[str, Any]:
    """Write and print what the report says; its facts: header and rates as in summary.json, and the page."""
    log = Path(sources.log) if sources is not None and sources.log is not None else None
    page = write_report(
        report,
        out,
        images=images,
        log=log if log is not None and log.exists() else None,
        curve=sources.curve if sources is not None else None,
        constants=Constants.load(out.parent / LIPSCHITZ_FOLDER, report.header),
    )
    print(summary_lines(report))
    print(f"report: {page}")
    return {"report": str(page), "header": report.header, **report.summary().facts()}


def summary_lines(report: Report) -> str:
    summary = report.summary()
    lines = []
    for name in reversed(report.measured()):
        rate: Rate = getattr(summary.rates, name)
        low, high = rate.interval
        lines.append(
            f"{name.replace('_', ' '):>12}: {100 * rate.fraction:6.2f} %   ({rate.count} of {rate.total}; "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f})"
        )
    undecided = report.undecided() if report.verified else []
    bounds = [row.margin_lb for row in undecided if row.margin_lb is not None]
    if undecided:
        nearest = f"; the bound nearest to zero is {bounds[0]:.3g} (example {undecided[0].index})" if bounds else ""
        lines.append(f"{'unknown':>12}: {len(undecided)} of {len(report.rows)}{nearest}")
    return "\n".join(lines)
