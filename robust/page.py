"""What every page of the suite shares: one HTML file that needs no other, readable by day, by night and on a phone.

Styles are inside, pictures are data URIs, and nothing is fetched: a page can be mailed, archived and opened offline.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

NORM_WORDS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class Picture:
    """A plot in both appearances.

    Attributes:
        title: heading above it. text: what it shows, for readers and for screen readers.
        light, dark: SVG files.
    """

    title: str
    text: str
    light: bytes
    dark: bytes


def page(title: str, kicker: str, heading: str, sections: Sequence[str]) -> str:
    """The whole page; `sections` are markup, empty ones left out, everything else is text."""
    body = "\n".join(filter(None, sections))
    return _PAGE.format(title=text(title), kicker=text(kicker), heading=text(heading), style=_STYLE, body=body)


def section(title: str, *parts: str) -> str:
    """A heading with markup below it."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def gallery(pictures: Sequence[Picture]) -> str:
    """Plots side by side where the screen has the width, else one below the other."""
    return f'<div class="pictures">{"".join(map(_picture, pictures))}</div>' if pictures else ""


def _picture(picture: Picture) -> str:
    return (
        f"<section><h2>{text(picture.title)}</h2><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_svg_uri(picture.dark)}">'
        f'<img src="{_svg_uri(picture.light)}" alt="{text(picture.text)}"></picture>'
        f"<p>{text(picture.text)}</p></section>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markup; the first cell of a row names it and stays in sight where the rest has to scroll."""
    head = "".join(f'<th scope="col">{word}</th>' for word in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def listed(words: Sequence[str]) -> str:
    """Code words as a sentence has them: a, b and c."""
    codes = [code(word) for word in words]
    return codes[0] if len(codes) == 1 else f"{', '.join(codes[:-1])} and {codes[-1]}"


def code(value: object) -> str:
    """Markup of something that a program wrote or reads."""
    return f"<code>{breakable(value)}</code>"


def breakable(value: object) -> str:
    """Markup of a long name or a method's text, which may be broken behind its signs where the line is short."""
    return "".join(f"{text(sign)}<wbr>" if sign in "_/:,+" else text(sign) for sign in str(value))


def text(value: object) -> str:
    """Markup that shows the value as it is; nothing in it can become a tag."""
    return html.escape(str(value), quote=True)


def png_uri(png: bytes) -> str:
    """A PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _svg_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


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
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
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
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); column-gap: 2rem; }
picture img { width: 34rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.2rem .9rem; }
.examples.near { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
figure { margin: 0; font-size: .85rem; line-height: 1.4; text-align: center; --colour: var(--clean); }
figure.certified { --colour: var(--certified); }
figure.unknown { --colour: var(--unknown); }
figure.falsified { --colour: var(--falsified); }
figure b { display: block; font-weight: 400; overflow-wrap: anywhere; }
.pair { display: flex; gap: .25rem; margin: .2rem 0; justify-content: center; }
.near .pair img { flex: 0 0 calc(50% - .125rem); }
.pair img { flex: 1 1 0; min-width: 0; image-rendering: pixelated; border: .2rem solid var(--colour); }
figcaption span { font-weight: 700; border-bottom: .15rem solid var(--colour); }
.images { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(7rem, 9rem); gap: .9rem; overflow-x: auto; }
.images + .images { margin-top: 1.2rem; }
.caution { border-left: .3rem solid var(--attack); padding-left: 1rem; }
small { color: var(--quiet); font-size: .85em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child {
  text-align: left; padding-left: 0; white-space: normal; min-width: 5rem;
  position: sticky; left: 0; background: var(--background);
}
th code, td code { white-space: normal; overflow-wrap: normal; }
thead th { color: var(--quiet); font-weight: 600; font-size: .9rem; white-space: normal; }
tbody th { font-weight: 400; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) {
  .examples { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); }
  .examples.near { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
  th, td { padding: .35rem .5rem; }
  main { padding-top: 1.25rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}"""
