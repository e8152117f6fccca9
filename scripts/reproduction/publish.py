"""A reproduced table as Markdown, CSV and a picture: published next to reproduced."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robust import plots
from robust.files import write_whole
from scripts.reproduction.plan import Job, Plan, duration
from scripts.reproduction.table import METRICS, Figures, Row, Table

WORDS = {
    "clean": "clean",
    "clean_worst": "clean, worst class",
    "adversarial": "under attack",
    "adversarial_worst": "under attack, worst class",
    "certified": "certified",
    "fairness": "fairness",
}
SCALED = (
    "SCALED RUN (scale {scale:g}): fewer images and epochs and narrower networks, to show that the table runs from end "
    "to end. Its accuracies say nothing about the methods, and differences to published figures are left out."
)
STAND_IN = "STAND-IN DATA: some rows ran on resized digits, because their data set is not at hand."


@dataclass(frozen=True)
class Line:
    """A row of the finished table.

    Attributes:
        reproduced: mean over the seeds, by metric; spread: their standard deviation, where there are several.
        comparable: whether a difference to the published figures means anything.
    """

    row: str
    published: dict[str, float]
    reproduced: dict[str, float]
    spread: dict[str, float]
    comparable: bool
    seeds: tuple[int, ...]
    seconds: float
    hardware: str
    data: str
    source: str
    remarks: tuple[str, ...]

    def difference(self, metric: str) -> float | None:
        """Reproduced less published, where both are there and comparable."""
        if not self.comparable or metric not in self.published or metric not in self.reproduced:
            return None
        return self.reproduced[metric] - self.published[metric]


def lines_of(table: Table, plan: Plan, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[Line]:
    """A line for every row of the table, from the records of its finished jobs."""
    found = []
    for row in table.rows:
        jobs = [job for job in plan.jobs if job.row == row.name]
        found.append(_line(row, jobs, [results[job.row, job.seed] for job in jobs if (job.row, job.seed) in results]))
    bases = {line.row: line for line in found}
    return [_with_fairness(line, bases[table.fairness]) for line in found] if table.fairness else found


def _line(row: Row, jobs: Sequence[Job], results: Sequence[Mapping[str, Any]]) -> Line:
    measured = [result["measured"] for result in results]
    values = {metric: [m[metric] for m in measured if metric in m] for metric in METRICS}
    remarks = list(dict.fromkeys(remark for job in jobs for remark in job.remarks))
    remarks += list(dict.fromkeys(result["stored"] for result in results if result["stored"]))
    remarks += list(dict.fromkeys(job.left_out for job in jobs if job.left_out))
    unknown = sum(result["unknown"] for result in results) if any("certified" in m for m in measured) else 0
    if unknown:
        remarks.append(f"undecided: {unknown} of {sum(result['images'] for result in results)} images")
    if not results and not any(job.left_out for job in jobs):
        remarks.append("not run yet")
    return Line(
        row.name,
        {metric: getattr(row.published, metric) for metric in METRICS if getattr(row.published, metric) is not None},
        {metric: statistics.fmean(some) for metric, some in values.items() if some},
        {metric: statistics.stdev(some) for metric, some in values.items() if len(some) > 1},
        all(not job.remarks for job in jobs),
        tuple(result["seed"] for result in results),
        sum(result["training_seconds"] + result["judging_seconds"] for result in results),
        "; ".join(dict.fromkeys(result["hardware"] for result in results)),
        "; ".join(dict.fromkeys(result["data"] for result in results)),
        _source(row.published),
        tuple(remarks),
    )


def _source(figures: Figures) -> str:
    parts = [figures.source]
    parts += [f"attack: {figures.attack}"] if figures.attack and figures.adversarial is not None else []
    parts += [f"share of {figures.images}"] if figures.images else []
    return "; ".join(part for part in parts if part)


def _with_fairness(line: Line, base: Line) -> Line:
    """The line with Lee et al. 2024's rho_rob against the base row: relative changes of worst class and average."""
    for values, of_base in ((line.published, base.published), (line.reproduced, base.reproduced)):
        needed = ("adversarial", "adversarial_worst")
        if line.row != base.row and all(values.get(name) is not None and of_base.get(name) for name in needed):
            values["fairness"] = sum((values[name] - of_base[name]) / of_base[name] for name in needed)
    return line


def write_table(table: Table, plan: Plan, results: Mapping[tuple[str, int], Mapping[str, Any]], out: Path) -> Path:
    """Write table.md, table.csv and table.png to `out`; return the path of the Markdown."""
    lines = lines_of(table, plan, results)
    write_whole(out / "table.csv", as_csv(lines, plan))
    plots.save(picture(table, lines, marks(plan, lines)), out / "table.png")
    write_whole(out / "table.md", as_markdown(table, lines, marks(plan, lines)))
    return out / "table.md"


def marks(plan: Plan, lines: Sequence[Line]) -> list[str]:
    """What everybody who sees a number of a scaled or shortened reproduction has to know."""
    found = [SCALED.format(scale=plan.order.scale)] if plan.order.scale < 1 else []
    if any("STAND-IN" in remark for line in lines for remark in line.remarks):
        found.append(STAND_IN)
    if plan.order.budget:
        found.append(f"BUDGET of {duration(plan.order.budget)}: schedules are shorter than published, as remarked.")
    return found


