"""`robust report RUN RUN ...`: the reports of several runs on one page.

What differs between the runs beside their weights (radius, images, norm, verifier) stands above the rates, because
such rates cannot be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from robust import plots, runs_plots
from robust.dataset import MissingData
from robust.files import write_whole
from robust.judged_run import JudgedRun
from robust.page import (
    NORM_WORDS,
    Picture,
    breakable,
    code,
    duration,
    gallery,
    listed,
    page,
    percent,
    png_uri,
    section,
    table,
    text,
)
from robust.report import Rate, Row, Stage

SHOWN_IMAGES = 6

JUDGING = ("data", "split", "ball", "verifier", "attack", "precision", "device", "batch_size", "versions")
"""Facts of a report's header that are shown where they differ."""

DECIDING = ("data_hash", "split", "ball")
"""Facts without which rates cannot be compared, besides the images' numbers."""


def write_runs_page(runs: Sequence[JudgedRun], path: Path) -> Path:
    """Write the page of two or more runs; return its path."""
    write_whole(path, runs_page(runs))
    return path


def runs_page(runs: Sequence[JudgedRun]) -> str:
    """The whole page as text."""
    sections = [
        _caution(runs),
        _rates_table(runs),
        _differences(runs),
        gallery(_pictures(runs)),
        _images(runs),
        _stages(runs),
        _classes(runs),
    ]
    names = ", ".join(run.name for run in runs)
    return page(f"{names}: robustness of runs", "Robustness of runs", f"{len(runs)} runs side by side", sections)


def rate_names(runs: Sequence[JudgedRun]) -> list[str]:
    """Names of the rates that every run measured, least first."""
    return [name for name in runs[0].report.measured() if all(name in run.report.measured() for run in runs)]


def incomparable(runs: Sequence[JudgedRun]) -> list[str]:
    """What the runs were not judged alike on, in words; empty where their rates can be compared."""
    words = {"data_hash": "the images", "split": "the part of the data set", "ball": "norm, radius or pixel range"}
    alike = {name: _alike(run.report.header.get(name) for run in runs) for name in DECIDING}
    alike["data_hash"] = _same_images(runs)
    found = [words[name] for name in DECIDING if not alike[name]]
    if not _alike([row.index for row in run.report.rows] for run in runs):
        found.append("which images of the data set were judged")
    return found


def _same_images(runs: Sequence[JudgedRun]) -> bool:
    """Whether the reports tell of the same images, as far as they do: earlier ones have no `image_hash`."""
    told = {run.report.header.get("image_hash") for run in runs} - {None}
    return len(told) < 2 and _alike(run.report.header.get("data_hash") for run in runs)


def _alike(values: Any) -> bool:
    first, *rest = list(values)
    return all(value == first for value in rest)


def _caution(runs: Sequence[JudgedRun]) -> str:
    different = incomparable(runs)
    if not different:
        return ""
    return (
        f'<section class="caution"><p><strong>These rates cannot be compared directly.</strong> The runs differ in '
        f"{text('; '.join(different))}.</p></section>"
    )


def _rates_table(runs: Sequence[JudgedRun]) -> str:
    heads = ["run", "certified", "under attack", "clean", "norm", "ε", "images", "training", "judging"]
    rows = [_rates_row(run) for run in runs]
    words = (
        "<p>Below each rate its 95 % interval. Certified: proved that no point of the ball changes the class; the "
        "accuracy under attack is an upper bound of the robust accuracy. Times are those of the machines that the runs "
        "ran on.</p>"
    )
    return section("Rates", table(heads, rows), words)


