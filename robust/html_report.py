"""The page of one report: what is certified, by which stage, for which images, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust.masking import Masking
from robust.page import (
    NORM_WORDS,
    Picture,
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
from robust.plots import class_name, margin_words, radius
from robust.report import STATUSES, Rate, Rates, Report, Row, Summary

MOST_UNDECIDED = 50
"""Lines of the table of unknown examples; the rows themselves are in the report's files."""

NEAR_WORDS = (
    " The second image is the nearest adversarial example that FAB and PGD found, with its distance and its class; a "
    "nearer one may exist."
)


@dataclass(frozen=True)
class Example:
    """A row with its image, as PNG files small enough that a screen shows their pixels.

    Attributes:
        near: the nearest adversarial example that was found, None where none was or none was looked for.
        near_words: its distance and class.
    """

    row: Row
    image: bytes
    near: bytes | None = None
    near_words: str = ""


def html_page(
    report: Report,
    pictures: Sequence[Picture] = (),
    examples: Sequence[Example] = (),
    masking: Masking | None = None,
) -> str:
    """The whole page as text."""
    summary = report.summary()
    title = f"{report.header.get('model', 'Model')} on {report.header.get('data', 'data')}"
    sections = [
        _headline(report, summary),
        _claim(report),
        _verdicts(summary),
        gallery(pictures),
        _examples(report, examples),
        _stage_table(summary),
        _undecided_table(report),
        _attack_table(summary),
        _masking_table(masking),
        _class_table(report, summary),
        _header_table(report.header),
    ]
    return page(f"{title}: robustness report", "Robustness report", title, sections)


def _headline(report: Report, summary: Summary) -> str:
    cards = [
        ("certified", "Certified accuracy", summary.rates.certified, "proved: no point of the ball changes the class"),
        ("under_attack", "Accuracy under attack", summary.rates.under_attack, "no point found that changes the class"),
        ("clean", "Clean accuracy", summary.rates.clean, "without perturbation"),
    ]
    shown = [card for card in cards if card[0] in report.measured()]
    return f'<section class="cards">{"".join(_card(*card) for card in shown)}</section>'


def _card(kind: str, name: str, rate: Rate, meaning: str) -> str:
    low, high = rate.interval
    return (
        f'<div class="card {kind}"><h2>{name}</h2><p class="number">{percent(rate.fraction)}</p>'
        f'<p class="interval">{100 * low:.1f} to {100 * high:.1f} % <span>(95 % interval)</span></p>'
        f'<p class="count">{rate.count} of {rate.total} examples, {meaning}</p></div>'
    )


def _claim(report: Report) -> str:
    """In words: what the numbers of this report say."""
    ball = report.header.get("ball")
    if not ball:
        return ""
    norm, limits = NORM_WORDS.get(ball["norm"], ball["norm"]), ball.get("pixel_range")
    where = f"pixel values stay in [{limits[0]:g}, {limits[1]:g}]" if limits else "pixel values have no limits"
    around = f"{text(norm)} distance from it is at most <strong>ε = {text(radius(ball['eps']))}</strong>"
    attack = report.header.get("attack")
    attacked = f"The attack was {code(attack)}." if attack else _searches(report)
    if not report.verified:
        return section(
            "What was attacked",
            f"<p>The attack searched the images whose {around}; {where}. {attacked} No verifier ran, so the accuracy "
            "under attack is an upper bound: a better attack may find more.</p>",
        )
    return section(
        "What is certified",
        f"<p>For a certified example, every image whose {around} gets the right class; {where}. "
        f"{_proofs(report)} {attacked}</p>",
    )


def _searches(report: Report) -> str:
    """What looked for adversarial points where no attack was asked for."""
    if report.searched:
        return "Adversarial points were looked for by the verifier itself; no other attack ran."
    return "Nothing looked for adversarial points."


def _proofs(report: Report) -> str:
    certified = [row for row in report.rows if row.status == "certified"]
    if not certified:
        return "No example was certified."
    precisions = sorted({row.precision for row in certified if row.precision})
    arithmetic = f", computed in {listed(precisions)}" if precisions else ""
    return f"Certificates come from {listed(sorted({row.method for row in certified}))}{arithmetic}."


def _verdicts(summary: Summary) -> str:
    if not summary.examples:
        return section("Verdicts", "<p>This report holds no examples yet.</p>")
    parts = "".join(
        f'<span class="{status}" style="flex-grow:{summary.statuses[status]}"></span>'
        for status in STATUSES
        if summary.statuses[status]
    )
    legend = "".join(
        f'<li><i class="{status}"></i>{status} <b>{summary.statuses[status]}</b></li>' for status in STATUSES
    )
    return section(
        "Verdicts",
        f'<div class="bar" aria-hidden="true">{parts}</div><ul class="legend">{legend}</ul>',
        f"<p>{summary.examples} examples in {duration(summary.seconds)}.</p>",
    )


