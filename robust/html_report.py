"""A report as one HTML file that needs no other: styles inside, pictures as data URIs, readable by day, by night and on
a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robust.masking import Masking
from robust.plots import class_name, margin_words, radius
from robust.report import STATUSES, Rate, Rates, Report, Row, Summary

MOST_UNDECIDED = 50
"""Lines of the table of unknown examples; the rows themselves are in the report's files."""

NORM_WORDS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Picture:
    """A plot in both appearances.

    Attributes:
        title: heading above it. text: what it shows, for readers and for screen readers.
        light, dark: PNG files.
    """

    title: str
    text: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Example:
    """A row with its image as a PNG file, small enough that a screen shows its pixels."""

    row: Row
    image: bytes


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
        *map(_picture, pictures),
        _examples(report, examples),
        _stage_table(summary),
        _undecided_table(report),
        _attack_table(summary),
        _masking_table(masking),
        _class_table(report, summary),
        _header_table(report.header),
    ]
    return _page(f"{_text(title)}: robustness report", "Robustness report", _text(title), sections)


def comparison_page(rows: Sequence[Mapping[str, str]], pictures: Sequence[Picture]) -> str:
    """A page of runs side by side.

    Args:
        rows: cells by the name of their column, the same names in every row.
    """
    table = _table(list(rows[0]), [[_text(cell) for cell in row.values()] for row in rows]) if rows else ""
    words = (
        "Best: the weights of the best epoch on held-out training images; last: those of the last epoch. Robust: the "
        "share that is right and for which the attack found no other prediction, an upper bound. Fairness: relative "
        "change of the worst class plus that of the average, against the first run (Lee et al. 2024). Overfitting: "
        "best less last, in points."
    )
    sections = [f"<section>{table}<p>{words}</p></section>", *map(_picture, pictures)]
    return _page("Comparison of runs", "Robustness", "Comparison of runs", sections)


def _page(title: str, kicker: str, heading: str, sections: Sequence[str]) -> str:
    body = "\n".join(filter(None, sections))
    return _PAGE.format(title=title, kicker=kicker, heading=heading, style=_STYLE, body=body)


def percent(value: float) -> str:
    """A fraction with one decimal, more where it is nearly 0 or 1, and a hyphen where it is NaN."""
    if value != value:
        return "-"
    digits = 1 if 0.001 <= value <= 0.999 or value in (0.0, 1.0) else 3
    return f"{100 * value:.{digits}f} %"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


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
    around = f"{_text(norm)} distance from it is at most <strong>ε = {_text(radius(ball['eps']))}</strong>"
    attack = report.header.get("attack")
    attacked = f"The attack was {_code(attack)}." if attack else "No attack ran before the verifier."
    if not report.verified:
        return (
            "<section><h2>What was attacked</h2>"
            f"<p>The attack searched the images whose {around}; {where}. {attacked} No verifier ran, so the accuracy "
            "under attack is an upper bound: a better attack may find more.</p></section>"
        )
    return (
        "<section><h2>What is certified</h2>"
        f"<p>For a certified example, every image whose {around} gets the right class; {where}. "
        f"{_proofs(report)} {attacked}</p></section>"
    )


def _proofs(report: Report) -> str:
    certified = [row for row in report.rows if row.status == "certified"]
    if not certified:
        return "No example was certified."
    precisions = sorted({row.precision for row in certified if row.precision})
    arithmetic = f", computed in {_list(precisions)}" if precisions else ""
    return f"Certificates come from {_list(sorted({row.method for row in certified}))}{arithmetic}."


def _verdicts(summary: Summary) -> str:
    if not summary.examples:
        return "<section><h2>Verdicts</h2><p>This report holds no examples yet.</p></section>"
    parts = "".join(
        f'<span class="{status}" style="flex-grow:{summary.statuses[status]}"></span>'
        for status in STATUSES
        if summary.statuses[status]
    )
    legend = "".join(
        f'<li><i class="{status}"></i>{status} <b>{summary.statuses[status]}</b></li>' for status in STATUSES
    )
    return (
        f'<section><h2>Verdicts</h2><div class="bar" aria-hidden="true">{parts}</div><ul class="legend">{legend}</ul>'
        f"<p>{summary.examples} examples in {duration(summary.seconds)}.</p></section>"
    )


