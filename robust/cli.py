"""The command line: `robust train | certify | attack | masking | report | methods | recipes`.

Entry points stay thin: they read settings, call the library and print where the results are. Flags are run-level only;
a method's hyper-parameters are fields of its text, such as `--objective mtl_ibp:ibp_weight=0.01`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from attacks.attack import ATTACKS
from attacks.registry import number
from attacks.threat import Ball, make_ball
from certify.verifier import VERIFIERS
from robust.allocator import keep_freed_memory
from robust.checkpoint import Checkpoint, CheckpointError, load, load_state_dict_file
from robust.dataset import DataSet, MissingData, data_root, parse_dataset
from robust.eps_curve import EpsCurve, eps_curve
from robust.evaluate import evaluate
from robust.files import FileInUse
from robust.images import Images
from robust.listing import KINDS, print_methods, print_recipes
from robust.masking import MASKING_FILE, check_masking
from robust.model import MODELS
from robust.report import ROWS_FILE, Rate, Report
from robust.report_folder import write_report
from robust.report_sources import SOURCES_FILE, Sources
from robust.run_setup import CHECKPOINT, LOG, STATE, TrainingError, check_texts, refuse_other_settings
from robust.schedule import SCHEDULES
from robust.settings import Settings, load_recipe
from robust.trainer import train

USER_ERRORS = (ValueError, OSError, TrainingError, FileInUse)
"""Errors whose message is meant for the user: one line, without the traceback that --debug shows."""

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CURVE_IMAGES = 200
MASKING_IMAGES = 200


EXAMPLES = {
    "": """examples:
  robust train --recipe digits_mtl_ibp         a certifiably robust classifier in under a minute
  robust certify runs/digits_mtl_ibp/checkpoint.safetensors
  robust methods attacks                       which attacks there are, and their fields""",
    "train": """examples:
  robust train --recipe digits_mtl_ibp
  robust train --recipe cifar10_2_255_mtl_ibp_expr --epochs 40 --out runs/short
  robust train --data npz:images.npz --model cnn7:width=32 --objective mtl_ibp:ibp_weight=0.01 --eps 2/255