def _examples(report: Report, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = "".join(_example(report, example) for example in examples)
    near = any(example.near is not None for example in examples)
    return section(
        "Examples",
        "<p>Some of each verdict. Above an image its class, and the predicted one where that is wrong; below it the "
        f"verdict, and the smallest margin that was proved or found.{NEAR_WORDS if near else ''}</p>",
        f'<div class="examples{" near" if near else ""}">{figures}</div>',
    )


def _example(report: Report, example: Example) -> str:
    row = example.row
    label, predicted = (text(class_name(report, label)) for label in (row.label, row.predicted))
    title = label if row.label == row.predicted else f"{label} → {predicted}"
    images = [f'<img src="{png_uri(example.image)}" alt="example {row.index}, {label}">']
    if example.near is not None:
        images.append(f'<img src="{png_uri(example.near)}" alt="{text(example.near_words)}">')
    words = f"<br>{text(example.near_words)}" if example.near is not None else ""
    return (
        f'<figure class="{row.status}"><b>{title}</b>'
        f'<div class="pair">{"".join(images)}</div>'
        f"<figcaption><span>{row.status}</span><br>{text(margin_words(row))}{words}</figcaption></figure>"
    )


def _stage_table(summary: Summary) -> str:
    if not summary.stages:
        return ""
    heads = ["stage", "certified", "falsified", "left unknown", "time"]
    rows = [
        [code(method), str(s.certified), str(s.falsified), str(s.unknown), duration(s.seconds)]
        for method, s in sorted(summary.stages.items(), key=lambda item: item[1].seconds)
    ]
    if any(s.domains for s in summary.stages.values()):
        heads.append("domains")
        for row, (_, s) in zip(rows, sorted(summary.stages.items(), key=lambda item: item[1].seconds), strict=True):
            row.append(f"{s.domains:,}")
    return section("What each stage decided", table(heads, rows))


def _undecided_table(report: Report) -> str:
    """Which examples stayed unknown, and how far their bound is from zero."""
    undecided = report.undecided() if report.verified else []
    if not undecided:
        return ""
    rows = [
        (
            f"#{row.index}",
            text(class_name(report, row.label)),
            "no bound" if row.margin_lb is None else f"{row.margin_lb:.3g}",
            "" if row.attack_margin is None else f"{row.attack_margin:.3g}",
            f"{row.domains:,}",
            duration(row.seconds),
        )
        for row in undecided[:MOST_UNDECIDED]
    ]
    heads = ("example", "class", "proved margin", "margin at the best attack", "domains", "time")
    more = len(undecided) - len(rows)
    rest = f"<p>And {more} more, with bounds further from zero.</p>" if more else ""
    words = "<p>The nearest to a proof first: a margin above zero would certify.</p>"
    return section("What stayed unknown", words, table(heads, rows), rest)


def _attack_table(summary: Summary) -> str:
    if len(summary.attacks) < 2:
        return ""
    rows = [(code(name), str(a.tried), str(a.fooled)) for name, a in summary.attacks.items()]
    return section("What each attack found", table(("attack", "tried on", "fooled"), rows))


def _masking_table(masking: Masking | None) -> str:
    if masking is None:
        return ""
    flags = ", ".join(masking.flags)
    verdict = f"Flags: <strong>{text(flags)}</strong>." if flags else "No check raised a flag."
    rows = [
        (text(c.name), "-" if c.value is None else f"{c.value:.3g}", f"{c.limit:.3g}", "flag" if c.flagged else "")
        for c in masking.checks
    ]
    words = "".join(f"<dt>{text(c.name)}</dt><dd>{text(c.words)}</dd>" for c in masking.checks if c.flagged)
    checks = table(("check", "measured", "limit", ""), rows)
    return section(
        "Can the attacks be trusted?",
        f"<p>{verdict} {masking.examples} examples, {text(NORM_WORDS.get(masking.norm, masking.norm))}, "
        f"ε = {text(radius(masking.eps))}.</p>",
        checks,
        f"<dl>{words}</dl>" if words else "",
    )


def _class_table(report: Report, summary: Summary) -> str:
    if not summary.classes:
        return ""
    rows = [
        (text(class_name(report, label)), *_cells(report, rates), str(rates.clean.total))
        for label, rates in summary.classes.items()
    ]
    words = {"certified": ("certified", "95 % interval"), "under_attack": ("under attack",), "clean": ("clean",)}
    heads = ("class", *(word for name in report.measured() for word in words[name]), "examples")
    worst = "; ".join(
        f"{name.replace('_', ' ')}: {text(class_name(report, label))} with "
        f"{percent(getattr(summary.classes[label], name).fraction)}"
        for name in report.measured()
        for label in [summary.worst_class(name)]
    )
    return section("Per class", table(heads, rows), f"<p>Worst class {worst}.</p>")


def _cells(report: Report, rates: Rates) -> list[str]:
    cells = []
    for name in report.measured():
        rate: Rate = getattr(rates, name)
        low, high = rate.interval
        cells += (
            [f"<strong>{percent(rate.fraction)}</strong>", f"{100 * low:.1f} to {100 * high:.1f}"]
            if name == "certified"
            else [percent(rate.fraction)]
        )
    return cells


def _header_table(header: Mapping[str, Any]) -> str:
    rows = [(text(name), code(value)) for name, value in _flat(header) if value not in (None, "")]
    if not rows:
        return ""
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return section("How it was measured", f"<dl>{body}</dl>")


def _flat(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facts of the header, nested ones joined in one line."""
    flat = []
    for name, value in header.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list | tuple):
            value = ", ".join(map(str, value[:20])) + (f" and {len(value) - 20} more" if len(value) > 20 else "")
        flat.append((name.replace("_", " "), value))
    return flat
