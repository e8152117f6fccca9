"""The methods that a run's settings spell: read one, change fields, spell it back."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from attacks.registry import Registry
from robust.dataset import DATASETS
from robust.hook import HOOKS
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.optimizer import OPTIMIZERS
from robust.regularizer import REGULARIZERS
from robust.schedule import SCHEDULES
from robust.settings import Settings, SettingsError
from robust.weight_perturbation import WEIGHT_PERTURBATIONS
from robust.weighting import WEIGHTINGS

KINDS: dict[str, Registry] = {
    "data": DATASETS,
    "model": MODELS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "eps_schedule": SCHEDULES,
    "regularizers": REGULARIZERS,
    "weightings": WEIGHTINGS,
    "weight_perturbation": WEIGHT_PERTURBATIONS,
    "hooks": HOOKS,
}
"""Settings whose values are texts of methods; those of plural name hold several."""


def with_methods(settings: Settings, change: Callable[[str, Any], Any]) -> Settings:
    """Settings whose every method is `change(name of the setting, method)`."""

    def changed(name: str, text: str) -> str:
        method = KINDS[name].parse(text)
        other = change(name, method)
        return text if other == method else KINDS[name].spell(other)

    values: dict[str, Any] = {}
    for name in KINDS:
        value = getattr(settings, name)
        if isinstance(value, tuple):
            values[name] = tuple(changed(name, text) for text in value)
        elif value != "none":
            values[name] = changed(name, value)
    return dataclasses.replace(settings, **values)


def with_field(settings: Settings, path: str, text: str) -> Settings:
    """Settings with one value changed: `epochs`, or a method's field such as `objective.attack.steps`.

    Raises:
        SettingsError: no such setting or field, a value that it cannot have.
    """
    name, *fields = path.split(".")
    known = [field.name for field in dataclasses.fields(Settings)]
    if name not in known:
        raise SettingsError(f"{path}: no setting {name!r}{_nearest(name, known)}; settings: {', '.join(known)}")
    if not fields:
        value = getattr(settings, name)
        plain = int(text) if type(value) is int and text.lstrip("-").isdigit() else text
        return Settings.from_dict({**settings.to_dict(), name: plain})
    if name not in KINDS or isinstance(getattr(settings, name), tuple):
        single = [kind for kind in KINDS if not isinstance(getattr(settings, kind), tuple)]
        raise SettingsError(f"{path}: {name} is no single method with fields; these are: {', '.join(single)}")
    registry = KINDS[name]
    method = _changed(registry, registry.parse(getattr(settings, name)), fields, text, path)
    return Settings.from_dict({**settings.to_dict(), name: registry.spell(method)})


def value_at(settings: Settings, path: str) -> Any:
    """The value that `with_field` changes, for a path that it takes."""
    name, *fields = path.split(".")
    value = getattr(settings, name)
    if fields:
        value = KINDS[name].parse(value)
    for field in fields:
        value = getattr(value, field)
    return value


def _changed(registry: Registry, method: Any, fields: list[str], text: str, path: str) -> Any:
    field, *deeper = fields
    known = {item.name: item for item in dataclasses.fields(method) if item.init}
    spelled = registry.name_of(method)
    if field not in known:
        raise SettingsError(
            f"{path}: {registry.kind} {spelled!r} has no field {field!r}{_nearest(field, list(known))}; "
            f"fields: {', '.join(known) or 'none'}"
        )
    if not deeper:
        try:
            # Read by the registry, which knows the field's type, beside the values that the other fields have.
            value = getattr(registry.parse(f"{spelled}:{field}={text}"), field)
            return dataclasses.replace(method, **{field: value})
        except ValueError as error:
            raise SettingsError(f"{path}: {error}") from None
    inner = known[field].metadata.get("registry")
    if inner is None or getattr(method, field) is None:
        raise SettingsError(f"{path}: field {field!r} of {registry.kind} {spelled!r} holds no method")
    return dataclasses.replace(method, **{field: _changed(inner, getattr(method, field), deeper, text, path)})


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
