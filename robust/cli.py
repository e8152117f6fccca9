"""The command line: `robust train | certify | attack | ... | recipes`; `robust --help` lists the commands.

Entry points stay thin: they read settings, call the library and print where the results are. Flags are run-level only;
a method's hyper-parameters are fields of its text, such as `--objective mtl_ibp:ibp_weight=0.01`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import math
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
from certify.formats.vnnlib import Instance
from certify.lipschitz.local import METHODS as LIPSCHITZ
from certify.verifier import VERIFIERS
from robust.allocator import keep_freed_memory
from robust.checkpoint import Checkpoint, CheckpointError, load, load_state_dict_file
from robust.comparison import as_text
from robust.comparison_folder import compare_runs
from robust.crew import Crew, CrewError
from robust.dataset import DataSet, MissingData, data_root, parse_dataset
from robust.eps_curve import EpsCurve, eps_curve
from robust.evaluate import evaluate
from robust.files import FileInUse, write_whole
from robust.images import Images
from robust.lipschitz import Plan, measure
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
from robust.vnncomp import decide, decide_all, result_text

USER_ERRORS = (ValueError, OSError, TrainingError, FileInUse, CrewError)
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
  robust certify weights.pt --model cnn7 --data cifar10 --eps 8/255
  torchrun --nproc-per-node 4 --max-restarts 9 -m robust certify model.safetensors    four processes, one report""",
    "attack": """examples:
  robust attack runs/digits_mtl_ibp/checkpoint.safetensors
  robust attack model.safetensors --attack pgd:steps=50,restarts=10 --limit 1000""",
    "lipschitz": """examples:
  robust lipschitz runs/digits_mtl_ibp/checkpoint.safetensors --limit 100
  robust lipschitz model.safetensors --margins --states alpha_crown     with the radius that the constants certify
  robust lipschitz model.safetensors --method bab --timeout 60 --eps 1/255""",
    "vnnlib": """examples:
  robust vnnlib model.onnx property.vnnlib --timeout 60
  robust vnnlib instances.csv --out results    lines of network,property,seconds, as in VNN-COMP

Prints sat, unsat, timeout or unknown; after sat, a counterexample that onnxruntime confirms without tolerance.""",
    "compare": """examples:
  robust compare runs/trades runs/trades_dafa --attacks pgd:steps=20 apgd_t
  robust compare runs/pgd --limit 1000""",
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
    lipschitz = _command(
        commands, "lipschitz", _lipschitz, "local Lipschitz constants of a checkpoint around its images"
    )
    _add_evaluation(lipschitz)
    lipschitz.add_argument("--method", default="crown", choices=list(LIPSCHITZ), help="how (default: crown)")
    lipschitz.add_argument("--margins", action="store_true", help="of the label's margins, with certified radii")
    lipschitz.add_argument("--states", help="bounds before the activations: interval, crown or alpha_crown")
    lipschitz.add_argument("--timeout", type=float, metavar="SECONDS", help="of branch and bound, per batch")
    vnnlib = _command(commands, "vnnlib", _vnnlib, "answer VNN-LIB properties of ONNX networks")
    vnnlib.add_argument("model", type=Path, help="ONNX file, or a CSV file of instances")
    vnnlib.add_argument("property", type=Path, nargs="?", help="VNN-LIB file")
    vnnlib.add_argument("--timeout", help="seconds for the property (default: no limit); a CSV file has its own")
    vnnlib.add_argument("--out", type=Path, help="result file, or the folder of a CSV file's results")
    compare = _command(commands, "compare", _compare, "attack best and last weights of runs, side by side")
    compare.add_argument("runs", type=Path, nargs="+", help="folders of finished runs; fairness is against the first")
    compare.add_argument(
        "--attacks",
        nargs="+",
        default=["pgd:steps=20", "apgd_t"],
        metavar="ATTACK",
        help="attacks (default: pgd:steps=20 apgd_t)",
    )
    compare.add_argument("--limit", type=_count, metavar="N", help="only the first N test images")
    compare.add_argument(
        "--batch-size", type=_count, metavar="N", default=100, help="images decided and written together (default: 100)"
    )
    compare.add_argument("--out", type=Path, help="folder of the comparison (default: comparison/ in the first run)")
    _add_machine(compare)
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
        "--batch-size", type=_count, metavar="N", help="images decided and written together (default: the verifier's)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: one beside the checkpoint, named after the command)"
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
    recipe = load_recipe(options.recipe).settings.to_dict() if options.recipe else {}
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    changes = {name: _typed(name, value) for name, value in given.items() if value is not None}
    settings = Settings.from_dict({**recipe, **changes})
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
    command = "attack" if "validation/under_attack" in checkpoint.metrics else "certify"
    print(f"next: robust {command} {out / CHECKPOINT}")


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


