"""The documentation's pages: every public function has its place, and no link leads nowhere."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.robust.browser import needs_browser, seen
from tests.robust.runs import REPOSITORY

pytest.importorskip("pdoc", reason="the extra [docs] is not installed")
pytestmark = pytest.mark.slow

BUILD = REPOSITORY / "scripts" / "site" / "build.py"


class Page(HTMLParser):
    """What a page offers and asks for.

    Attributes:
        ids: places that a link can name. links: addresses of links. parts: addresses of what it cannot do without.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and (link := values.get("href")):
            self.links.append(link)
        self.parts += [
            value for name in ("src", "href") if tag not in ("a", "area") and (value := values.get(name)) is not None
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run([sys.executable, str(BUILD), str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_public_function_and_class_has_its_place(site: Path, pages: dict[Path, Page]) -> None:
    missing, count = [], 0
    for package in ("attacks", "certify", "robust"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part.startswith("_") for part in parts):
                continue
            module = importlib.import_module(".".join(parts))
            page = pages.get(site / Path(*parts[:-1]) / f"{parts[-1]}.html")
            for name, value in vars(module).items():
                here = getattr(value, "__module__", None) == module.__name__
                if name.startswith("_") or not here or not (inspect.isfunction(value) or inspect.isclass(value)):
                    continue
                count += 1
                if page is None or name not in page.ids:
                    missing.append(f"{module.__name__}.{name}")
    assert missing == [] and count > 800


def test_no_link_within_the_site_is_broken_and_no_page_needs_another_host(pages: dict[Path, Page]) -> None:
    broken, outside = [], []
    for path, page in pages.items():
        outside += [f"{path.name}: {part}" for part in page.parts if part.startswith(("http:", "https:", "//"))]
        for link in page.links:
            if link.startswith(("http:", "https:", "mailto:")):
                continue
            address, place = urldefrag(link)
            target = (path.parent / unquote(address)).resolve() if address else path
            found = target.exists() and (not place or target not in pages or unquote(place) in pages[target].ids)
            if not found:
                broken.append(f"{path.name}: {link}")
    assert broken == [] and outside == []


def test_the_front_page_is_the_readme_with_its_tables_and_folded_files(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert text.count("<table>") == 6 and "<code>mtl_ibp</code>" in text
    assert text.count("<summary>A layer: what it computes") == 1 and "```" not in text.partition("<script")[0]
    assert (site / "results.html").stat().st_size > 10_000


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    done = subprocess.run([sys.executable, str(BUILD), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"docs: {tmp_path}: holds something else")
    assert (tmp_path / "mine.txt").exists()


@needs_browser
@pytest.mark.parametrize("name", ["index.html", "results.html", "attacks/threat.html", "certify.html"])
def test_pages_fit_a_desk_and_a_phone(name: str, site: Path, tmp_path: Path) -> None:
    for width, page in seen(site / name, (400, 1200), False, tmp_path).items():
        assert page.scroll_width <= width and page.outside == 0
