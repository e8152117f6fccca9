"""What there is: methods with their fields, recipes with their published results."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from typing import Any

from attacks.attack import ATTACKS
from attacks.registry import Registry
from certify.bab.branching import BRANCHINGS
from certify.verifier import VERIFIERS
from robust.dataset import DATASETS
from robust.hook import HOOKS
from robust.layout import LAYOUTS
from robust.lipschitz_layer import LIPSCHITZ_LAYERS
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.optimizer import OPTIMIZERS
from robust.regularizer import REGULARIZERS
from robust.schedule import SCHEDULES
from robust.settings import Recipe, load_recipe, recipe_names
from robust.weight_perturbation import WEIGHT_PERTURBATIONS
from robust.weighting import WEIGHTINGS

KINDS: dict[str, Registry] = {
    "models": MODELS,
    "layouts": LAYOUTS,
    "lipschitz_layers": LIPSCHITZ_LAYERS,
    "data": DATASETS,
    "objectives": OBJECTIVES,
    "attacks": ATTACKS,
    "verifiers": VERIFIERS,
    "branchings": BRANCHINGS,
    "regularizers": REGULARIZERS,
    "weightings": WEIGHTINGS,
    "weight_perturbations": WEIGHT_PERTURBATIONS,
    "hooks": HOOKS,
    "schedules": SCHEDULES,
    "optimizers": OPTIMIZERS,
}


def print_methods(only: str | None) -> None:
    """Names, first sentences and fields of everything registered, or of one kind."""
    for kind, registry in KINDS.items():
        if only in (None, kind):
            print(f"{kind}:")
            for name in registry.names():
                entry = registry[name]
                print(
                    textwrap.fill(
                        f"{name}  {_first_paragraph(entry)}", 110, initial_indent="  ", subsequent_indent="      "
                    )
                )
                fields = [_field_text(field) for field in dataclasses.fields(entry) if field.init]
                if fields:
                    text = "fields: " + ", ".join(fields)
                    print(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="        "))


def method_facts(only: str | None) -> dict[str, Any]:
    """What `print_methods` prints, as JSON values: kind -> name -> first sentence and fields with their defaults."""
    return {
        kind: {
            name: {
                "words": _first_paragraph(registry[name]),
                "fields": {
                    field.name: _default_text(field) for field in dataclasses.fields(registry[name]) if field.init
                },
            }
            for name in registry.names()
        }
        for kind, registry in KINDS.items()
        if only in (None, kind)
    }


def _first_paragraph(entry: Any) -> str:
    return (inspect.getdoc(entry) or "").split("\n\n")[0].replace("\n", " ")


def _field_text(field: Any) -> str:
    default = _default_text(field)
    return f"{field.name} (required)" if default is None else f"{field.name}={default}"


def _default_text(field: Any) -> str | None:
    """A field's default as a method's text has it, None where it has none."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    nested = field.metadata.get("registry")
    if nested is not None and field.default is not None:
        return f"({nested.spell(field.default)})"
    return _plain(field.default)


def _plain(value: Any) -> str:
    """A field's value as a method's text has it."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def print_recipes(only: str | None) -> None:
    """All recipes with their published results, or one with its settings."""
    if only is not None:
        recipe = load_recipe(only)
        print(recipe.title)
        for name, value in recipe.settings.to_dict().items():
            print(f"  {name} = {value!r}")
        if recipe.note:
            print(textwrap.fill(recipe.note, 110, initial_indent="  note: ", subsequent_indent="        "))
        print(f"  published: {_published(recipe)}")
        print(f"  train it: robust train --recipe {only}")
        return
    for name in recipe_names():
        recipe = load_recipe(name)
        print(f"{name:<44} {_published(recipe)}")


def recipe_facts(only: str | None) -> dict[str, Any]:
    """What `print_recipes` prints, as JSON values: name -> title, note, settings and published result."""
    recipes = [load_recipe(name) for name in (recipe_names() if only is None else [only])]
    return {
        recipe.name: {
            "title": recipe.title,
            "note": recipe.note,
            "settings": recipe.settings.to_dict(),
            "published": None if recipe.published is None else dataclasses.asdict(recipe.published),
        }
        for recipe in recipes
    }


def _published(recipe: Recipe) -> str:
    row = recipe.published
    if row is None:
        return "-"
    figures = (("clean", row.clean), (row.attack or "attacked", row.adversarial), ("certified", row.certified))
    numbers = [f"{kind} {value}" for kind, value in figures if value]
    return f"{', '.join(numbers) or 'no figure'}   [{row.source}]"
