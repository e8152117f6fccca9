"""The command line: `robust train | certify | attack | report | methods | recipes`.

Entry points stay thin: they read settings, call the library and print where the results are. Flags are run-level only;
a method's hyper-parameters are fields of its text, such as `--objective mtl_ibp:ibp_weight=0.01`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attacks.attack import ATTACKS
from attacks.registry import Registry, number
from attacks.threat import Ball, make_ball
from certify.verifier import VERIFIERS
from robust.checkpoint import Checkpoint, CheckpointError, load, load_state_dict_file
from robust.dataset import DATASETS, DataSet, MissingData, parse_dataset
from robust.eps_curve import eps_curve
from robust.evaluate import evaluate
from robust.files import FileInUse
from robust.hook import HOOKS
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.optimizer import OPTIMIZERS
from robust.regularizer import REGULARIZERS
from robust.report import Report
from robust.report_folder import write_report
from robust.schedule import SCHEDULES
from robust.settings import Recipe, Settings, load_recipe, recipe_names
from robust.trainer import LOG, TrainingError, train

KINDS: dict[str, Registry] = {
    "models": MODELS,
    "data": DATASETS,
    "objectives": OBJECTIVES,
    "attacks": ATTACKS,
    "verifiers": VERIFIERS,
    "regularizers": REGULARIZERS,
    "hooks": HOOKS,
    "schedules": SCHEDULES,
    "optimizers": OPTIMIZERS,
}
USER_ERRORS = (ValueError, MissingData, TrainingError, FileInUse)
"""Errors whose message is meant for the user: one line, without the traceback that --debug shows."""

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CURVE_IMAGES = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 for success, 2 for a mistake in what was asked for, 130 for an interruption."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except USER_ERRORS as error:
        if options.debug:
            raise
        print(f"robust: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("robust: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robust", description="Train, attack and certify robust image classifiers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(_command(commands, "train", _train, "train a model, or go on with a run that was killed"))
    certify = _command(commands, "certify", _certify, "certified accuracy of a checkpoint, as a report")
    _add_evaluation(certify)
    certify.add_argument("--verifier", default="cascade", help="verifier and its fields (default: cascade)")
    attack = _command(commands, "attack", _attack, "accuracy of a checkpoint under an attack, as a report")
    _add_evaluation(attack)
    attack.add_argument("--attack", default="apgd", help="attack and its fields (default: apgd)")
    report = _command(commands, "report", _report, "draw the report of a finished or running evaluation again")
    report.add_argument("folder", type=Path, help="folder with rows.jsonl")
    methods = _command(commands, "methods", _methods, "list methods and their fields")
    methods.add_argument("kind", nargs="?", choices=list(KINDS), help="only this kind")
    recipes = _command(commands, "recipes", _recipes, "list recipes with their published results")
    recipes.add_argument("name", nargs="?", help="show one recipe's settings")
    return parser


def _command(commands: Any, name: str, run: Any, words: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="recipe to start from (`robust recipes`), or a TOML file")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE or runs/DATA_OBJECTIVE)")
    _add_machine(parser)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    group = parser.add_argument_group("settings, each of which overrides the recipe's")
    words = _field_words(Settings)
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        many = hints[field.name] == tuple[str, ...]
        default = "none" if field.default == () else field.default
        words_here = f"{words[field.name]} (default: {default})".replace("%", "%%")
        group.add_argument(*names, nargs="*" if many else None, metavar="TEXT", help=words_here)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or with --model a plain state dict")
    parser.add_argument("--data", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which images (default: test)")
    parser.add_argument("--eps", help="radius in pixel units, such as 8/255 (default: the checkpoint's)")
    parser.add_argument("--norm", help="linf, l2 or l1 (default: the checkpoint's)")
    parser.add_argument("--model", help="architecture of a plain state dict, loaded weights-only")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument(
        "--batch-size", type=int, default=100, help="images decided and written together (default: 100)"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: beside the checkpoint)")
    parser.add_argument("--no-curve", action="store_true", help="leave out certified accuracy over growing radii")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $ROBUST_DATA, else ./data)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _train(options: argparse.Namespace) -> None:
    settings = load_recipe(options.recipe).settings if options.recipe else Settings()
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    changes = {name: _typed(name, value) for name, value in given.items() if value is not None}
    settings = Settings.from_dict({**settings.to_dict(), **changes})
    name = options.recipe or f"{settings.data}_{settings.objective}".split(":")[0].replace("/", "_")
    out = options.out or Path("runs") / Path(name).stem
    checkpoint = train(
        settings,
        out,
        device=options.device,
        root=options.root,
        progress=not options.quiet,
        tensorboard=options.tensorboard,
    )
    for metric, value in checkpoint.metrics.items():
        print(f"{metric}: {value:.2f} %")
    print(f"checkpoint: {out / 'checkpoint.safetensors'}")


def _certify(options: argparse.Namespace) -> None:
    _judge(options, VERIFIERS.parse(options.verifier), None)


def _attack(options: argparse.Namespace) -> None:
    _judge(options, None, ATTACKS.parse(options.attack))


def _judge(options: argparse.Namespace, verifier: Any, attack: Any) -> None:
    checkpoint, data, ball = _problem(options)
    kind = "certify" if verifier is not None else "attack"
    out = options.out or options.checkpoint.parent / kind
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
        device=options.device,
        progress=not options.quiet,
    )
    images = data.test if options.split == "test" else data.train
    curve = None
    if not options.no_curve:
        count = min(CURVE_IMAGES, options.limit or CURVE_IMAGES, len(images))
        x, y = images.batch(torch.arange(count), options.device)
        cheap = VERIFIERS.parse("crown_ibp") if verifier is not None else None
        curve = eps_curve(checkpoint.model, x, y, ball, CURVE_FACTORS, cheap, attack)
    log = options.checkpoint.parent / LOG
    page = write_report(report, out, images=images, log=log if log.exists() else None, curve=curve)
    print(_summary_lines(report))
    print(f"report: {page}")


def _problem(options: argparse.Namespace) -> tuple[Checkpoint, DataSet, Ball]:
    """Checkpoint, data and threat model that an evaluation command names."""
    if options.model is None:
        checkpoint = load(options.checkpoint)
        data = parse_dataset(options.data or checkpoint.settings["data"])(options.root)
        norm, eps = options.norm or checkpoint.ball.norm, options.eps
        ball = make_ball(norm, checkpoint.ball.eps if eps is None else number(eps))
        return checkpoint, data, ball
    missing = [flag for flag in ("data", "eps") if getattr(options, flag) is None]
    if missing:
        raise CheckpointError(f"{options.checkpoint}: a plain state dict also needs --{' and --'.join(missing)}")
    data = parse_dataset(options.data)(options.root)
    model = MODELS.parse(options.model)(data.input_shape, len(data.classes), data.mean, data.std)
    load_state_dict_file(options.checkpoint, model)
    ball = make_ball(options.norm or "linf", number(options.eps))
    facts = {"model": options.model, "data": options.data, "input_shape": list(data.input_shape)}
    facts.update(classes=len(data.classes), mean=list(data.mean), std=list(data.std))
    return Checkpoint(model.eval(), facts, ball), data, ball


def _report(options: argparse.Namespace) -> None:
    report = Report.load(options.folder)
    page = write_report(report, options.folder)
    print(_summary_lines(report))
    print(f"report: {page}")


def _summary_lines(report: Report) -> str:
    summary = report.summary()
    lines = []
    for name, rate in (
        ("clean", summary.rates.clean),
        ("under attack", summary.rates.under_attack),
        ("certified", summary.rates.certified),
    ):
        low, high = rate.interval
        lines.append(
            f"{name:>12}: {100 * rate.fraction:6.2f} %   ({rate.count} of {rate.total}; "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f})"
        )
    return "\n".join(lines)


def _methods(options: argparse.Namespace) -> None:
    for kind, registry in KINDS.items():
        if options.kind in (None, kind):
            print(f"{kind}:")
            for name in registry.names():
                entry = registry[name]
                first = (inspect.getdoc(entry) or "").split("\n\n")[0].replace("\n", " ")
                print(textwrap.fill(f"{name}  {first}", 110, initial_indent="  ", subsequent_indent="      "))
                fields = [_field_text(registry, entry, field) for field in dataclasses.fields(entry) if field.init]
                if fields:
                    print(
                        textwrap.fill(
                            "fields: " + ", ".join(fields), 110, initial_indent="      ", subsequent_indent="        "
                        )
                    )


def _field_text(registry: Registry, entry: Any, field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"{field.name} (required)"
    nested = field.metadata.get("registry")
    if nested is not None and field.default is not None:
        return f"{field.name}=({nested.spell(field.default)})"
    return f"{field.name}={'none' if field.default is None else field.default}"


def _recipes(options: argparse.Namespace) -> None:
    if options.name is not None:
        recipe = load_recipe(options.name)
        print(recipe.title)
        for name, value in recipe.settings.to_dict().items():
            print(f"  {name} = {value!r}")
        if recipe.note:
            print(textwrap.fill(recipe.note, 110, initial_indent="  note: ", subsequent_indent="        "))
        print(f"  published: {_published(recipe)}")
        return
    for name in recipe_names():
        recipe = load_recipe(name)
        print(f"{name:<44} {_published(recipe)}")


def _published(recipe: Recipe) -> str:
    row = recipe.published
    if row is None:
        return "-"
    numbers = [f"{kind} {value}" for kind, value in (("clean", row.clean), ("certified", row.certified)) if value]
    return f"{', '.join(numbers) or 'no figure'}   [{row.source}]"


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