def as_markdown(table: Table, lines: Sequence[Line], warnings: Sequence[str]) -> str:
    """The table with its sources and remarks as notes."""
    shown = _shown(lines)
    heads = ["row", *(f"{WORDS[m]}, {side}" for m in shown for side in ("published", "reproduced"))]
    heads += ["seeds", "hours", "notes"]
    rows, notes = [], []
    for line in lines:
        numbers = []
        for text in (line.source, *line.remarks):
            if text and text not in notes:
                notes.append(text)
            numbers += [str(notes.index(text) + 1)] if text else []
        cells = [cell for metric in shown for cell in (_published(line, metric), _reproduced(line, metric))]
        hours = f"{line.seconds / 3600:.2g}" if line.seeds else ""
        rows.append([line.row, *cells, " ".join(map(str, line.seeds)), hours, " ".join(numbers)])
    parts = [f"# {table.title}", *(f"**{warning}**" for warning in warnings), *([table.note] if table.note else [])]
    parts.append("Accuracies in percent; behind a reproduced one, in parentheses, its difference to the published one.")
    parts.append("\n".join(_markdown_row(cells) for cells in (heads, ["---"] * len(heads), *rows)))
    parts.append("\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1)))
    hardware = sorted({line.hardware for line in lines if line.hardware})
    parts.append(f"Hardware: {'; '.join(hardware) or 'nothing was run yet'}. Hours are device hours of the rows run.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(lines: Sequence[Line]) -> list[str]:
    """Metrics of which some line has a value; those of single classes only where some have been published."""
    always = ("clean", "adversarial", "certified")
    return [
        metric
        for metric in WORDS
        if any(metric in line.published or (metric in always and metric in line.reproduced) for line in lines)
    ]


def _published(line: Line, metric: str) -> str:
    return f"{line.published[metric]:.2f}" if metric in line.published else ""


def _reproduced(line: Line, metric: str) -> str:
    if metric not in line.reproduced:
        return ""
    spread = f" ± {line.spread[metric]:.2f}" if metric in line.spread else ""
    difference = line.difference(metric)
    return f"{line.reproduced[metric]:.2f}{spread}" + ("" if difference is None else f" ({difference:+.2f})")


def as_csv(lines: Sequence[Line], plan: Plan) -> str:
    """A line for every row and metric that has a value; what has none is empty."""
    names = ("row", "metric", "published", "reproduced", "spread", "difference", "seeds", "hours", "hardware", "data")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "scale", "budget_seconds", "source", "remarks"])
    for line in lines:
        for metric in [m for m in WORDS if m in line.published or m in line.reproduced] or [""]:
            values = (line.published.get(metric), line.reproduced.get(metric), line.spread.get(metric))
            cells = ["" if value is None else f"{value:.4g}" for value in (*values, line.difference(metric))]
            seeds, hours = " ".join(map(str, line.seeds)), f"{line.seconds / 3600:.4f}" if line.seeds else ""
            facts = [seeds, hours, line.hardware, line.data, f"{plan.order.scale:g}", f"{plan.order.budget:g}"]
            writer.writerow([line.row, metric, *cells, *facts, line.source, "; ".join(line.remarks)])
    return text.getvalue()


def picture(table: Table, lines: Sequence[Line], warnings: Sequence[str], theme: plots.Theme = plots.LIGHT) -> Figure:
    """Published (rings) and reproduced (dots) accuracies of every row, a panel for each metric."""
    shown = [metric for metric in _shown(lines) if metric != "fairness"]
    height = 1.6 + 0.27 * len(lines) + 0.25 * len(warnings)
    columns = max(len(shown), 1)
    figure, panels = plots.empty_figure(theme, 3.6 + 2.5 * columns, height, 1, columns, sharey=True)
    for axes, metric in zip(panels, shown, strict=False):
        _panel(axes, lines, metric, theme)
    panels[0].set_yticks(range(len(lines)), [line.row for line in lines], fontsize=8.5)
    panels[0].set_ylim(len(lines) - 0.4, -0.6)
    looks = [("published", theme.certified, "none")]
    looks += [("reproduced", theme.certified, theme.certified)] if any(line.comparable for line in lines) else []
    looks += [("reduced run", theme.unknown, theme.unknown)] if not all(line.comparable for line in lines) else []
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=colour, markerfacecolor=face, label=words)
        for words, colour, face in looks
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, labelcolor=theme.text)
    title = "\n".join([table.title, *(warning.partition(":")[0] for warning in warnings)])
    figure.suptitle(title, color=theme.falsified if warnings else theme.text, fontsize=11)
    return figure


def _panel(axes: Axes, lines: Sequence[Line], metric: str, theme: plots.Theme) -> None:
    on_top: dict[str, Any] = {"clip_on": False, "zorder": 3}  # marks at 0 and 100 % are whole, and before the frame
    for place, line in enumerate(lines):
        published, reproduced = line.published.get(metric), line.reproduced.get(metric)
        # What does not compare is not joined to what was published, and has a colour of its own.
        colour = theme.certified if line.comparable else theme.unknown
        if published is not None and reproduced is not None and line.comparable:
            axes.plot([published, reproduced], [place, place], color=theme.faint, linewidth=1.6, zorder=1)
        if published is not None:
            axes.plot([published], [place], "o", markerfacecolor="none", color=theme.certified, markersize=6, **on_top)
        if reproduced is not None:
            axes.plot([reproduced], [place], "o", color=colour, markersize=6, **on_top)
    axes.set_xlabel(f"{WORDS[metric]}, %")
    values = [figures[metric] for line in lines for figures in (line.published, line.reproduced) if metric in figures]
    # From the ten below all marks on: rows of 96 to 99 % would lie on one another between 0 and 100.
    axes.set_xlim(min(10 * int(min(values, default=0.0) // 10), 90), 100)
