"""Build the documentation: README.md and the bench results as pages, and a page for every public module.

    python scripts/site/build.py [FOLDER]        FOLDER is site/ where none is given

Needs pdoc (`pip install '.[docs]'`). The templates beside this file change its front page and its colours.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("attacks", "certify", "robust")
PAGES = {"scripts/bench/RESULTS.md": "results.html"}
"""Where the site has the files that README.md links to."""


def public_modules() -> list[str]:
    """Dotted names of all modules that a reader may import, packages first."""
    found = []
    for package in PACKAGES:
        folder = importlib.import_module(package).__path__
        inner = [module.name for module in pkgutil.walk_packages(folder, f"{package}.")]
        found += [package, *(name for name in inner if not any(part.startswith("_") for part in name.split(".")))]
    return found


def as_page(path: Path) -> str:
    """HTML of a Markdown file; headings can be linked to, as on GitHub, and links to files go to the site's own."""
    text = path.read_text(encoding="utf-8")
    for file, page in PAGES.items():
        text = text.replace(f"]({file})", f"]({page})")
    # What is folded away is Markdown, too; the converter would leave it as it stands.
    text = text.replace("<details>", '<details markdown="1">')
    return to_html(text)


def folders(modules: list[str]) -> dict[str, list[str]]:
    """Modules by the package that holds them, packages of packages included."""
    held: dict[str, list[str]] = {}
    for name in modules:
        held.setdefault(name if name in PACKAGES else name.rpartition(".")[0], []).append(name)
    return held


def build(out: Path) -> None:
    """Write the site to a folder, which it replaces.

    Raises:
        ValueError: the folder holds something else.
    """
    if out.exists() and not (out / "search.js").exists() and any(out.iterdir()):
        raise ValueError(f"{out}: holds something else than a site of this script; name another folder")
    sys.path.insert(0, str(ROOT))
    modules = public_modules()
    pdoc.render.configure(docformat="google", template_directory=HERE, show_source=False)
    pdoc.render.env.globals.update(folders=folders(modules), readme=as_page(ROOT / "README.md"), front=True)
    # A named tuple that another module exports keeps its annotations as they are written; and pdoc finds the modules of
    # some packages by itself, so that they are named twice.
    warnings.filterwarnings("ignore", "Error parsing type annotation|The module specification")
    shutil.rmtree(out, ignore_errors=True)
    pdoc.pdoc(*modules, output_directory=out)
    frame = pdoc.render.env.get_template("index.html.jinja2").render(search=False, front=False)
    results = as_page(ROOT / "scripts/bench/RESULTS.md")
    (out / "results.html").write_text(frame.replace("<!-- page -->", results), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"
    try:
        build(target)
    except ValueError as error:
        sys.exit(f"docs: {error}")
    print(f"documentation: {target / 'index.html'}")