def _picture(picture: Picture) -> str:
    return (
        f"<section><h2>{_text(picture.title)}</h2><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img src="{_data_uri(picture.light)}" alt="{_text(picture.text)}"></picture>'
        f"<p>{_text(picture.text)}</p></section>"
    )


def _examples(report: Report, examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = "".join(_example(report, example.row, example.image) for example in examples)
    return (
        "<section><h2>Examples</h2><p>Some of each verdict. Above an image its class, and the predicted one where that "
        "is wrong; below it the verdict, and the smallest margin that was proved or found.</p>"
        f'<div class="examples">{figures}</div></section>'
    )


def _example(report: Report, row: Row, image: bytes) -> str:
    label, predicted = (_text(class_name(report, label)) for label in (row.label, row.predicted))
    title = label if row.label == row.predicted else f"{label} → {predicted}"
    return (
        f'<figure class="{row.status}"><b>{title}</b>'
        f'<img src="{_data_uri(image)}" alt="example {row.index}, {label}" loading="lazy">'
        f"<figcaption><span>{row.status}</span><br>{_text(margin_words(row))}</figcaption></figure>"
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _stage_table(summary: Summary) -> str:
    if not summary.stages:
        return ""
    heads = ["stage", "certified", "falsified", "left unknown", "time"]
    rows = [
        [_code(method), str(s.certified), str(s.falsified), str(s.unknown), duration(s.seconds)]
        for method, s in sorted(summary.stages.items(), key=lambda item: item[1].seconds)
    ]
    if any(s.domains for s in summary.stages.values()):
        heads.append("domains")
        for row, (_, s) in zip(rows, sorted(summary.stages.items(), key=lambda item: item[1].seconds), strict=True):
            row.append(f"{s.domains:,}")
    return f"<section><h2>What each stage decided</h2>{_table(heads, rows)}</section>"


def _undecided_table(report: Report) -> str:
    """Which examples stayed unknown, and how far their bound is from zero."""
    undecided = report.undecided() if report.verified else []
    if not undecided:
        return ""
    rows = [
        (
            f"#{row.index}",
            _text(class_name(report, row.label)),
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
    return f"<section><h2>What stayed unknown</h2>{words}{_table(heads, rows)}{rest}</section>"


def _attack_table(summary: Summary) -> str:
    if len(summary.attacks) < 2:
        return ""
    rows = [(_code(name), str(a.tried), str(a.fooled)) for name, a in summary.attacks.items()]
    return f"<section><h2>What each attack found</h2>{_table(('attack', 'tried on', 'fooled'), rows)}</section>"


def _masking_table(masking: Masking | None) -> str:
    if masking is None:
        return ""
    flags = ", ".join(masking.flags)
    verdict = f"Flags: <strong>{_text(flags)}</strong>." if flags else "No check raised a flag."
    rows = [
        (_text(c.name), "-" if c.value is None else f"{c.value:.3g}", f"{c.limit:.3g}", "flag" if c.flagged else "")
        for c in masking.checks
    ]
    words = "".join(f"<dt>{_text(c.name)}</dt><dd>{_text(c.words)}</dd>" for c in masking.checks if c.flagged)
    table = _table(("check", "measured", "limit", ""), rows)
    return (
        f"<section><h2>Can the attacks be trusted?</h2><p>{verdict} {masking.examples} examples, "
        f"{_text(NORM_WORDS.get(masking.norm, masking.norm))}, ε = {_text(radius(masking.eps))}.</p>{table}"
        f"{f'<dl>{words}</dl>' if words else ''}</section>"
    )


def _class_table(report: Report, summary: Summary) -> str:
    if not summary.classes:
        return ""
    rows = [
        (_text(class_name(report, label)), *_cells(report, rates), str(rates.clean.total))
        for label, rates in summary.classes.items()
    ]
    words = {"certified": ("certified", "95 % interval"), "under_attack": ("under attack",), "clean": ("clean",)}
    heads = ("class", *(word for name in report.measured() for word in words[name]), "examples")
    worst = "; ".join(
        f"{name.replace('_', ' ')}: {_text(class_name(report, label))} with "
        f"{percent(getattr(summary.classes[label], name).fraction)}"
        for name in report.measured()
        for label in [summary.worst_class(name)]
    )
    return f"<section><h2>Per class</h2>{_table(heads, rows)}<p>Worst class {worst}.</p></section>"


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
    rows = [(_text(name), _code(value)) for name, value in _flat(header) if value not in (None, "")]
    if not rows:
        return ""
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<section><h2>How it was measured</h2><dl>{body}</dl></section>"


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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(words: Sequence[str]) -> str:
    codes = [_code(word) for word in words]
    return codes[0] if len(codes) == 1 else f"{', '.join(codes[:-1])} and {codes[-1]}"


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<header><p>{kicker}</p><h1>{heading}</h1></header>
{body}
</main>
</body>
</html>
"""

_STYLE = """:root {
  --background: #ffffff; --text: #1c1c1c; --quiet: #5a5a5a; --line: #d9d9d9; --panel: #f6f7f8;
  --certified: #0072b2; --attack: #e69f00; --clean: #9a9a9a;
  --unknown: #a3588a; --falsified: #d55e00; --misclassified: #8a8a8a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --background: #16181d; --text: #e8e8e8; --quiet: #a9adb5; --line: #3a3d45; --panel: #1f2229;
    --certified: #56b4e9; --unknown: #cc79a7; --falsified: #f08040; --misclassified: #8d9098;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--background); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header p { margin: 0; color: var(--quiet); }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.15rem; line-height: 1.3; }
section { margin: 0 0 2.4rem; }
p { margin: .5rem 0; }
code {
  font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
}
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
.card { background: var(--panel); border-radius: .5rem; padding: 1rem 1.1rem; border-top: .3rem solid var(--clean); }
.card.certified { border-color: var(--certified); }
.card.under_attack { border-color: var(--attack); }
.card h2 { font-size: 1rem; font-weight: 600; margin: 0; }
.card p { margin: 0; }
.number { font-size: 2.2rem; font-weight: 700; line-height: 1.3; font-variant-numeric: tabular-nums; }
.interval span { white-space: nowrap; color: var(--quiet); font-size: .9rem; }
.interval { font-variant-numeric: tabular-nums; }
.count { color: var(--quiet); font-size: .9rem; }
.bar { display: flex; height: 1.4rem; border-radius: .3rem; overflow: hidden; gap: 2px; }
.bar span { flex-basis: 0; min-width: 2px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: .6rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .45em; }
span.certified, i.certified { background: var(--certified); }
span.unknown, i.unknown { background: var(--unknown); }
span.falsified, i.falsified { background: var(--falsified); }
span.misclassified, i.misclassified { background: var(--misclassified); }
img { display: block; max-width: 100%; height: auto; }
picture img { width: 46rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.2rem .9rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.4; text-align: center; --colour: var(--clean); }
figure.certified { --colour: var(--certified); }
figure.unknown { --colour: var(--unknown); }
figure.falsified { --colour: var(--falsified); }
figure b { display: block; font-weight: 400; overflow-wrap: anywhere; }
figure img { width: 100%; image-rendering: pixelated; border: .2rem solid var(--colour); margin: .2rem 0; }
figcaption span { font-weight: 700; border-bottom: .15rem solid var(--colour); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; min-width: 5rem; }
thead th { color: var(--quiet); font-weight: 600; font-size: .9rem; }
tbody th { font-weight: 400; }
th code { overflow-wrap: break-word; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) {
  .examples { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); }
  th, td { padding: .35rem .5rem; }
  main { padding-top: 1.25rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}"""
