"""`robust sweep`: clean against certified accuracy over a method's fields."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from robust.flags import add_json, add_machine, count, output, usable_device
from robust.settings import load_recipe
from robust.sweep import TRIALS, Trial, parse_range, sweep, with_validation
from robust.sweep_front import as_text, front, write_front
from robust.validation import is_attack, parse_validator

WORDS = "train a recipe many times, and draw clean against certified accuracy"
EXAMPLES = """examples:
  robust sweep digits_mtl_ibp --over "objective.ibp_weight=log:1e-3..1"
  robust sweep cifar10_2_255_sabr --over "objective.box_ratio=0.05..0.8" "epochs=40..160" --trials 40 --out runs/front
  robust sweep own.toml --over "objective.kl_weight=1..10" "weight_perturbation=none|awp:gamma=0.005"

Trials are chosen by held-out training images, never by test images. A sweep that was interrupted or killed goes on
when the same command is given again; --trials counts all that are finished."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe to vary (`robust recipes`), or a TOML file")
    parser.add_argument(
        "--over",
        nargs="+",
        required=True,
        metavar="PATH=VALUES",
        help="setting or field of a method, and LOW..HIGH, log:LOW..HIGH or A|B|C",
    )
    parser.add_argument("--trials", type=count, metavar="N", default=20, help="finished trials (default: 20)")
    parser.add_argument("--out", type=output, help="folder of the sweep (default: runs/RECIPE_sweep)")
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(options.recipe)
    settings = with_validation(recipe.settings)
    if settings != recipe.settings:
        print(f"holding out {settings.validation:.0%} of the training images, which the recipe does not")
    out = options.out or Path("runs") / f"{recipe.name}_sweep"
    ranges = [parse_range(text, settings) for text in options.over]
    name = "under attack" if is_attack(parse_validator(settings.validator)) else "certified"

    def each(trials: list[Trial]) -> None:
        write_front(trials, name, out)
        if trials and not options.quiet:
            print(as_text(trials, name))

    trials = sweep(
        settings,
        ranges,
        options.trials,
        out,
        device=usable_device(options.device),
        root=options.root,
        progress=not options.quiet,
        each=each,
    )
    if options.quiet:
        print(as_text(trials, name))
    print(f"front: {out / 'front.png'}, trials.csv and {TRIALS} beside it")
    return {
        "out": str(out),
        "robust": name,
        "front": [trial.number for trial in front(trials)],
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
