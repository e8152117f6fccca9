"""Pages as a browser shows them: headless Chromium, where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH (Debian: apt install chromium)"
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",
    # No name resolves: what a page asks for outside itself is missing from it, and nothing leaves the machine.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)

MEASURE = """<script>
addEventListener("load", () => {
  const style = getComputedStyle(document.body), images = [...document.images];
  const outside = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
  const colours = [style.backgroundColor, style.color].map(colour => colour.replaceAll(" ", ""));
  const facts = [document.documentElement.scrollWidth, innerWidth, ...colours,
    images.length, images.filter(image => image.complete && image.naturalWidth > 0).length, outside.length];
  parent.postMessage(facts.join("|"), "*");
});
</script>"""

# Chromium's windows are at least 500 pixels wide, a frame is as narrow as a phone.
PAGE = """<!DOCTYPE html><html><head><meta name="color-scheme" content="light dark"></head><body><pre></pre>
<script>addEventListener("message", event => {{ document.querySelector("pre").textContent += event.data + "\\n"; }});
</script>{frames}</body></html>"""
FRAME = '<iframe src="{source}" style="width:{width}px;height:2400px;border:0"></iframe>'


@dataclass(frozen=True)
class Seen:
    """What the browser says about a page.

    Attributes:
        scroll_width: of the document in pixels; more than the window's width where the page scrolls to the side.
        background, text: colours of the page's body, as CSS writes them.
        images, drawn: how many images there are, and how many of them could be drawn.
        outside: how many resources the page asked for that it does not hold itself.
    """

    scroll_width: int
    background: str
    text: str
    images: int
    drawn: int
    outside: int


def seen(page: Path, widths: Sequence[int], dark: bool, folder: Path) -> dict[int, Seen]:
    """The page at each width, in one appearance; files of the measurement go to `folder`."""
    measured = folder / "measured.html"
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    frames = "".join(FRAME.format(source=measured.name, width=width) for width in widths)
    (folder / "frames.html").write_text(PAGE.format(frames=frames), encoding="utf-8")
    answer = re.search("<pre>([^<]*)</pre>", _run(folder / "frames.html", 1600, dark, folder, "--dump-dom"))
    assert answer is not None, "the page did not load"
    found = {}
    for line in answer[1].split():
        scroll, inner, *colours, images, drawn, outside = line.split("|")
        found[int(inner)] = Seen(int(scroll), colours[0], colours[1], int(images), int(drawn), int(outside))
    assert set(found) == set(widths), "the page did not load"
    return found


def screenshot(page: Path, width: int, dark: bool, folder: Path) -> Path:
    """The top of the page as a PNG file in `folder`."""
    out = folder / f"{page.stem}_{width}_{'dark' if dark else 'light'}.png"
    _run(page, width, dark, folder, f"--screenshot={out}")
    return out


def _run(page: Path, width: int, dark: bool, folder: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *FLAGS,
        f"--user-data-dir={folder / f'profile_{width}_{dark}'}",
        f"--window-size={width},2400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *arguments,
        page.resolve().as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
