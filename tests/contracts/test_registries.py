"""Everything registered has words for its listing, frozen fields, and a text that loses nothing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from typing import Any, Literal

import pytest

from attacks.registry import Registry
from robust.listing import KINDS

METHODS = [(kind, name) for kind, registry in KINDS.items() for name in registry.names() if not name.endswith("_test")]


@pytest.fixture(params=METHODS, ids=lambda pair: "-".join(pair))
def registered(request: pytest.FixtureRequest) -> tuple[Registry, str]:
    kind, name = request.param
    return KINDS[kind], name


def test_it_is_a_frozen_dataclass_with_a_docstring_of_its_own(registered: tuple[Registry, str]) -> None:
    registry, name = registered
    entry = registry[name]
    assert dataclasses.is_dataclass(entry) and entry.__dataclass_params__.frozen  # type: ignore[attr-defined]
    text = inspect.getdoc(entry) or ""
    # dataclass() makes a docstring out of the signature where the author wrote none.
    assert text and not text.startswith(f"{entry.__name__}("), f"{registry.kind} {name} has no docstring"
    assert text.split("\n\n")[0].rstrip().endswith((".", ":", ")")), text.split("\n\n")[0]


def test_it_lives_in_the_folder_of_its_kind(registered: tuple[Registry, str]) -> None:
    registry, name = registered
    assert registry[name].__module__.startswith(registry.package + ".")


def required(registry: Registry, name: str) -> dict[str, Any]:
    """Values for the fields that have no default."""
    fields = [f for f in dataclasses.fields(registry[name]) if f.init]
    needed = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    return {f.name: ("some/file",) if "tuple" in str(f.type) else "some/file" for f in needed}


def test_its_text_gives_the_same_value_back(registered: tuple[Registry, str]) -> None:
    registry, name = registered
    method = registry[name](**required(registry, name))
    text = registry.spell(method)
    assert text == name or text.startswith(f"{name}:")
    assert registry.parse(text) == method and registry.spell(registry.parse(text)) == text


def test_every_field_changed_by_itself_survives_the_text(registered: tuple[Registry, str]) -> None:
    registry, name = registered
    entry = registry[name]
    hints = typing.get_type_hints(entry)
    for field in dataclasses.fields(entry):
        assert field.metadata.get("registry") is not None or _can_be_spelled(hints[field.name]), field.name
        for value in _others(field, hints[field.name]):
            try:
                method = entry(**{**required(registry, name), field.name: value})
            except (ValueError, TypeError):
                continue  # the method refuses this value, or has it only together with another one
            assert registry.parse(registry.spell(method)) == method, registry.spell(method)


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _can_be_spelled(hint: Any) -> bool:
    def plain(option: Any) -> bool:
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)[0] in (int, float, str)
        return option in (int, float, str, bool, type(None)) or typing.get_origin(option) is Literal

    return all(map(plain, _options(hint)))


def _others(field: Any, hint: Any) -> list[Any]:
    """A few values other than the default that fit the field's type."""
    found: list[Any] = []
    registry = field.metadata.get("registry")
    for option in _options(hint):
        if option is type(None):
            found.append(None)
        elif registry is not None:
            found += [registry.parse(name) for name in registry.names() if not required(registry, name)]
        elif option is bool:
            found += [True, False]
        elif option is int:
            found += [1, 2, 37]
        elif option is float:
            found += [1 / 3, 2 / 255, 1e-17, 12345.678]
        elif option is str:
            found += ["a/b.c"]
        elif typing.get_origin(option) is Literal:
            found += list(typing.get_args(option))
        elif typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            found += [(), (item(1),), (item(1), item(2), item(3))]
        if registry is not None:
            break
    return found


def test_every_file_of_a_kinds_folder_registers_something() -> None:
    """A file that is forgotten by its decorator would be silently absent from the listing."""
    for registry in KINDS.values():
        folder = importlib.import_module(registry.package)
        homes = {registry[name].__module__ for name in registry.names()}
        for module in pkgutil.iter_modules(folder.__path__):
            path = f"{registry.package}.{module.name}"
            exported = [v for v in vars(importlib.import_module(path)).values() if _is_method_of(v, path)]
            assert path in homes or not exported, f"{path} registers nothing"


def _is_method_of(value: Any, module: str) -> bool:
    return inspect.isclass(value) and value.__module__ == module and dataclasses.is_dataclass(value) and callable(value)
