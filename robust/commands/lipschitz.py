"""`robust lipschitz`: local Lipschitz constants around images."""

from __future__ import annotations

import argparse
from typing import Any

from certify.lipschitz.local import METHODS
from robust.evaluate import data_facts, model_facts
from robust.flags import usable_device
from robust.judging import add_evaluation
from robust.lipschitz import LIPSCHITZ_FOLDER, Plan, measure
from robust.problem import images_of, problem

WORDS = "local Lipschitz constants of a checkpoint around its images"
EXAMPLES = """examples:
  robust lipschitz runs/digits_mtl_ibp/checkpoint.safetensors --limit 100
  robust lipschitz model.safetensors --margins --states alpha_crown     with the radius that the constants certify
  robust lipschitz model.safetensors --method bab --timeout 60 --eps 1/255"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_evaluation(parser)
    parser.add_argument("--method", default="crown", choices=list(METHODS), help="how (default: crown)")
    parser.add_argument("--margins", action="store_true", help="of the label's margins, with certified radii")
    parser.add_argument("--states", help="bounds before the activations: interval, crown or alpha_crown")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of branch and bound, per batch")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.timeout is not None and not options.timeout >= 0:
        raise ValueError(f"--timeout {options.timeout:g}: expected seconds, from 0")
    device = usable_device(options.device)
    checkpoint, data, ball = problem(options)
    images = images_of(options, data)
    out = options.out or options.checkpoint.parent / LIPSCHITZ_FOLDER
    chosen = {name: getattr(options, name) for name in ("states", "timeout") if getattr(options, name) is not None}
    plan = Plan(
        options.method, tuple(chosen.items()), options.margins, 0 if options.no_curve else 20, options.batch_size or 100
    )
    source = {**model_facts(checkpoint), **data_facts(data, options.split)}
    summary = measure(
        checkpoint.model.to(device),
        images,
        ball,
        plan,
        out,
        source=source,
        classes=data.classes,
        limit=options.limit,
        device=device,
        progress=not options.quiet,
    )
    for name in ("constant", "attained", "radius"):
        if name in summary:
            print(f"{name:>12}: " + ", ".join(f"{word} {value:.4g}" for word, value in summary[name].items()))
    print(f"rows, summary and pictures of {summary['examples']} examples: {out}")
    return {"folder": str(out), **summary}