def _rates_row(run: JudgedRun) -> list[str]:
    summary, measured = run.report.summary(), run.report.measured()
    cells = [
        _rate(getattr(summary.rates, name)) if name in measured else "-"
        for name in ("certified", "under_attack", "clean")
    ]
    ball = run.report.header.get("ball")
    norm = "-" if not ball else text(NORM_WORDS.get(ball["norm"], ball["norm"]))
    seconds = run.training_seconds
    return [
        breakable(run.name),
        *cells,
        norm,
        "-" if not ball else text(plots.radius(ball["eps"])),
        str(summary.examples),
        "-" if seconds is None else duration(seconds),
        duration(summary.seconds),
    ]


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"<strong>{percent(rate.fraction)}</strong><br><small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _differences(runs: Sequence[JudgedRun]) -> str:
    """Settings and facts of the judging that are not the same in all runs."""
    facts = [{**_judging(run), **_training(run)} for run in runs]
    words = list(dict.fromkeys(word for one in facts for word in one))
    rows = [
        [breakable(word), *(code(one.get(word, "-")) for one in facts)]
        for word in words
        if not _alike(one.get(word) for one in facts)
    ]
    if not rows:
        return section("Settings that differ", "<p>None that the runs' records name.</p>")
    return section("Settings that differ", table(["", *(breakable(run.name) for run in runs)], rows))


def _training(run: JudgedRun) -> dict[str, str]:
    return {name: _plain(value) for name, value in run.settings.items()}


def _judging(run: JudgedRun) -> dict[str, str]:
    header = run.report.header
    facts = {f"judging: {name.replace('_', ' ')}": _plain(header[name]) for name in JUDGING if name in header}
    model = header.get("model")
    return {**({"model": _plain(model)} if model is not None else {}), **facts}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _pictures(runs: Sequence[JudgedRun]) -> list[Picture]:
    found: list[Picture] = []

    def add(title: str, words: str, draw: Callable[[plots.Theme], Figure]) -> None:
        found.append(Picture(title, words, plots.svg(draw(plots.LIGHT)), plots.svg(draw(plots.DARK))))

    least, *_ = rate_names(runs)
    filled = all(run.report.rows for run in runs)
    if least != "clean" and filled:
        word = "certified" if least == "certified" else "under attack"
        words = "Accuracies with 95 % intervals; the dotted line joins the runs that no other beats in both."
        add(f"Clean against {word}", words, lambda theme: runs_plots.front(runs, least, theme))
    curves = [run.sources.curve for run in runs if run.sources is not None and run.sources.curve is not None]
    if curves:
        verifiers = sorted({curve.verifier for curve in curves if curve.verifier})
        by = f", by {' and '.join(verifiers)} alone" if verifiers else ""
        attacked = " Dashed: under attack." if any(curve.under_attack for curve in curves) else ""
        words = f"Certified share of the first {min(curve.examples for curve in curves)} images{by}.{attacked}"
        add("Over the radius", words, lambda theme: runs_plots.over_eps(runs, theme))
    if least != "clean" and filled:
        words = "One mark for each run."
        add("Accuracy per class", words, lambda theme: runs_plots.per_class(runs, least, theme))
    for metric in _metrics(runs):
        words = "On held-out training images, after each validated epoch."
        title = f"Training: {metric.partition('/')[2].replace('_', ' ')}"
        add(title, words, lambda theme, metric=metric: runs_plots.training(runs, metric, theme))  # type: ignore[misc]
    if any(run.constants is not None for run in runs):
        what = sorted({run.constants.words for run in runs if run.constants is not None})
        words = f"Upper bounds of local Lipschitz constants {'; '.join(what)}."
        add("Lipschitz constants", words, lambda theme: runs_plots.constants(runs, theme))
    return found


def _metrics(runs: Sequence[JudgedRun]) -> list[str]:
    """Validation accuracies in the logs, the least common last."""
    names = [name for run in runs for record in run.log for name in record if name.startswith("validation/")]
    return sorted(set(names), key=lambda name: (-names.count(name), name))


