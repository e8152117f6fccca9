"""Files of tables: all of them are whole, and what a file says wrong is refused by name."""

from __future__ import annotations

import pytest

from attacks.attack import ATTACKS
from certify.verifier import VERIFIERS
from robust.settings import load_recipe, recipe_names
from scripts.reproduction.table import METRICS, TableError, load_table, parse_table, table_names
from tests.scripts.tables import TABLE, table

ROWS = [(name, row) for name in table_names() for row in load_table(name).rows]
ROW = '[[row]]\nrecipe = "digits_sabr"\nverifier = "ibp"\n'


def test_there_is_a_table_for_every_data_set_of_the_literature():
    wanted = {"mnist", "cifar10", "tinyimagenet", "imagenet64"}
    assert {f"{name}_certified" for name in wanted} <= set(table_names())
    assert {f"{name}_adversarial" for name in ("cifar10", "cifar100", "svhn", "imagenet")} <= set(table_names())
    assert {f"l2_{name}" for name in ("cifar10", "cifar100", "tinyimagenet", "imagenet")} <= set(table_names())
    assert {"fairness_cifar10", "fairness_cifar100", "verification", "mnist_small"} <= set(table_names())


def test_every_recipe_with_a_paper_behind_it_stands_in_a_table():
    used = {row.recipe for _, row in ROWS}
    assert {name for name in recipe_names() if load_recipe(name).published is not None} <= used


@pytest.mark.parametrize("name, row", ROWS, ids=lambda value: getattr(value, "name", value))
def test_figures_have_a_source_and_agree_with_each_other(name, row):
    figures = [getattr(row.published, metric) for metric in METRICS]
    assert all(figure is None or 0 <= figure <= 100 for figure in figures)
    assert row.published.source or not any(figure is not None for figure in figures)
    for smaller, larger in (
        ("adversarial", "clean"),
        ("certified", "clean"),
        ("certified", "adversarial"),
        ("clean_worst", "clean"),
        ("adversarial_worst", "adversarial"),
    ):
        low, high = getattr(row.published, smaller), getattr(row.published, larger)
        assert low is None or high is None or low <= high, (name, row.name)


@pytest.mark.parametrize("name, row", ROWS, ids=lambda value: getattr(value, "name", value))
def test_judges_suit_the_threat_model_and_measure_what_was_published(name, row):
    norm = load_recipe(row.recipe).settings.norm if row.recipe else "linf"
    if row.verifier:
        verifier = VERIFIERS.parse(row.verifier)
        assert norm in verifier.norms
        assert row.attack or verifier.falsifies or row.published.adversarial is None or row.network
    if row.attack:
        assert norm in getattr(ATTACKS.parse(row.attack), "norms", (norm,))
    if not row.absent:
        assert row.published.certified is None or row.verifier


def test_what_a_row_leaves_open_is_the_tables_and_the_recipes():
    first, second, quoted = table().rows
    assert (first.verifier, first.attack, first.name) == ("ibp", "pgd:steps=2", "first")
    assert second.verifier == "crown_ibp"
    assert quoted.absent == "nobody knows how" and quoted.published.clean == 99


def test_a_row_takes_its_recipes_published_figures_unless_it_has_others(tmp_path):
    first = table(folder=tmp_path).rows[0]
    assert (first.published.clean, first.published.certified, first.published.source) == (60, 40, "a paper")
    text = TABLE.replace(
        '[[row]]\nname = "second"', '[row.published]\nclean = 1.0\nsource = "x"\n[[row]]\nname = "second"'
    )
    assert table(text, tmp_path).rows[0].published.certified is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("titel = 1", "table x: unknown key 'titel'; expected title, note"),
        ("title = 'x'", r"table x: no \[\[row\]\]"),
        ("title 3", "table x: .*line 1"),
        ("[[row]]\nverifier = 'ibp'", "a row has one of recipe, network and absent, this one has none"),
        ("[[row]]\nname = 'a'\nabsent = 'b'\nrecipe = 'c'", "this one has recipe and absent"),
        ("[[row]]\nrecipe = 'digits_sabr'", "a row needs a verifier or an attack that judges it"),
        ("[[row]]\nrecipe = 'digits_saber'\nverifier = 'ibp'", "no recipe 'digits_saber'; near: .*digits_sabr"),
        (ROW + ROW, "row 'digits_sabr' stands twice"),
        (ROW + "[row.published]\nclean = 3.0", "published figures need their source"),
        (ROW + "[row.published]\nclaen = 3.0", "unknown key 'claen'"),
        (ROW.replace("ibp", "ipb"), "no verifier named 'ipb'"),
        ("fairness = 'a'\n" + ROW, "no row 'a'"),
    ],
)
def test_what_a_file_says_wrong_is_refused_by_name(text, message):
    with pytest.raises(TableError, match=message):
        parse_table("x", text)


def test_mistyped_names_are_answered_with_their_neighbours():
    with pytest.raises(TableError, match=r"no table 'mnist_smal' \(did you mean mnist_small"):
        load_table("mnist_smal")
    with pytest.raises(TableError, match=r"no row 'frist' \(did you mean 'first'\?\); rows: first, second, quoted"):
        table().names(["frist"])
    assert table().names(None) == ("first", "second", "quoted")
    assert table().names(["quoted", "first"]) == ("first", "quoted")