A run that was interrupted or killed goes on when the same command is given again.""",
    "certify": """examples:
  robust certify runs/digits_mtl_ibp/checkpoint.safetensors
  robust certify model.safetensors --eps 2/255 --verifier cascade:timeout=20 --limit 1000 --out reports/2_255
  robust certify weights.pt --model cnn7 --data cifar10 --eps 8/255""",
    "attack": """examples:
  robust attack runs/digits_mtl_ibp/checkpoint.safetensors
  robust attack model.safetensors --attack pgd:steps=50,restarts=10 --limit 1000""",
    "masking": """examples:
  robust masking runs/digits_mtl_ibp/checkpoint.safetensors
  robust masking model.safetensors --eps 8/255 --limit 500 --out reports/8_255""",
    "report": """example:
  robust report runs/digits_mtl_ibp/certify""",
    "methods": """examples:
  robust methods
  robust methods verifiers""",
    "recipes": """examples:
  robust recipes
  robust recipes digits_mtl_ibp""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 for success, 2 for a mistake in what was asked for, 130 for an interruption."""
    options = _parse(arguments)
    keep_freed_memory()
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`robust recipes | head`). What is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        if options.debug:
            raise
        print(f"robust: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        if options.debug:
            raise
        flag = "--micro_batch" if options.run is _train else "--batch-size"
        print(f"robust: the GPU's memory is full; give a smaller {flag}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("robust: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            options.parser.error(f"unexpected argument {word!r}")
        near = difflib.get_close_matches(word, options.parser._option_string_actions, n=1)
        options.parser.error(f"no flag {word}{f' (did you mean {near[0]}?)' if near else ''}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="robust",
        description="Train, attack and certify robust image classifiers.",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_train(_command(commands, "train", _train, "train a model, or go on with a run that was interrupted"))
    certify = _command(commands, "certify", _certify, "certified accuracy of a checkpoint, as a report")
    _add_evaluation(certify)
    certify.add_argument("--verifier", default="cascade", help="verifier and its fields (default: cascade)")
    attack = _command(commands, "attack", _attack, "accuracy of a checkpoint under an attack, as a report")
    _add_evaluation(attack)
    attack.add_argument("--attack", default="apgd", help="attack and its fields (default: apgd)")
    masking = _command(commands, "masking", _masking, "signs of masked gradients: whether attacks can be trusted")
    _add_problem(masking)
    masking.add_argument(
        "--out", type=Path, help="folder of a report to add to (default: attack/ beside the checkpoint)"
    )
    _add_machine(masking)
    report = _command(commands, "report", _report, "draw the report of a finished or running evaluation again")
    report.add_argument("folder", type=Path, help="folder with rows.jsonl")
    methods = _command(commands, "methods", _methods, "list methods and their fields")
    methods.add_argument(
        "kind", nargs="?", choices=list(KINDS), help="only this kind: " + ", ".join(KINDS), metavar="KIND"
    )
    recipes = _command(commands, "recipes", _recipes, "list recipes with their published results")
    recipes.add_argument("name", nargs="?", help="show one recipe's settings")
    return parser


def _command(commands: Any, name: str, run: Any, words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help="recipe to start from (`robust recipes`), or a TOML file")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE or runs/DATA_OBJECTIVE)")
    _add_machine(parser)
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


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or with --model a plain state dict")
    parser.add_argument("--data", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which images (default: test)")
    parser.add_argument("--eps", help="radius in pixel units, such as 8/255 (default: the checkpoint's)")
    parser.add_argument("--norm", help="linf, l2 or l1 (default: the checkpoint's)")
    parser.add_argument("--model", help="architecture of a plain state dict, which is loaded without running its code")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N images")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    _add_problem(parser)
    parser.add_argument(
        "--batch-size", type=_count, metavar="N", default=100, help="images decided and written together (default: 100)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report (default: certify/ or attack/ beside the checkpoint)"
    )
    parser.add_argument("--no-curve", action="store_true", help="leave out accuracy over growing radii")
    _add_machine(parser)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1 ... (default here: {default})")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $ROBUST_DATA, else ./data)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _device(text: str) -> str:
    """`text` itself where a tensor can be put there; ValueError names the reason otherwise."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise ValueError(f"--device {text}: not available here ({reason}); use --device cpu") from None
    return text


def _train(options: argparse.Namespace) -> None:
    settings = load_recipe(options.recipe).settings if options.recipe else Settings()
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    changes = {name: _typed(name, value) for name, value in given.items() if value is not None}
    settings = Settings.from_dict({**settings.to_dict(), **changes})
    check_texts(settings)
    device = _device(options.device)
    out = options.out or Path("runs") / _run_name(settings, options.recipe)
    refuse_other_settings(settings, out)
    _note_short_run(settings)
    if (out / CHECKPOINT).exists():
        print(f"the run in {out} is finished; give --out another folder to train again")
    elif (out / STATE).exists():
        print(f"going on with the run in {out}")
    checkpoint = train(
        settings,
        out,
        device=device,
        root=options.root,
        progress=not options.quiet,
        tensorboard=options.tensorboard,
    )
    if checkpoint.metrics:
        rates = [f"{value:.2f} % {name.removeprefix('validation/')}" for name, value in checkpoint.metrics.items()]
        print(f"validation: {', '.join(rates)} ({settings.validator})")
    print(f"checkpoint: {out / CHECKPOINT}")
    print(f"next: robust certify {out / CHECKPOINT}")


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


def _certify(options: argparse.Namespace) -> None:
    _judge(options, VERIFIERS.parse(options.verifier), None)


def _attack(options: argparse.Namespace) -> None:
    _judge(options, None, ATTACKS.parse(options.attack))


