"""Pictures of several runs in one plot each; a run has the same colour and mark in all of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from robust import lipschitz_plots, plots
from robust.judged_run import JudgedRun
from robust.plots import LIGHT, WIDTH, Theme, cycled, empty_figure, epoch_axis, legend_above, percent_axis
from robust.report import Rate

MARKS = "oDs^vPX<>"
MOST_NAME = 26
"""Letters of a run's name in a plot; the tables have it in full."""


def front(runs: Sequence[JudgedRun], rate: str, theme: Theme = LIGHT) -> Figure:
    """Clean accuracy against the rate of this name, with 95 % intervals; a line joins the runs that no other beats."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.6)
    points = [(r.rates.clean, getattr(r.rates, rate)) for r in (run.report.summary() for run in runs)]
    for (clean, other), (run, colour, mark) in zip(points, _looks(runs, theme), strict=True):
        position = ([100 * clean.fraction], [100 * other.fraction])
        axes.errorbar(*position, _arms(other), _arms(clean), color=colour, marker=mark, linestyle="", label=_name(run))
    best = sorted((100 * c.fraction, 100 * o.fraction) for c, o in points if not _beaten((c, o), points))
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=theme.text, linewidth=0.9, linestyle=":", zorder=0.5)
    axes.set_xlabel("clean accuracy (%)")
    axes.set_ylabel(f"{_word(rate)} (%)")
    axes.margins(0.12)
    legend_above(axes, theme, columns=2)
    return figure


def over_eps(runs: Sequence[JudgedRun], theme: Theme = LIGHT) -> Figure:
    """Certified accuracy over the radius, and dashed that under attack, where they were measured."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.6)
    for run, colour, mark in _looks(runs, theme):
        curve = run.sources.curve if run.sources is not None else None
        if curve is None:
            continue
        for values, style in ((curve.certified, "-"), (curve.under_attack, "--")):
            if values:
                name = _name(run) if style == "-" or not curve.certified else None
                axes.plot(
                    curve.eps, values, style, color=colour, marker=mark, markersize=4.5, linewidth=1.9, label=name
                )
    percent_axis(axes.yaxis)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("radius ε (pixel units)")
    axes.set_ylabel("accuracy")
    legend_above(axes, theme, columns=2)
    return figure


def per_class(runs: Sequence[JudgedRun], rate: str, theme: Theme = LIGHT) -> Figure:
    """The rate of each class in every run; where there are many classes, those that are worst in some run."""
    found = [run.report.summary().classes for run in runs]
    least = {label: min(getattr(c[label], rate).fraction for c in found if label in c) for label in set().union(*found)}
    shown = sorted(least, key=lambda label: least[label])[: plots.MOST_CLASSES]
    shown = sorted(shown) if len(shown) == len(least) else shown
    figure, (axes,) = empty_figure(theme, WIDTH, 1.2 + 0.3 * max(len(shown), 2))
    for classes, (run, colour, mark) in zip(found, _looks(runs, theme), strict=True):
        points = [(getattr(classes[k], rate).fraction, i) for i, k in enumerate(shown) if k in classes]
        axes.plot(*zip(*points, strict=True), color=colour, marker=mark, linestyle="", alpha=0.85, label=_name(run))
    names = [plots.shorten(plots.class_name(runs[0].report, label), 18) for label in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    percent_axis(axes.xaxis)
    axes.set_xlabel(f"{_word(rate)} of the class")
    legend_above(axes, theme, columns=2)
    return figure


def training(runs: Sequence[JudgedRun], metric: str, theme: Theme = LIGHT) -> Figure:
    """A validation accuracy, "validation/clean" or another in percent, against the epoch."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.4)
    for run, colour, mark in _looks(runs, theme):
        points = [(record["epoch"], record[metric] / 100) for record in run.log if metric in record]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.9, label=_name(run))
            axes.plot(*points[-1], color=colour, marker=mark, clip_on=False)
    percent_axis(axes.yaxis)
    axes.set_ylim(0, 1)
    axes.set_ylabel(metric.partition("/")[2].replace("_", " "))
    epoch_axis(axes)
    legend_above(axes, theme, columns=2)
    return figure


def constants(runs: Sequence[JudgedRun], theme: Theme = LIGHT) -> Figure:
    """Histograms of the upper bounds of local Lipschitz constants."""
    groups = {_name(run): run.constants.upper for run in runs if run.constants is not None}
    colours = [colour for run, colour, _ in _looks(runs, theme) if run.constants is not None]
    return lipschitz_plots.constants_histogram(groups, theme, colours)


def _word(rate: str) -> str:
    return {"certified": "certified accuracy", "under_attack": "accuracy under attack"}[rate]


def _name(run: JudgedRun) -> str:
    return plots.shorten(run.name, MOST_NAME)


def _looks(runs: Sequence[JudgedRun], theme: Theme) -> list[tuple[JudgedRun, str, str]]:
    """Each run with its colour and its mark."""
    marks = [MARKS[i % len(MARKS)] for i in range(len(runs))]
    return list(zip(runs, cycled(len(runs), theme), marks, strict=True))


def _arms(rate: Rate) -> list[list[float]]:
    """Lengths of an error bar in percent, below and above."""
    low, high = rate.interval
    return [[100 * (rate.fraction - low)], [100 * (high - rate.fraction)]]


def _beaten(one: tuple[Rate, Rate], points: Sequence[tuple[Rate, Rate]]) -> bool:
    """Whether another run is at least as good in both rates and better in one."""
    here = tuple(rate.fraction for rate in one)
    others = [tuple(rate.fraction for rate in point) for point in points]
    return any(o[0] >= here[0] and o[1] >= here[1] and o != here for o in others)
