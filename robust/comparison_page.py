"""The page of `robust compare`: the same attacks on best and last weights of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from robust.page import Picture, breakable, gallery, page, table

WORDS = (
    "Best: the weights of the best epoch on held-out training images; last: those of the last epoch. Robust: the "
    "share that is right and for which the attack found no other prediction, an upper bound. Fairness: relative "
    "change of the worst class plus that of the average, against the first run (Lee et al. 2024). Overfitting: "
    "best less last, in points."
)


def comparison_page(rows: Sequence[Mapping[str, str]], pictures: Sequence[Picture]) -> str:
    """A page of runs side by side.

    Args:
        rows: cells by the name of their column, the same names in every row.
    """
    lines = table(list(rows[0]), [[breakable(cell) for cell in row.values()] for row in rows]) if rows else ""
    sections = [f"<section>{lines}<p>{WORDS}</p></section>", gallery(pictures)]
    return page("Comparison of runs", "Robustness", "Comparison of runs", sections)
