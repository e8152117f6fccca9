"""Pictures of a report and of a training run, drawn without a display and without global state.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every mark is also told by a word, a line style
or a size. Each function returns a figure; `save`, `png` and `svg` write it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from robust.eps_curve import EpsCurve
from robust.files import write_whole
from robust.report import NO_CLASS, Report, Row, Status

DPI = 150
WIDTH = 4.4
"""Inches of a picture: its letters are legible on a phone, and two stand side by side on a screen."""
MOST_CLASSES = 25


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    background: str
    text: str
    faint: str
    clean: str
    under_attack: str
    certified: str
    unknown: str
    falsified: str
    misclassified: str


LIGHT = Theme("#ffffff", "#1c1c1c", "#d4d4d4", "#9a9a9a", "#e69f00", "#0072b2", "#a3588a", "#d55e00", "#6b6b6b")
DARK = Theme("#16181d", "#e8e8e8", "#3a3d45", "#9a9a9a", "#e69f00", "#56b4e9", "#cc79a7", "#f08040", "#a8a8a8")

LINES = (("clean", "clean", ":"), ("under_attack", "under attack", "--"), ("certified", "certified", "-"))
ACCURACIES = {f"validation/{name}": (name, style) for name, _, style in LINES}
TERM_COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#8c8c8c")
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file with its letters as outlines; the same figure gives the same bytes."""
    content = io.BytesIO()
    # Names inside the file are random without a salt.
    with matplotlib.rc_context({"svg.hashsalt": "robust", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None})
    return content.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()


