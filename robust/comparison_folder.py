"""Runs evaluated side by side, and everything that is made of it, in one folder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attacks.attack import ATTACKS
from robust import plots
from robust.checkpoint import Checkpoint, load, named_network
from robust.comparison import Judged, Line, Weights, as_csv, cells, compare
from robust.comparison_page import comparison_page
from robust.dataset import parse_dataset
from robust.evaluate import evaluate
from robust.files import encode, read_json_lines, write_whole
from robust.own_model import OwnModelError, own_among, own_network
from robust.page import Picture
from robust.report_folder import write_report
from robust.run_setup import CHECKPOINT, LAST, LOG, TrainingError

RobustCurve = list[tuple[float, float]]
"""(epoch, robust accuracy on the validation images)."""


def compare_runs(runs: Sequence[Path], attacks: Sequence[str], out: Path, **options: Any) -> list[Line]:
    """Attack best and last weights of finished runs, and write reports, tables, pictures and comparison.html to `out`.

    An evaluation that was interrupted goes on where it stopped.

    Args:
        runs: folders; the first is what fairness is measured against.
        attacks: their texts.
        options: `root` of the data sets; `models`, the user's own networks FILE.py:NAME, each for the runs that were
            trained as it; and `limit`, `batch_size`, `device`, `progress` of `robust.evaluate.evaluate`.

    Raises:
        TrainingError: a folder without a finished run, or the same folder twice.
        OwnModelError: a network of `models` that is none of the runs', or cannot be used.
        CheckpointError: a run of the user's own network that is not among `models`.
    """
    names = _names(runs)
    root, models = options.pop("root", None), options.pop("models", ())
    judged = []
    for name, weights, checkpoint in _loaded(names, runs, models):
        data = parse_dataset(checkpoint.settings["data"])(root)
        for number, text in enumerate(attacks):
            attack = ATTACKS.parse(text)
            folder = out / f"{name}_{weights}_{number}_{text.partition(':')[0]}"
            report = evaluate(checkpoint, data, checkpoint.ball, None, attack, out=folder, **options)
            write_report(report, folder, images=data.test)
            judged.append(Judged(name, weights, text, report))
    lines = compare(judged)
    curves = {name: robust_curve(read_json_lines(run / LOG)) for name, run in zip(names, runs, strict=True)}
    write_comparison(lines, {name: curve for name, curve in curves.items() if curve}, out)
    return lines


def write_comparison(lines: Sequence[Line], curves: Mapping[str, RobustCurve], out: Path) -> Path:
    """Write comparison.json, comparison.csv, PNG pictures and comparison.html to `out`; return the path of the page."""
    facts = {"lines": [dataclasses.asdict(line) for line in lines]}
    write_whole(out / "comparison.json", json.dumps(json.loads(encode(facts)), indent=2, ensure_ascii=False) + "\n")
    write_whole(out / "comparison.csv", as_csv(lines))
    drawings: list[tuple[str, str, str, Callable[[plots.Theme], Figure]]] = []
    for number, attack in enumerate(dict.fromkeys(line.attack for line in lines)):
        some = [line for line in lines if line.attack == attack]
        text = f"Each bar holds the next: clean accuracy, accuracy under {attack}, and that of the worst class."
        drawings.append((f"accuracies_{number}", f"Under {attack}", text, functools.partial(accuracies, some)))
    if curves:
        text = (
            "Accuracy under the validator's attack on held-out images; the dot is the best epoch, what falls behind it "
        )
        text += "is robust overfitting."
        drawings.append(("overfitting", "Robust overfitting", text, functools.partial(overfitting, curves)))
    pictures = []
    for name, title, text, draw in drawings:
        plots.save(draw(plots.LIGHT), out / f"{name}.png")
        pictures.append(Picture(title, text, plots.svg(draw(plots.LIGHT)), plots.svg(draw(plots.DARK))))
    page = out / "comparison.html"
    write_whole(page, comparison_page([cells(line) for line in lines], pictures))
    return page


def robust_curve(records: Sequence[Mapping[str, Any]]) -> RobustCurve:
    """Robust validation accuracies, as fractions, in a trainer's log; empty where the validator was no attack."""
    name = "validation/under_attack"
    return [(record["epoch"], record[name] / 100) for record in records if name in record]


def accuracies(lines: Sequence[Line], theme: plots.Theme = plots.LIGHT) -> Figure:
    """Clean, robust and worst-class robust accuracy of each line, one inside the other."""
    figure, (axes,) = plots.empty_figure(theme, plots.WIDTH, 1.1 + 0.34 * max(len(lines), 2))
    levels = (
        ("clean", "clean", [line.clean for line in lines], 0.78),
        ("under attack", "under_attack", [line.robust for line in lines], 0.5),
        ("worst class", "falsified", [line.robust_worst for line in lines], 0.22),
    )
    for word, colour, values, height in levels:
        axes.barh(range(len(lines)), values, height, color=getattr(theme, colour), label=word)
    axes.set_yticks(range(len(lines)), [f"{plots.shorten(line.run, 18)}, {line.weights}" for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    plots.percent_axis(axes.xaxis)
    axes.grid(visible=False, axis="y")
    plots.legend_above(axes, theme, columns=3)
    return figure


def overfitting(curves: Mapping[str, RobustCurve], theme: plots.Theme = plots.LIGHT) -> Figure:
    """Robust validation accuracy of each run against the epoch, its best epoch marked."""
    figure, (axes,) = plots.empty_figure(theme, plots.WIDTH, 3.5)
    for number, (name, curve) in enumerate(curves.items()):
        _curve(axes, name, curve, number, theme)
    plots.percent_axis(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("robust validation accuracy")
    plots.epoch_axis(axes)
    plots.legend_above(axes, theme, columns=2)
    return figure


def _curve(axes: Axes, name: str, curve: RobustCurve, number: int, theme: plots.Theme) -> None:
    colour, style = plots.line_look(name, number, theme)
    axes.plot(*zip(*curve, strict=True), style, color=colour, linewidth=1.9, label=name)
    epoch, best = max(curve, key=lambda point: point[1])
    axes.plot([epoch], [best], "o", color=colour, markersize=6)


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names; their whole paths where two have the same name."""
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise TrainingError("the same run is given twice")
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else ["_".join(path.parts[1:]) for path in paths]


def _loaded(names: Sequence[str], runs: Sequence[Path], models: Sequence[str]) -> list[tuple[str, Weights, Checkpoint]]:
    """The checkpoints of every run, all of them before the first is judged: a mistake is told at once."""
    paths = [
        (name, weights, path)
        for name, run in zip(names, runs, strict=True)
        for weights, path in _checkpoints(run).items()
    ]
    trained = [named_network(path) for _, _, path in paths]
    own = [own_among(text, models) for text in trained]
    for text in models:
        if text not in own:
            known = ", ".join(dict.fromkeys(trained))
            raise OwnModelError(f"--model {text}: no run was trained as that network; the runs are of {known}")
    return [
        (name, weights, load(path, None if text is None else own_network(text)))
        for (name, weights, path), text in zip(paths, own, strict=True)
    ]


def _checkpoints(run: Path) -> dict[Weights, Path]:
    """Checkpoints of a run: best and last where the best was selected, else the last alone."""
    kept, last = run / CHECKPOINT, run / LAST
    if not kept.exists():
        raise TrainingError(
            f"{run}: holds no finished run ({CHECKPOINT} is missing); give the --out of a `robust train`"
        )
    return {"best": kept, "last": last} if last.exists() else {"last": kept}