def _images(runs: Sequence[JudgedRun]) -> str:
    """The same images in every run: verdict, margin and nearest adversarial example."""
    if not _same_images(runs) or all(run.near is None for run in runs):
        return ""
    rows = [{row.index: row for row in run.report.rows} for run in runs]
    shown = [row.index for row in runs[0].report.rows if all(row.index in found for found in rows)][:SHOWN_IMAGES]
    images = _clean_images(runs, shown)
    if not shown or images is None:
        return ""
    lines = []
    for index, image in zip(shown, images, strict=True):
        label = plots.class_name(runs[0].report, rows[0][index].label)
        figures = [
            f'<figure><b>{text(label)}</b><div class="pair"><img src="{png_uri(image)}" alt="{text(label)}"></div>'
            f"<figcaption>image {index}</figcaption></figure>"
        ]
        figures += [_near(run, found[index]) for run, found in zip(runs, rows, strict=True)]
        lines.append(f'<div class="images">{"".join(figures)}</div>')
    words = (
        "<p>Each image, and for each run the nearest adversarial example that FAB and PGD found, with its distance and "
        "class, the verdict, and the smallest margin that was proved or found. A nearer one may exist.</p>"
    )
    return section("Images and their nearest adversarial examples", words, "".join(lines))


def _clean_images(runs: Sequence[JudgedRun], index: Sequence[int]) -> list[bytes] | None:
    """PNG files of the images; None where no run's data set is there any more."""
    for run in runs:
        if run.sources is None:
            continue
        try:
            x, _ = run.sources.images().batch(torch.tensor(index))
        except MissingData:
            continue
        return [plots.thumbnail(image) for image in x]
    return None


def _near(run: JudgedRun, row: Row) -> str:
    words, picture = [text(plots.margin_words(row))], ""
    if run.near is not None and row.index in run.near.points:
        point = plots.thumbnail(run.near.points[row.index])
        picture = f'<img src="{png_uri(point)}" alt="nearest for {text(run.name)}">'
        words.insert(0, text(run.near.words(run.report, row.index)))
    if row.status == "misclassified":
        words = [f"→ {text(plots.class_name(run.report, row.predicted))}"]
    return (
        f'<figure class="{row.status}"><b>{breakable(run.name)}</b><div class="pair">{picture}</div>'
        f"<figcaption><span>{row.status}</span><br>{'<br>'.join(words)}</figcaption></figure>"
    )


def _stages(runs: Sequence[JudgedRun]) -> str:
    """How many examples each stage certified and falsified in each run, and its time."""
    found = [run.report.summary().stages for run in runs]
    names = sorted(set().union(*found), key=lambda name: sum(s[name].seconds for s in found if name in s))
    if not names:
        return ""
    rows = [[code(name), *(_decided(stages.get(name)) for stages in found)] for name in names]
    return section("What each stage decided", table(["stage", *(breakable(run.name) for run in runs)], rows))


def _decided(stage: Stage | None) -> str:
    if stage is None:
        return "-"
    counts = [("certified", stage.certified), ("falsified", stage.falsified), ("unknown", stage.unknown)]
    words = ", ".join(f"{count} {word}" for word, count in counts if count)
    return f"{words}<br><small>{duration(stage.seconds)}</small>"


def _classes(runs: Sequence[JudgedRun]) -> str:
    """The least rate that all runs measured, class by class."""
    least, *_ = rate_names(runs)
    found = [run.report.summary().classes for run in runs]
    labels = sorted(set().union(*found))
    if not labels:
        return ""
    rows = [
        [
            text(plots.class_name(runs[0].report, label)),
            *(percent(getattr(classes[label], least).fraction) if label in classes else "-" for classes in found),
        ]
        for label in labels
    ]
    filled = [run.report for run in runs if run.report.rows]
    worst = listed([plots.class_name(report, report.summary().worst_class(least)) for report in filled])
    title = f"Per class: {least.replace('_', ' ')}"
    return section(title, table(["class", *(breakable(run.name) for run in runs)], rows), f"<p>Worst: {worst}.</p>")


def facts(runs: Sequence[JudgedRun]) -> list[dict[str, Any]]:
    """JSON form of what the page's first table says, a record for each run."""
    return [
        {
            "run": run.name,
            "measured": run.report.measured(),
            **dataclasses.asdict(run.report.summary().rates),
            "ball": run.report.header.get("ball"),
            "training_seconds": run.training_seconds,
            "judging_seconds": run.report.summary().seconds,
        }
        for run in runs
    ]
