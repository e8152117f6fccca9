"""`robust train`: a checkpoint from a recipe and settings."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from robust.checkpoint import Checkpoint
from robust.dataset import parse_dataset
from robust.dry_run import dry_train
from robust.flags import add_dry_run, add_json, add_machine, output, own_device, usable_device
from robust.hook import HOOKS
from robust.hooks.fedavg import FedAvg
from robust.model import names_file
from robust.run_setup import CHECKPOINT, STATE, TrainingError, check_texts, refuse_other_settings
from robust.schedule import SCHEDULES
from robust.settings import Settings, load_recipe
from robust.team import Team, lost_another
from robust.trainer import train

WORDS = "train a model, or go on with a run that was interrupted"
EXAMPLES = """examples:
  robust train --recipe digits_mtl_ibp
  robust train --recipe cifar10_2_255_mtl_ibp_expr --epochs 40 --out runs/short
  robust train --data npz:images.npz --model cnn7:width=32 --objective mtl_ibp:ibp_weight=0.01 --eps 2/255

  torchrun --nproc-per-node 2 -m robust train --recipe digits_sabr     two processes or GPUs share every mini-batch

A run that was interrupted or killed goes on when the same command is given again."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="recipe to start from (`robust recipes`), or a TOML file")
    parser.add_argument("--out", type=output, help="folder of the run (default: runs/RECIPE or runs/DATA_OBJECTIVE)")
    add_machine(parser)
    add_dry_run(parser)
    add_json(parser)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events to the run's folder")
    group = parser.add_argument_group(
        "settings, each of which overrides the recipe's (`robust methods` lists what a method's text may be)"
    )
    words = _field_words(Settings)
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        many = hints[field.name] == tuple[str, ...]
        default = "none" if field.default == () else field.default
        words_here = f"{words[field.name].removesuffix('.')} (default: {default})".replace("%", "%%")
        group.add_argument(*names, nargs="*" if many else None, metavar=_metavar(hints[field.name]), help=words_here)


def _metavar(hint: Any) -> str:
    if hint is bool:
        return "true|false"
    if hint in (int, float):
        return "N" if hint is int else "X"
    return "|".join(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else "TEXT"


def _field_words(settings: type) -> dict[str, str]:
    """The text literal that follows each field in the class body: its help."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(definition, ast.ClassDef)
    words = {}
    for field, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(following, ast.Expr):
            assert isinstance(following.value, ast.Constant)
            words[field.target.id] = " ".join(str(following.value.value).split())
    return words


def run(options: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(options.recipe).settings.to_dict() if options.recipe else {}
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    changes = {name: _typed(name, value) for name, value in given.items() if value is not None}
    settings = Settings.from_dict({**recipe, **changes})
    check_texts(settings)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = usable_device(own_device(options.device, joins))
    out = options.out or Path("runs") / _run_name(settings, options.recipe)
    # Clients that average their weights are runs of their own, not one.
    clients = any(isinstance(HOOKS.parse(text), FedAvg) for text in settings.hooks)
    team = None if clients else Team.join(device)
    leads = team is None or team.leads
    if options.dry_run:
        refuse_other_settings(settings, out)
        _note_short_run(settings)
        return dry_train(settings, out, options.root, device) if leads else {}
    try:
        if leads:
            refuse_other_settings(settings, out)
            _announce(settings, out)
        checkpoint = train(
            settings,
            out,
            device=device,
            root=options.root,
            progress=not options.quiet,
            tensorboard=options.tensorboard,
            team=team,
        )
        if team is not None:
            team.leave()
    except TrainingError:
        if leads:
            raise
        raise SystemExit(2) from None  # every process has come to it; the first one says it
    except RuntimeError as error:
        if team is None or not lost_another(error):
            raise
        if not leads:
            raise SystemExit(2) from None
        raise TrainingError("another process of this run is gone; the same command goes on where it stopped") from error
    return _conclude(settings, out, checkpoint) if leads else {}


def _announce(settings: Settings, out: Path) -> None:
    _note_short_run(settings)
    if (out / CHECKPOINT).exists():
        print(f"the run in {out} is finished; give --out another folder to train again")
    elif (out / STATE).exists():
        print(f"going on with the run in {out}")


def _conclude(settings: Settings, out: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.metrics:
        rates = [f"{value:.2f} % {name.removeprefix('validation/')}" for name, value in checkpoint.metrics.items()]
        print(f"validation: {', '.join(rates)} ({settings.validator})")
    print(f"checkpoint: {out / CHECKPOINT}")
    command = "attack" if "validation/under_attack" in checkpoint.metrics else "certify"
    own = f" --model {settings.model}" if names_file(settings.model) else ""
    print(f"next: robust {command} {out / CHECKPOINT}{own}")
    return {"checkpoint": str(out / CHECKPOINT), "metrics": checkpoint.metrics, "settings": settings.to_dict()}


def _run_name(settings: Settings, recipe: str | None) -> str:
    """Folder of a run below runs/: the recipe's name, or data and objective, with a file's or folder's own name."""
    if recipe is not None:
        return Path(recipe).stem if recipe.endswith(".toml") else recipe
    data = settings.data.partition(":")[0]
    path = getattr(parse_dataset(settings.data), "path", None)
    objective = settings.objective.partition(":")[0]
    return "_".join([data, *([Path(path).stem] if path else []), objective])


def _note_short_run(settings: Settings) -> None:
    end = getattr(SCHEDULES.parse(settings.eps_schedule), "end", 0)
    if end > settings.epochs:
        print(
            f"robust: note: the radius grows until epoch {end:g}, but the run ends at epoch {settings.epochs}, before "
            f"eps={settings.eps:g} is reached; see --eps_schedule",
            file=sys.stderr,
        )


def _typed(name: str, text: Any) -> Any:
    """Value of a setting from the command line's text."""
    hint = typing.get_type_hints(Settings)[name]
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"--{name}: expected a whole number, got {text!r}") from None
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"--{name}: expected true or false, got {text!r}")
        return text == "true"
    return text
