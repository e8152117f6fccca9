"""Tables of the literature: one TOML file of scripts/tables is one table."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.attack import ATTACKS
from certify.verifier import VERIFIERS
from robust.settings import Recipe, load_recipe

FOLDER = Path(__file__).resolve().parents[1] / "tables"

METRICS = ("clean", "clean_worst", "adversarial", "adversarial_worst", "certified")
"""What a row can hold, in percent; "worst" is the accuracy of the class where it is least."""


class TableError(ValueError):
    """A table that does not exist, or a file that describes none; one line."""


@dataclass(frozen=True)
class Figures:
    """Accuracies in percent as somebody published them, None where they did not.

    `attack` is what `adversarial` was measured with; `images`, where given, those that the figures are shares of.
    """

    source: str = ""
    clean: float | None = None
    clean_worst: float | None = None
    adversarial: float | None = None
    adversarial_worst: float | None = None
    certified: float | None = None
    attack: str = ""
    images: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table: a recipe to train and judge, a network to verify, or a figure that is only quoted.

    Attributes:
        name: unique in its table.
        recipe: name of a recipe; empty for the other two kinds.
        network: folder of a published network; empty for the other two kinds.
        absent: why nothing can be run for this row.
        verifier, attack: that judge it, "" for none.
        published: what to compare with; the recipe's, where the table does not give others.
    """

    name: str
    recipe: str
    network: str
    absent: str
    verifier: str
    attack: str
    published: Figures


@dataclass(frozen=True)
class Table:
    """A table of the literature.

    Attributes:
        fairness: name of the row that the others' fairness is measured against, "" for none.
    """

    name: str
    title: str
    note: str
    fairness: str
    rows: tuple[Row, ...]

    def names(self, only: Sequence[str] | None) -> tuple[str, ...]:
        """Names of all rows, or `only` these; TableError where there is no such row."""
        names = tuple(row.name for row in self.rows)
        for name in only or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise TableError(f"table {self.name}: no row {name!r}{hint}; rows: {', '.join(names)}")
        return names if only is None else tuple(name for name in names if name in only)


def table_names() -> list[str]:
    """Names of the tables of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_table(name: str) -> Table:
    """Table by name, or from the path of a TOML file.

    Raises:
        TableError: no such table or file, invalid TOML, unknown keys, methods or recipes.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, table_names(), n=3, cutoff=0.4)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise TableError(f"no table {name!r}{hint}; tables: {', '.join(table_names())}")
    return parse_table(path.stem, path.read_text(encoding="utf-8"))


def parse_table(name: str, text: str) -> Table:
    """Table from TOML: `title`, optional `note`, `fairness`, `verifier` and `attack`, and tables [[row]]."""
    try:
        content = tomllib.loads(text)
        _refuse_others(content, ("title", "note", "fairness", "verifier", "attack", "row"))
        rows = tuple(_row(row, content) for row in content.get("row", ()))
    except (ValueError, TypeError) as error:
        raise TableError(f"table {name}: {error}") from None
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    fairness = content.get("fairness", "")
    if twice or not rows or (fairness and fairness not in names):
        what = f"row {twice[0]!r} stands twice" if twice else f"no row {fairness!r}" if fairness else "no [[row]]"
        raise TableError(f"table {name}: {what}")
    return Table(name, content.get("title", name), content.get("note", ""), fairness, rows)


def _row(content: dict[str, Any], table: dict[str, Any]) -> Row:
    _refuse_others(content, ("name", "recipe", "network", "absent", "verifier", "attack", "published"))
    kinds = [kind for kind in ("recipe", "network", "absent") if content.get(kind)]
    if len(kinds) != 1:
        raise ValueError(f"a row has one of recipe, network and absent, this one has {' and '.join(kinds) or 'none'}")
    verifier, attack = (content.get(kind, table.get(kind, "")) for kind in ("verifier", "attack"))
    for registry, method in ((VERIFIERS, verifier), (ATTACKS, attack)):
        if method:
            registry.parse(method)
    if not verifier and not attack and kinds != ["absent"]:
        raise ValueError("a row needs a verifier or an attack that judges it")
    recipe = load_recipe(content["recipe"]) if kinds == ["recipe"] else None
    name = content.get("name") or content.get("recipe") or content.get("network")
    if not name:
        raise ValueError("a row without a recipe or network needs a name")
    return Row(
        name,
        content.get("recipe", ""),
        content.get("network", ""),
        content.get("absent", ""),
        verifier,
        attack,
        _figures(content.get("published", {}), recipe),
    )


def _figures(given: dict[str, Any], recipe: Recipe | None) -> Figures:
    """The recipe's published figures, those that the table gives in their place."""
    known = tuple(field.name for field in dataclasses.fields(Figures))
    _refuse_others(given, known)
    if any(given.get(metric) is not None for metric in METRICS) and not given.get("source"):
        raise ValueError("published figures need their source")
    if given or recipe is None or recipe.published is None:
        return Figures(**given)
    own = dataclasses.asdict(recipe.published)
    return Figures(**{name: value for name, value in own.items() if name in known})


def _refuse_others(content: dict[str, Any], known: tuple[str, ...]) -> None:
    others = sorted(set(content) - set(known))
    if others:
        raise ValueError(f"unknown key {others[0]!r}; expected {', '.join(known)}")
