"""Sweeps: many runs of one recipe, to see how clean accuracy is paid for with certified accuracy.

A trial is a training run with some settings changed, judged by its validator on held-out training images; test images
take no part. Optuna (Akiba et al. 2019) proposes the changes, for both accuracies at once. The folder of a sweep holds
`trials.jsonl`, what was asked for in its first line and then a line where a trial begins and where it ends, and the
trials' runs. A sweep that was killed goes on with the trial that was under way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from attacks.registry import number
from robust.files import JsonLines, read_json_lines
from robust.method_texts import value_at, with_field
from robust.own_model import code_hash
from robust.run_setup import CODE, LOG, TrainingError, check_texts
from robust.settings import Settings
from robust.trainer import train
from robust.validation import decisive

TRIALS = "trials.jsonl"
VALIDATION = 0.1
"""Share of the training images that is held out where the recipe holds out none."""


class SweepError(ValueError):
    """A sweep that cannot start or go on; one line."""


@dataclass(frozen=True)
class Range:
    """Values that a setting or a method's field may take.

    Attributes:
        path: such as `epochs` or `objective.ibp_weight`.
        low, high: ends of an interval; `log` for equal ratios, `whole` for whole numbers.
        choices: texts, in place of an interval.
    """

    path: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        values: texts by path. clean, robust: accuracies on the validation images in percent, None where it failed.
        failure: why there are none.
    """

    number: int
    values: dict[str, str]
    clean: float | None
    robust: float | None
    seconds: float
    failure: str = ""


def parse_range(text: str, settings: Settings) -> Range:
    """Range from `PATH=LOW..HIGH`, `PATH=log:LOW..HIGH` or `PATH=A|B|C`.

    Raises:
        SweepError: the text is none of these. SettingsError: the settings have no such field, or not these values.
    """
    path, equals, values = (part.strip() for part in text.partition("="))
    log, ends = values.startswith("log:"), values.removeprefix("log:").split("..")
    if not equals or not path or not values or ("|" not in values and len(ends) != 2):
        raise SweepError(f"--over {text}: expected PATH=LOW..HIGH, PATH=log:LOW..HIGH or PATH=A|B|C")
    if "|" in values:
        choices = tuple(choice.strip() for choice in values.split("|"))
        for choice in choices:
            check_texts(with_field(settings, path, choice))
        return Range(path, choices=choices)
    for end in ends:
        check_texts(with_field(settings, path, end))
    low, high = map(number, ends)
    if not low < high or (log and low <= 0):
        raise SweepError(f"--over {text}: expected a lower end below the upper one{', above 0' if log else ''}")
    value = value_at(settings, path)
    return Range(path, low, high, log, whole=isinstance(value, int) and not isinstance(value, bool))


def with_validation(settings: Settings) -> Settings:
    """The settings with images held out, which alone may choose between trials."""
    return settings if settings.validation else dataclasses.replace(settings, validation=VALIDATION)


def sweep(
    settings: Settings,
    ranges: Sequence[Range],
    trials: int,
    out: Path,
    *,
    device: str = "cpu",
    root: Path | None = None,
    progress: bool = True,
    each: Callable[[list[Trial]], None] = lambda trials: None,
) -> list[Trial]:
    """Train until `trials` trials are finished, those of earlier calls included; all of them.

    Args:
        each: called with the trials so far behind every trial.

    Raises:
        SweepError: Optuna is not installed, no or double ranges, or another sweep in `out`.
        FileInUse: another process sweeps in `out`.
    """
    optuna = _optuna()
    settings = with_validation(settings)
    paths = [one.path for one in ranges]
    if not paths or len(set(paths)) < len(paths):
        raise SweepError("a sweep needs --over, and every path once")
    asked: dict[str, Any] = {"settings": settings.to_dict(), "over": [dataclasses.asdict(one) for one in ranges]}
    if (code := code_hash(settings.model)) is not None:
        asked[CODE] = code
    with JsonLines(out / TRIALS) as journal:
        _begin(journal, asked, out)
        finished, pending = _read(journal)
        each(finished)
        while len(finished) < trials:
            index, values = pending or (len(finished), _proposed(optuna, ranges, finished, settings.seed))
            if pending is None:
                journal.append([{"begun": index, "values": values}])
            trial = _run(index, values, settings, out, device, root, progress)
            journal.append([{"finished": dataclasses.asdict(trial)}])
            finished, pending = [*finished, trial], None
            each(finished)
    return finished


def trial_folder(out: Path, index: int) -> Path:
    """Run of a trial."""
    return out / f"trial_{index:04d}"


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise SweepError("robust sweep needs Optuna; pip install 'robust-suite[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _begin(journal: JsonLines, asked: dict[str, Any], out: Path) -> None:
    """Write the sweep's first line, or compare with the one that is there."""
    if not journal.records:
        journal.append([{"sweep": asked}])
    there = journal.records[0].get("sweep")
    # Compared as JSON has it, where a tuple of choices is a list.
    now = {**asked, "over": [{**one, "choices": list(one["choices"])} for one in asked["over"]]}
    if there and CODE not in there:
        now.pop(CODE, None)  # a sweep of an earlier version
    if there != now:
        words = {"over": "--over", "settings": "settings", CODE: "code of the network"}
        differing = next(word for name, word in words.items() if not there or there.get(name) != now.get(name))
        raise SweepError(f"{out} holds a sweep with other {differing}; choose another --out")


def _read(journal: JsonLines) -> tuple[list[Trial], tuple[int, dict[str, str]] | None]:
    """Finished trials, and number and values of the one that was begun and did not finish."""
    finished = [Trial(**record["finished"]) for record in journal.records if "finished" in record]
    begun = [(record["begun"], record["values"]) for record in journal.records if "begun" in record]
    return finished, begun[-1] if len(begun) > len(finished) else None


def _proposed(optuna: ModuleType, ranges: Sequence[Range], finished: Sequence[Trial], seed: int) -> dict[str, str]:
    """Values of the next trial: what the finished ones suggest, reproducible from the seed and their number."""
    distributions = {one.path: _distribution(optuna, one) for one in ranges}
    sampler = optuna.samplers.TPESampler(seed=seed + len(finished))
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    for trial in finished:
        failed = trial.clean is None
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                params={one.path: _typed(one, trial.values[one.path]) for one in ranges},
                distributions=distributions,
                values=None if failed else [trial.clean, trial.robust],
            )
        )
    proposed = study.ask(distributions).params
    return {path: value if isinstance(value, str) else repr(value) for path, value in proposed.items()}


def _distribution(optuna: ModuleType, one: Range) -> Any:
    if one.choices:
        return optuna.distributions.CategoricalDistribution(one.choices)
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _typed(one: Range, text: str) -> Any:
    return text if one.choices else int(text) if one.whole else float(text)


def _run(
    index: int,
    values: dict[str, str],
    settings: Settings,
    out: Path,
    device: str,
    root: Path | None,
    progress: bool,
) -> Trial:
    """Train one trial, or go on with it."""
    folder = trial_folder(out, index)
    for path, text in values.items():
        settings = with_field(settings, path, text)
    try:
        checkpoint = train(settings, folder, device=device, root=root, progress=progress)
    except TrainingError as error:
        return Trial(index, values, None, None, 0.0, str(error))
    metrics = {name.removeprefix("validation/"): value for name, value in checkpoint.metrics.items()}
    seconds = math.fsum(record["seconds"] for record in read_json_lines(folder / LOG))
    return Trial(index, values, metrics["clean"], decisive(metrics), seconds)