def thumbnail(image: Tensor) -> bytes:
    """One image [C, H, W] in [0, 1] as a PNG file, a file pixel for each of its pixels."""
    content = io.BytesIO()
    imsave(content, _pixels(image), format="png", cmap="gray", vmin=0, vmax=1)
    return content.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file, whole or not at all."""
    write_whole(path, png(figure))


def over_eps(curve: EpsCurve, eps: float | None = None, theme: Theme = LIGHT) -> Figure:
    """Accuracies against the radius; `eps` marks the radius of the report with a vertical line."""
    figure, (axes,) = empty_figure(theme, WIDTH, 3.5)
    unit, unit_name = _unit(curve)
    x = [unit * value for value in curve.eps]
    levels = {
        "clean": () if curve.clean is None else (curve.clean,) * len(x),
        "under_attack": curve.under_attack,
        "certified": curve.certified,
    }
    for name, _, style in LINES:
        marker = "o" if name != "clean" and len(x) <= 20 else None
        if levels[name]:
            axes.plot(x, levels[name], style, color=getattr(theme, name), linewidth=2.2, marker=marker, markersize=5)
    if eps is not None:
        axes.axvline(unit * eps, color=theme.text, linewidth=0.9, zorder=0.5)
        axes.annotate(
            f"ε = {radius(eps)}",
            (unit * eps, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9.5,
            color=theme.text,
            annotation_clip=False,
        )
    _name_ends(axes, [(levels[name][-1], word) for name, word, _ in LINES if levels[name]], theme)
    percent_axis(axes.yaxis)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"radius ε ({NORMS.get(curve.norm, curve.norm)}, {unit_name})")
    axes.set_ylabel(f"share of {curve.examples} examples")
    return figure


def per_class(report: Report, theme: Theme = LIGHT) -> Figure:
    """Clean, attacked and certified accuracy of each class, one inside the other; the worst where there are many."""
    classes = report.summary().classes
    least = report.measured()[0]
    shown = sorted(classes, key=lambda label: getattr(classes[label], least).fraction)[:MOST_CLASSES]
    shown = sorted(shown) if len(shown) == len(classes) else shown
    figure, (axes,) = empty_figure(theme, WIDTH, 1.1 + 0.34 * max(len(shown), 2))
    position = np.arange(len(shown))
    lines = [line for line in LINES if line[0] in report.measured()]
    for (name, word, _), height in zip(lines, (0.78, 0.5, 0.22), strict=False):
        values = [getattr(classes[label], name).fraction for label in shown]
        axes.barh(position, values, height, color=getattr(theme, name), label=word)
    axes.set_yticks(position, [shorten(class_name(report, label), 18) for label in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    word = {"certified": "least certified", "under_attack": "least robust", "clean": "worst"}[least]
    rest = f"{len(shown)} of {len(classes)} classes, the {word}" if len(shown) < len(classes) else ""
    axes.set_xlabel(f"share of the class{f' ({rest})' if rest else ''}")
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    legend_above(axes, theme, columns=3)
    return figure


def examples(report: Report, rows: Sequence[Row], images: Tensor, theme: Theme = LIGHT, columns: int = 6) -> Figure:
    """Page of images, each with its label, its prediction where that is wrong, its verdict and its margin.

    Args:
        rows: what to show. images: [len(rows), C, H, W] in [0, 1], C 1 or 3.
    """
    columns = max(1, min(columns, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    figure, grid = empty_figure(theme, 1.45 * columns + 0.2, 2.12 * lines + 0.1, lines, columns)
    for axes in grid:
        axes.set_axis_off()
    for axes, row, image in zip(grid, rows, images, strict=False):
        _example(axes, report, row, image, theme)
    return figure


def training_curves(records: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> Figure:
    """Validation accuracies above and loss terms below, against the epoch.

    Args:
        records: objects of the trainer's log. Numbers named "validation/...", in percent, and "loss/..." are drawn
            against the record's number `epoch`; records without one and other numbers are left out.
    """
    panels = {
        "accuracy": {name: [(e, v / 100) for e, v in points] for name, points in _curves(records, "validation/")},
        "loss": dict(_curves(records, "loss/")),
    }
    figure, (above, below) = empty_figure(theme, WIDTH, 5.0, 2, 1, sharex=True)
    for axes, (title, lines) in zip((above, below), panels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            colour, style = line_look(name, number, theme)
            marker = "o" if len(points) == 1 else None
            look: dict[str, Any] = {"linewidth": 1.9, "marker": marker, "clip_on": marker is None}
            axes.plot(*zip(*points, strict=True), style, color=colour, label=_word(name), **look)
        axes.set_ylabel(title)
        if lines:
            legend_above(axes, theme, columns=3)
    percent_axis(above.yaxis)
    above.set_ylim(0, 1)
    epoch_axis(below)
    return figure


def choose_examples(report: Report, count: int = 24) -> list[Row]:
    """Rows for a page of examples: as many of each verdict as there are, by turns, in the report's order."""
    order: tuple[Status, ...] = ("certified", "falsified", "unknown", "misclassified")
    queues = {status: [row for row in report.rows if row.status == status] for status in order}
    chosen: list[Row] = []
    while len(chosen) < count and any(queues.values()):
        for status in order:
            if queues[status] and len(chosen) < count:
                chosen.append(queues[status].pop(0))
    return sorted(chosen, key=lambda row: (order.index(row.status), row.index))


def class_name(report: Report, label: int) -> str:
    """Name of a class as the header has it, else its number; "no class" for NO_CLASS."""
    if label == NO_CLASS:
        return "no class"
    names = report.header.get("classes") or ()
    return str(names[label]) if label < len(names) else str(label)


def radius(eps: float) -> str:
    """A radius as people write it: a short decimal, else in 255ths where it is a multiple of 0.25/255."""
    decimal, numerator = f"{eps:.3g}", eps * 255
    if float(decimal) != eps and abs(4 * numerator - round(4 * numerator)) < 1e-9:
        return f"{round(4 * numerator) / 4:g}/255"
    return decimal


