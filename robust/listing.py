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
                first = (inspect.getdoc(entry) or "").split("\n\n")[0].replace("\n", " ")
                print(textwrap.fill(f"{name}  {first}", 110, initial_indent="  ", subsequent_indent="      "))
                fields = [_field_text(registry, entry, field) for field in dataclasses.fields(entry) if field.init]
                if fields:
                    text = "fields: " + ", ".join(fields)
                    print(textwrap.fill(text, 110, initial_indent="      ", subsequent_indent="        "))


def _field_text(registry: Registry, entry: Any, field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"{field.name} (required)"
    nested = field.metadata.get("registry")
    if nested is not None and field.default is not None:
        return f"{field.name}=({nested.spell(field.default)})"
    return f"{field.name}={_plain(field.default)}"


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


def _published(recipe: Recipe) -> str:
    row = recipe.published
    if row is None:
        return "-"
    figures = (("clean", row.clean), (row.attack or "attacked", row.adversarial), ("certified", row.certified))
    numbers = [f"{kind} {value}" for kind, value in figures if value]
    return f"{', '.join(numbers) or 'no figure'}   [{row.source}]"
