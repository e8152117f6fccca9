"""Pictures of local Lipschitz constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from robust.plots import LIGHT, MOST_CLASSES, WIDTH, Theme, cycled, empty_figure, legend_above


def constants_histogram(
    constants: Mapping[str, Sequence[float]], theme: Theme = LIGHT, colours: Sequence[str] | None = None
) -> Figure:
    """Histogram of local Lipschitz constants on a logarithmic axis; one outline for each named group of examples."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.5)
    values = [max(v, 1e-12) for group in constants.values() for v in group]
    edges = np.geomspace(min(values) / 1.02, max(values) * 1.02, 31).tolist()
    for (name, group), colour in zip(constants.items(), colours or cycled(len(constants), theme), strict=True):
        axes.hist([max(v, 1e-12) for v in group], edges, histtype="stepfilled", alpha=0.35, color=colour)
        axes.hist([max(v, 1e-12) for v in group], edges, histtype="step", linewidth=1.8, color=colour, label=name)
    axes.set_xscale("log")
    few_decades = edges[-1] < 100 * edges[0]
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("local Lipschitz constant")
    axes.set_ylabel("examples")
    legend_above(axes, theme, columns=2)
    return figure


def constants_per_class(
    upper: Sequence[float], lower: Sequence[float], labels: Sequence[int], classes: Sequence[str], theme: Theme = LIGHT
) -> Figure:
    """Mean over each class of the upper bounds (bars) and of the attained values (marks)."""
    present = [k for k in range(len(classes)) if k in set(labels)][:MOST_CLASSES]
    figure, (axes,) = empty_figure(theme, max(4.0, 0.5 * len(present) + 2), 3.5)
    means = [
        [float(np.mean([v for v, k in zip(side, labels, strict=True) if k == c])) for c in present]
        for side in (upper, lower)
    ]
    axes.bar(range(len(present)), means[0], color=theme.certified, label="upper bound")
    axes.plot(range(len(present)), means[1], "D", color=theme.under_attack, markersize=5, label="attained")
    axes.set_xticks(range(len(present)), [classes[k] for k in present], rotation=45, ha="right")
    axes.set_ylabel("mean local Lipschitz constant")
    legend_above(axes, theme, columns=2)
    return figure


def constants_over_eps(
    eps: Sequence[float], bounds: Mapping[str, tuple[Sequence[float], Sequence[float]]], theme: Theme = LIGHT
) -> Figure:
    """Mean (upper bound, attained value) against the radius, one pair of lines for each name."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.5)
    for (name, (upper, lower)), colour in zip(bounds.items(), cycled(len(bounds), theme), strict=True):
        axes.plot(eps, upper, "-o", color=colour, linewidth=2, markersize=4, label=f"{name}, upper bound")
        axes.plot(eps, lower, "--", color=colour, linewidth=1.6, label=f"{name}, attained")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_xlim(left=0)
    axes.set_xlabel("radius ε (pixel units)")
    axes.set_ylabel("mean local Lipschitz constant")
    legend_above(axes, theme, columns=2)
    return figure
