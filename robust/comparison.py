"""Adversarial training judged: runs side by side, best and last weights, average and worst class, every attack."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from robust.report import Report

Weights = Literal["best", "last"]


@dataclass(frozen=True)
class Judged:
    """One evaluation: which weights of which run, and the report of an attack on them."""

    run: str
    weights: Weights
    attack: str
    report: Report


@dataclass(frozen=True)
class Line:
    """What one evaluation came to; accuracies as fractions.

    Attributes:
        weights: best on the validation images, or of the last epoch.
        clean, robust: accuracy over all images; robust is that under the attack.
        clean_worst, robust_worst: of the class where it is least, which `worst_class` names for the attack.
        fairness: Lee et al. 2024's rho_rob against the first run: relative change of the worst class's robust accuracy
            plus that of the average; None for the first run itself, and where its accuracies are 0.
        gap: robust accuracy of the best weights less that of the last ones (robust overfitting); None for the best
            weights and where a run has only one of the two.
    """

    run: str
    weights: Weights
    attack: str
    examples: int
    clean: float
    clean_worst: float
    robust: float
    robust_worst: float
    worst_class: str
    fairness: float | None
    gap: float | None


def compare(judged: Sequence[Judged]) -> list[Line]:
    """A line for every evaluation, in their order; the first run is what fairness is measured against."""
    found: dict[tuple[str, str, str], Line] = {}
    for one in judged:
        line = _measured(one)
        base = found.get((judged[0].run, one.weights, one.attack))
        best = found.get((one.run, "best", one.attack)) if one.weights == "last" else None
        more = {
            "fairness": None if base is None or one.run == judged[0].run else fairness(line, base),
            "gap": None if best is None else best.robust - line.robust,
        }
        found[one.run, one.weights, one.attack] = Line(**{**asdict(line), **more})
    return list(found.values())


def fairness(line: Line, base: Line) -> float | None:
    """(worst - worst of base) / worst of base + (average - average of base) / average of base, under the attack."""
    if not base.robust_worst or not base.robust:
        return None
    return (line.robust_worst - base.robust_worst) / base.robust_worst + (line.robust - base.robust) / base.robust


def as_csv(lines: Sequence[Line]) -> str:
    """The lines as CSV text under a line of names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Line)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, lines))
    return text.getvalue()


def cells(line: Line) -> dict[str, str]:
    """The line as people read it: percent, and points of percent for the gap."""
    return {
        "run": line.run,
        "weights": line.weights,
        "attack": line.attack,
        "clean": f"{100 * line.clean:.2f} %",
        "clean, worst class": f"{100 * line.clean_worst:.2f} %",
        "robust": f"{100 * line.robust:.2f} %",
        "robust, worst class": f"{100 * line.robust_worst:.2f} % ({line.worst_class})",
        "fairness": "" if line.fairness is None else f"{line.fairness:+.2f}",
        "overfitting": "" if line.gap is None else f"{100 * line.gap:+.2f}",
    }


def as_text(lines: Sequence[Line]) -> str:
    """A table in fixed width."""
    rows = [dict(zip(cells(lines[0]), cells(lines[0]), strict=True)), *map(cells, lines)] if lines else []
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]} if rows else {}
    return "\n".join("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip() for row in rows)


def _measured(one: Judged) -> Line:
    summary = one.report.summary()
    clean, robust = summary.worst_class("clean"), summary.worst_class("under_attack")
    rates = summary.rates
    return Line(
        one.run,
        one.weights,
        one.attack,
        summary.examples,
        rates.clean.fraction,
        summary.classes[clean].clean.fraction,
        rates.under_attack.fraction,
        summary.classes[robust].under_attack.fraction,
        _class_name(one.report.header, robust),
        None,
        None,
    )


def _class_name(header: dict[str, Any], label: int) -> str:
    names = header.get("classes") or ()
    return str(names[label]) if label < len(names) else str(label)