def empty_figure(
    theme: Theme, width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure without marks, and its axes row by row."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=theme.background)
    grid = list(np.atleast_1d(figure.subplots(rows, columns, **options)).flat)
    for axes in grid:
        axes.set_facecolor(theme.background)
        axes.grid(color=theme.faint, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.text, labelsize=9.5, length=3)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=theme.text, fontsize=10.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
    return figure, grid


def legend_above(axes: Axes, theme: Theme, columns: int) -> None:
    """Names of the marks above the plot, where they cost no width and hide nothing."""
    look: dict[str, Any] = {
        "ncols": columns,
        "frameon": False,
        "labelcolor": theme.text,
        "fontsize": 9.5,
        "borderpad": 0.2,
        "handlelength": 1.6,
        "columnspacing": 1.2,
    }
    figure = axes.get_figure()
    if isinstance(figure, Figure) and len(figure.axes) == 1:
        # From the figure's edge, since long names beside the axes leave little width above them.
        figure.legend(loc="outside upper left", **look)
    else:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), **look)


def percent_axis(axis: Any) -> None:
    """Label an axis of fractions in percent."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def epoch_axis(axes: Axes) -> None:
    """Label the horizontal axis of training curves, with whole epochs, also where there is but one."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _unit(curve: EpsCurve) -> tuple[float, str]:
    """Factor and name of the unit for radii: 1/255 where that makes every radius a round number."""
    grey_levels = curve.norm == "linf" and all(value == 0 or radius(value).endswith("/255") for value in curve.eps)
    return (255.0, "in 1/255 of the pixel range") if grey_levels else (1.0, "pixels in [0, 1]")


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str]], theme: Theme) -> None:
    """Write each line's name behind its last point, moved apart where they would overlap."""
    lowest = -1.0
    for value, word in sorted(ends):
        height = max(value, lowest + 0.075)
        axes.annotate(
            word,
            (1.0, height),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=theme.text,
            va="center",
            fontsize=10.5,
            annotation_clip=False,
        )
        lowest = height


def _example(axes: Axes, report: Report, row: Row, image: Tensor, theme: Theme) -> None:
    colour = getattr(theme, row.status)
    axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)
    label, predicted = (shorten(class_name(report, label), 14) for label in (row.label, row.predicted))
    axes.set_title(
        label if row.label == row.predicted else f"{label} → {predicted}", fontsize=9, color=theme.text, pad=4
    )
    axes.set_xlabel(f"{row.status}\n{margin_words(row)}", fontsize=9, color=colour, labelpad=4, linespacing=1.3)


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """[H, W, 3], or [H, W] of a grey image."""
    pixels = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels


def margin_words(row: Row) -> str:
    """The smallest margin that was proved or found for an example, in two or three words."""
    if row.status == "misclassified":
        return f"#{row.index}"
    if row.status == "falsified" and row.attack_margin is not None:
        return f"margin {row.attack_margin:.3g}"
    return "no bound" if row.margin_lb is None else f"margin ≥ {row.margin_lb:.3g}"


def _curves(records: Sequence[Mapping[str, Any]], start: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Name and points (epoch, value) of every number in the log whose name begins with `start`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if (
                name.startswith(start)
                and isinstance(value, int | float)
                and isinstance(record.get("epoch"), int | float)
            ):
                curves.setdefault(name, []).append((record["epoch"], value))
    return list(curves.items())


def line_look(name: str, number: int, theme: Theme) -> tuple[str, str]:
    """Colour and style of a curve: an accuracy looks as in the other pictures, a loss term takes the next colour."""
    if name in ACCURACIES:
        attribute, style = ACCURACIES[name]
        return getattr(theme, attribute), style
    colours, styles = (theme.certified, *TERM_COLOURS), ("-", "--", ":", "-.")
    return colours[number % len(colours)], styles[number // len(colours) % len(styles)]


def _word(name: str) -> str:
    """A curve's name without the part that the axis already says."""
    return shorten(name.partition("/")[2].replace("_", " "), 22)


def shorten(text: str, most: int) -> str:
    """The text, cut where it is longer than `most` letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def cycled(count: int, theme: Theme) -> list[str]:
    """Colours for so many lines or groups; they repeat where there are many."""
    colours = (theme.certified, *TERM_COLOURS)
    return [colours[i % len(colours)] for i in range(count)]
