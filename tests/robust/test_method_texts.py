"""Changing one field of what settings spell."""

from __future__ import annotations

import dataclasses

import pytest

from attacks.attack import ATTACKS
from robust.hook import HOOKS
from robust.method_texts import value_at, with_field, with_methods
from robust.objective import OBJECTIVES
from robust.schedule import SCHEDULES
from robust.settings import Settings, SettingsError, load_recipe, recipe_names


@pytest.mark.parametrize(
    "path, text, setting, spelled",
    [
        ("epochs", "7", "epochs", 7),
        ("eps", "8/255", "eps", 8 / 255),
        ("objective", "trades", "objective", "trades"),
        ("objective.ibp_weight", "0.25", "objective", "mtl_ibp:ibp_weight=0.25"),
        ("objective.attack.steps", "3", "objective", "mtl_ibp:attack=(pgd:steps=3,step_size=0.25,unit=box,mode=keep)"),
        ("optimizer.lr", "1e-4", "optimizer", "adam:lr=0.0001"),
    ],
)
def test_one_value_changes_and_nothing_else(path, text, setting, spelled):
    before = Settings()
    after = with_field(before, path, text)
    if setting == "objective" and "attack" in path:
        assert value_at(after, path) == 3
    else:
        assert getattr(after, setting) == spelled
    assert dataclasses.replace(after, **{setting: getattr(before, setting)}) == before


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("epoch", "7", r"no setting 'epoch' \(did you mean 'epochs'\?\)"),
        ("epochs", "many", "epochs: expected int, got 'many'"),
        ("objective.ibp_wait", "1", r"objective 'mtl_ibp' has no field 'ibp_wait' \(did you mean 'ibp_weight'\?\)"),
        ("objective.ibp_weight", "much", "field 'ibp_weight': expected a number"),
        ("objective.ibp_weight.steps", "1", "field 'ibp_weight' of objective 'mtl_ibp' holds no method"),
        ("eps.deep", "1", "eps is no single method with fields"),
        ("hooks.decay", "1", "hooks is no single method with fields"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(path, text, message):
    with pytest.raises(SettingsError, match=message):
        with_field(Settings(), path, text)


@pytest.mark.parametrize(
    "registry, text, message",
    [
        *((HOOKS, f"{name}:decay={value}", "a share in") for name in ("ema", "fawa") for value in ("1", "-0.1")),
        *((OBJECTIVES, f"{n}:box_ratio={value}", "a share in") for n in ("sabr", "staps") for value in ("0", "1.1")),
        *(
            (OBJECTIVES, f"{name}:ibp_weight={value}", "a share in")
            for name in ("mtl_ibp", "cc_ibp", "exp_ibp")
            for value in ("-0.1", "5")
        ),
        *(
            (SCHEDULES, f"{name}:{fields}", "expected epochs with 0 <= start <= end")
            for name in ("smooth", "linear", "geometric")
            for fields in ("start=20,end=10", "start=-1")
        ),
        *((ATTACKS, f"pgd:step_size={value}", "a finite step_size > 0") for value in ("0", "-0.1", "inf")),
    ],
)
def test_impossible_values_are_refused(registry, text, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(text)


@pytest.mark.parametrize("name", recipe_names())
def test_changing_nothing_keeps_every_recipe_as_it_is(name):
    settings = load_recipe(name).settings
    assert with_methods(settings, lambda kind, method: method) == settings