def _judge(options: argparse.Namespace, verifier: Any, attack: Any) -> None:
    device = _device(options.device)
    checkpoint, data, ball = _problem(options)
    images = data.test if options.split == "test" else data.train
    if not len(images):
        raise ValueError(f"{data.name} has no images in its part {options.split!r}; choose the other --split")
    out = options.out or options.checkpoint.parent / ("certify" if verifier is not None else "attack")
    sources = _sources(options, checkpoint)
    if not (out / ROWS_FILE).exists() and not (out / SOURCES_FILE).exists():
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
    )
    if not options.no_curve:
        sources = dataclasses.replace(sources, curve=_curve(options, checkpoint, images, ball, verifier, attack))
    sources.save(out)
    _draw(report, out, sources, images)


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
        data=options.data or checkpoint.settings["data"],
        split=options.split,
        root=str(data_root(options.root).resolve()),
        log=str(log) if log.exists() else None,
    )


def _draw(report: Report, out: Path, sources: Sources | None, images: Images | None) -> None:
    log = Path(sources.log) if sources is not None and sources.log is not None else None
    page = write_report(
        report,
        out,
        images=images,
        log=log if log is not None and log.exists() else None,
        curve=sources.curve if sources is not None else None,
    )
    print(_summary_lines(report))
    print(f"report: {page}")


def _problem(options: argparse.Namespace) -> tuple[Checkpoint, DataSet, Ball]:
    """Checkpoint, data and threat model that an evaluation command names."""
    if options.model is None:
        checkpoint = load(options.checkpoint)
        if options.data is None and "data" not in checkpoint.settings:
            raise CheckpointError(f"{options.checkpoint}: does not say which data set it was trained on; give --data")
        data = parse_dataset(options.data or checkpoint.settings["data"])(options.root)
        _refuse_other_images(checkpoint, data)
        return checkpoint, data, _ball(options, checkpoint.ball)
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


def _ball(options: argparse.Namespace, trained: Ball) -> Ball:
    """The checkpoint's threat model, changed by --norm and --eps."""
    norm = options.norm or trained.norm
    if options.eps is not None:
        return make_ball(norm, number(options.eps), trained.pixel_range)
    if norm != trained.norm:
        raise ValueError(
            f"--norm {norm} also needs --eps: the checkpoint's {float(trained.eps):g} is a radius in {trained.norm}"
        )
    return trained


def _refuse_other_images(checkpoint: Checkpoint, data: DataSet) -> None:
    """ValueError where the model was made for images of another size or for fewer classes."""
    settings = checkpoint.settings
    shape, classes = tuple(settings["input_shape"]), settings["classes"]
    if shape != tuple(data.input_shape) or classes < len(data.classes):
        raise ValueError(
            f"the model takes images {'x'.join(map(str, shape))} of {classes} classes, but {data.name} has "
            f"{'x'.join(map(str, data.input_shape))} of {len(data.classes)}; give another --data"
        )


def _masking(options: argparse.Namespace) -> None:
    device = _device(options.device)
    checkpoint, data, ball = _problem(options)
    images = data.test if options.split == "test" else data.train
    count = min(options.limit or MASKING_IMAGES, len(images))
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


def _report(options: argparse.Namespace) -> None:
    report = Report.load(options.folder)
    folder = options.folder.parent if options.folder.is_file() else options.folder
    sources = Sources.load(folder)
    images = None
    if sources is not None:
        try:
            images = sources.images()
        except MissingData as error:
            print(f"robust: note: without pictures of the examples: {error}", file=sys.stderr)
    _draw(report, folder, sources, images)


def _summary_lines(report: Report) -> str:
    summary = report.summary()
    lines = []
    for name in reversed(report.measured()):
        rate: Rate = getattr(summary.rates, name)
        low, high = rate.interval
        lines.append(
            f"{name.replace('_', ' '):>12}: {100 * rate.fraction:6.2f} %   ({rate.count} of {rate.total}; "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f})"
        )
    return "\n".join(lines)


def _methods(options: argparse.Namespace) -> None:
    print_methods(options.kind)


def _recipes(options: argparse.Namespace) -> None:
    print_recipes(options.name)


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