def _compare(options: argparse.Namespace) -> None:
    out = options.out or options.runs[0] / "comparison"
    for text in options.attacks:
        ATTACKS.parse(text)
    lines = compare_runs(
        options.runs,
        options.attacks,
        out,
        root=options.root,
        limit=options.limit,
        batch_size=options.batch_size,
        device=_device(options.device),
        progress=not options.quiet,
    )
    print(as_text(lines))
    print(f"comparison: {out / 'comparison.html'}")


def _lipschitz(options: argparse.Namespace) -> None:
    device = _device(options.device)
    checkpoint, data, ball = _problem(options)
    images = data.test if options.split == "test" else data.train
    if not len(images):
        raise ValueError(f"{data.name} has no images in its part {options.split!r}; choose the other --split")
    out = options.out or options.checkpoint.parent / "lipschitz"
    chosen = {name: getattr(options, name) for name in ("states", "timeout") if getattr(options, name) is not None}
    plan = Plan(
        options.method, tuple(chosen.items()), options.margins, 0 if options.no_curve else 20, options.batch_size or 100
    )
    source = {"checkpoint": str(options.checkpoint), "data": data.name, "split": options.split}
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


def _judge(options: argparse.Namespace, verifier: Any, attack: Any) -> None:
    crew = Crew.join()
    options.device = device = _device(_own_device(options.device, crew))
    checkpoint, data, ball = _problem(options)
    images = data.test if options.split == "test" else data.train
    if not len(images):
        raise ValueError(f"{data.name} has no images in its part {options.split!r}; choose the other --split")
    out = options.out or options.checkpoint.parent / ("certify" if verifier is not None else "attack")
    leads = crew is None or crew.rank == 0
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
        return
    if not options.no_curve:
        sources = dataclasses.replace(sources, curve=_curve(options, checkpoint, images, ball, verifier, attack))
    sources.save(out)
    _draw(report, out, sources, images)


def _own_device(text: str, crew: Crew | None) -> str:
    """Under torchrun every process of a host takes a GPU of its own where --device names none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if crew is not None and text == "cuda" else text


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


def _vnnlib(options: argparse.Namespace) -> None:
    if options.model.suffix == ".csv":
        if options.property is not None or options.timeout is not None or options.out is None:
            raise ValueError("a CSV file names properties and seconds itself; it needs --out FOLDER, and nothing else")
        decide_all(options.model, options.out)
        return
    if options.property is None:
        raise ValueError(f"which property of {options.model}? Give a .vnnlib file behind it")
    timeout = math.inf if options.timeout is None else number(options.timeout)
    text = result_text(decide(Instance(options.model, options.property, timeout)))
    if options.out is None:
        print(text, end="")
    else:
        write_whole(options.out, text)
        print(text.partition("\n")[0])


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
    undecided = report.undecided() if report.verified else []
    bounds = [row.margin_lb for row in undecided if row.margin_lb is not None]
    if undecided:
        nearest = f"; the bound nearest to zero is {bounds[0]:.3g} (example {undecided[0].index})" if bounds else ""
        lines.append(f"{'unknown':>12}: {len(undecided)} of {len(report.rows)}{nearest}")
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
