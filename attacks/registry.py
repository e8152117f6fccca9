"""Registries: a method joins the suite by being written in its folder, and is spelled as one line of text.

    @ATTACKS.register("pgd")
    @dataclass(frozen=True)
    class PGD: ...

    ATTACKS.parse("pgd:steps=20,restarts=3")   ->  PGD(steps=20, restarts=3)
    ATTACKS.spell(PGD(steps=20, restarts=3))   ->  "pgd:steps=20,restarts=3"

A method is a frozen dataclass. Text to value to text loses nothing: floats are spelled by `repr`, a fraction such as
8/255 may be typed, a tuple is spelled with `+` between its items (`milestones=120+140`), and a field that holds
another method stands in parentheses: `sabr:box=0.1,attack=(pgd:steps=8,restarts=3)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

Method = TypeVar("Method")


class UnknownName(ValueError):
    """A name or a field that no registered method has; the message lists the ones that exist."""


class Registry:
    """Methods of one kind by name.

    Args:
        kind: singular noun used in messages, "attack".
        package: dotted name of the folder whose files register methods; imported on first look-up.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[Method]], type[Method]]:
        """Class decorator that makes a frozen dataclass known under `name`."""

        def add(method: type[Method]) -> type[Method]:
            if not dataclasses.is_dataclass(method):
                raise TypeError(f"{self.kind} {name!r}: {method.__qualname__} must be a dataclass (frozen=True)")
            known = self._entries.get(name)
            if known is not None and _home(known) != _home(method):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {_home(known)} and {_home(method)}")
            self._entries[name] = method
            return method

        return add

    def names(self) -> list[str]:
        """Known names in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> type:
        """Class registered under `name`; UnknownName lists the known names and the nearest one."""
        self._load()
        if name not in self._entries:
            raise UnknownName(
                f"no {self.kind} named {name!r}{_nearest(name, self._entries)}; known: {', '.join(self.names())}"
            )
        return self._entries[name]

    def name_of(self, method: object) -> str:
        """Registered name of a method's class."""
        self._load()
        for name, entry in self._entries.items():
            if type(method) is entry:
                return name
        raise UnknownName(f"{type(method).__qualname__} is no registered {self.kind}; known: {', '.join(self.names())}")

    def parse(self, text: str) -> Any:
        """Method that `text` spells, such as "pgd:steps=20,step_size=2/255"."""
        name, _, rest = text.strip().partition(":")
        entry = self[name]
        fields = {f.name: f for f in dataclasses.fields(entry) if f.init}
        hints = typing.get_type_hints(entry)
        values: dict[str, Any] = {}
        for item in _split(rest, ","):
            key, equals, value = item.partition("=")
            key = key.strip()
            if not equals:
                raise UnknownName(f"{self.kind} {name!r}: expected field=value, got {item!r}")
            if key not in fields:
                raise UnknownName(
                    f"{self.kind} {name!r} has no field {key!r}{_nearest(key, fields)}; "
                    f"fields: {', '.join(fields) or 'none'}"
                )
            if key in values:
                raise UnknownName(f"{self.kind} {name!r}: field {key!r} is given twice")
            try:
                values[key] = _read(value.strip(), hints[key], fields[key])
            except UnknownName:
                raise
            except ValueError as error:
                raise UnknownName(f"{self.kind} {name!r}, field {key!r}: {error}") from None
        lacking = [key for key, field in fields.items() if key not in values and _default(field) is dataclasses.MISSING]
        if lacking:
            raise UnknownName(f"{self.kind} {name!r} needs {', '.join(lacking)}: {name}:{lacking[0]}=...")
        return entry(**values)

    def spell(self, method: object) -> str:
        """Shortest text that `parse` turns back into `method`: fields at their defaults are left out."""
        items = []
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            value = getattr(method, field.name)
            if field.init and value != _default(field):
                items.append(f"{field.name}={_write(value, field)}")
        return self.name_of(method) + (":" + ",".join(items) if items else "")

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


def method_field(registry: Registry, default: object) -> Any:
    """Dataclass field that holds a method of `registry`, spelled in parentheses inside the outer method's text.

    Where the method may be absent, annotate it `X | None`; the word "none" spells that.
    """
    return dataclasses.field(default=default, metadata={"registry": registry})


def number(text: str) -> float:
    """Float from "0.1", "1e-3" or a fraction such as "8/255"; nan is as wrong as a word."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"expected a number such as 0.1 or 8/255, got {text!r}")
    return value


def _read(text: str, hint: Any, field: dataclasses.Field) -> Any:
    registry = field.metadata.get("registry")
    options = _options(hint)
    if type(None) in options and text == "none":
        return None
    if registry is not None:
        return registry.parse(text[1:-1] if text.startswith("(") and text.endswith(")") else text)
    for option in options:
        if option is type(None):
            continue
        return _convert(text, option)
    raise TypeError(f"field {field.name!r} has no type that text can spell: {hint}")


def _convert(text: str, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_convert(part, item) for part in text.split("+")) if text else ()
    if origin is Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(map(str, choices))}, got {text!r}")
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text == "true"
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"expected a whole number, got {text!r}") from None
    if hint is float:
        return number(text)
    if hint is str:
        return text
    raise TypeError(f"no text form for {hint}")


def _write(value: Any, field: dataclasses.Field) -> str:
    registry = field.metadata.get("registry")
    if value is None:
        return "none"
    if registry is not None:
        return f"({registry.spell(value)})"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand outside parentheses; empty text has none."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    if depth:
        raise UnknownName(f"parentheses do not match in {text!r}")
    return [*parts, current] if text.strip() else []


def _home(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
