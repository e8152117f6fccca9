"""What a sweep has found: the front of clean against robust accuracy, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from robust import plots
from robust.files import write_whole
from robust.sweep import Trial

LABELLED = 12


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other one beats in one accuracy without losing in the other, by rising clean accuracy.

    Of trials with equal accuracies the first is kept.
    """
    best: list[Trial] = []
    highest = -math.inf
    for _, robust, trial in sorted(_points(trials), key=lambda point: (-point[0], -point[1], point[2].number)):
        if robust > highest:
            best.append(trial)
            highest = robust
    return best[::-1]


def _points(trials: Sequence[Trial]) -> list[tuple[float, float, Trial]]:
    """(clean, robust, trial) of those that did not fail."""
    return [(t.clean, t.robust, t) for t in trials if t.clean is not None and t.robust is not None]


def write_front(trials: Sequence[Trial], robust_name: str, out: Path) -> None:
    """Write trials.csv and front.png to `out`."""
    write_whole(out / "trials.csv", as_csv(trials, robust_name))
    plots.save(picture(trials, robust_name), out / "front.png")


def as_csv(trials: Sequence[Trial], robust_name: str) -> str:
    """A line for every trial; accuracies in percent on the validation images."""
    kept = {trial.number for trial in front(trials)}
    paths = list(trials[0].values) if trials else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *paths, "validation clean", f"validation {robust_name}", "front", "seconds", "failure"])
    for trial in trials:
        values = [trial.values[path] for path in paths]
        accuracies = ["" if value is None else f"{value:.4g}" for value in (trial.clean, trial.robust)]
        on_front = "yes" if trial.number in kept else "no"
        writer.writerow([trial.number, *values, *accuracies, on_front, f"{trial.seconds:.1f}", trial.failure])
    return text.getvalue()


def as_text(trials: Sequence[Trial], robust_name: str) -> str:
    """The front for people, a line for each of its trials."""
    lines = [f"{'trial':>5}  {'clean':>7}  {robust_name:>12}"]
    for trial in front(trials):
        values = ", ".join(f"{path}={text}" for path, text in trial.values.items())
        lines.append(f"{trial.number:>5}  {trial.clean:>6.2f}%  {trial.robust:>11.2f}%  {values}")
    return "\n".join(lines)


def picture(trials: Sequence[Trial], robust_name: str, theme: plots.Theme = plots.LIGHT) -> Figure:
    """Every trial as a dot and the front as a staircase, whose trials are labelled."""
    figure, (axes,) = plots.empty_figure(theme, 5.4, 4.2)
    points, best = _points(trials), _points(front(trials))
    axes.plot(
        [x for x, _, _ in points], [y for _, y, _ in points], "o", color=theme.clean, markersize=5, label="trials"
    )
    stairs = [x for x, _, _ in best], [y for _, y, _ in best]
    axes.step(*stairs, "-o", where="pre", color=theme.certified, linewidth=1.9, markersize=6, label="front")
    for clean, robust, trial in best[:LABELLED]:
        place, words = (clean, robust), _label(trial)
        note = axes.annotate(words, place, (5, 5), textcoords="offset points", fontsize=8, color=theme.text)
        note.set_in_layout(False)
    axes.margins(0.12)
    axes.set_xlabel("clean accuracy on the validation images, %")
    axes.set_ylabel(f"{robust_name} accuracy there, %")
    axes.legend(loc="lower left", frameon=False, labelcolor=theme.text)
    return figure


def _label(trial: Trial) -> str:
    """The one value that was varied, a number in three digits; of several the trial's number says which."""
    if len(trial.values) > 1:
        return f"trial {trial.number}"
    (text,) = trial.values.values()
    return f"{float(text):.3g}" if text.replace(".", "").replace("e-", "").isdigit() else text
