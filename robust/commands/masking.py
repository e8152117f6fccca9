"""`robust masking`: whether the attacks on a checkpoint can be trusted."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from robust.flags import add_json, add_machine, output, usable_device
from robust.masking import MASKING_FILE, check_masking
from robust.problem import add_problem, images_of, problem

DEFAULT_LIMIT = 200

WORDS = "signs of masked gradients: whether attacks can be trusted"
GOES_ON = False
EXAMPLES = """examples:
  robust masking runs/digits_mtl_ibp/checkpoint.safetensors
  robust masking model.safetensors --eps 8/255 --limit 500 --out reports/8_255"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_problem(parser)
    parser.add_argument(
        "--out", type=output, help="folder of a report to add to (default: attack/ beside the checkpoint)"
    )
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = usable_device(options.device)
    checkpoint, data, ball = problem(options)
    images = images_of(options, data)
    count = min(options.limit or DEFAULT_LIMIT, len(images))
    x, y = images.batch(torch.arange(count), device)
    record = check_masking(checkpoint.model.to(device), x, y, ball)
    out = options.out or options.checkpoint.parent / "attack"
    out.mkdir(parents=True, exist_ok=True)
    record.save(out)
    for check in record.checks:
        value = "-" if check.value is None else f"{check.value:.3g}"
        print(f"{'FLAG' if check.flagged else 'ok':>5}  {check.name}: {value} (limit {check.limit:.3g})")
        if check.flagged:
            print(f"       {check.words}")
    print(f"flags: {', '.join(record.flags) or 'none'} ({record.examples} examples)")
    print(f"record: {out / MASKING_FILE}; `robust report {out}` shows it beside an evaluation's rows")
    return {"record": str(out / MASKING_FILE), "flags": list(record.flags), **dataclasses.asdict(record)}
