"""VNN-LIB 1.0 properties: boxes of inputs, and output conditions that describe a counterexample.

The language is a part of SMT-LIB: `declare-const` of the reals X_0 .. X_{n-1} (the network's inputs, flat in C order)
and Y_0 .. Y_{K-1}, and `assert`ions built of `and`, `or`, `<=` and `>=` over linear terms. An assertion bounds single
inputs or relates outputs; comparisons are not strict, so a tie is a violation.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certify.formats.onnx import FormatError

MOST_DISJUNCTS = 100_000


@dataclass(frozen=True)
class Disjunct:
    """One way to violate the property: an input in the box whose outputs y satisfy `matrix y <= limit` in every row.

    Attributes:
        lb, ub: float64 `[n]`. matrix, limit: float64 `[m, K]` and `[m]`, m >= 1.
    """

    lb: np.ndarray
    ub: np.ndarray
    matrix: np.ndarray
    limit: np.ndarray

    def violated(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether input and outputs are a counterexample, without any tolerance."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        inside = bool(((self.lb <= x) & (x <= self.ub)).all())
        return inside and bool(np.isfinite(y).all()) and bool((self.matrix @ y <= self.limit).all())


@dataclass(frozen=True)
class Property:
    """What is not supposed to happen: any of the disjuncts. Numbers of inputs and outputs as declared."""

    inputs: int
    outputs: int
    disjuncts: tuple[Disjunct, ...]

    def violated(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether input `[n]` and outputs `[K]` are a counterexample, without any tolerance."""
        return any(disjunct.violated(x, y) for disjunct in self.disjuncts)


def load_vnnlib(path: Path) -> Property:
    """The property in a VNN-LIB 1.0 file, or in a gzipped one.

    Raises:
        FormatError: no such file, a syntax error, an unbounded input, a condition that is not linear, or one that mixes
            inputs and outputs.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: no text file ({error})") from None
    try:
        return parse_vnnlib(text)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def parse_vnnlib(text: str) -> Property:
    """The property in the text of a VNN-LIB 1.0 file; errors as `load_vnnlib`, without the file's name."""
    reader = _Reader()
    for line, command in _expressions(text):
        try:
            reader.read(command)
        except FormatError as error:
            raise FormatError(f"line {line}: {error}") from None
    return reader.property()


def counterexample_text(x: Sequence[float], y: Sequence[float]) -> str:
    """A counterexample as the competition's checker reads it; the digits give every number back exactly."""
    pairs = [f"(X_{i} {float(v)!r})" for i, v in enumerate(x)] + [f"(Y_{j} {float(v)!r})" for j, v in enumerate(y)]
    return "(" + "\n".join(pairs) + ")\n"


@dataclass(frozen=True)
class Instance:
    """One line of the competition's list: network, property, and seconds to decide it."""

    onnx: Path
    vnnlib: Path
    timeout: float


def load_instances(path: Path) -> list[Instance]:
    """Instances of a CSV file with lines `network,property,seconds`; files are named relative to it."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    found = []
    for number, row in lines:
        try:
            onnx, vnnlib, timeout = (cell.strip() for cell in row)
            found.append(Instance(path.parent / onnx, path.parent / vnnlib, float(timeout)))
        except ValueError:
            raise FormatError(
                f"{path}, line {number}: expected network.onnx,property.vnnlib,seconds, got {','.join(row)[:80]!r}"
            ) from None
    return found


_Linear = tuple[dict[str, float], float]
"""Coefficients by variable, and a constant."""

_Atom = tuple[dict[str, float], float]
"""`sum of coefficient * variable <= limit`."""


class _Reader:
    """Declarations and assertions so far: atoms that must all hold, and groups of which one conjunction must."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.common: list[_Atom] = []
        self.choices: list[list[list[_Atom]]] = []

    def read(self, command: Any) -> None:
        match command:
            case ["declare-const", str(name), "Real"]:
                if not re.fullmatch(r"[XY]_\d+", name):
                    raise FormatError(f"expected a variable X_i or Y_j, got {name!r}")
                self.names.add(name)
            case ["assert", condition]:
                alternatives = self._alternatives(condition)
                if len(alternatives) == 1:
                    self.common += alternatives[0]
                else:
                    self.choices.append(alternatives)
            case ["set-logic" | "set-info" | "set-option" | "check-sat" | "get-model" | "exit", *_]:
                pass
            case _:
                raise FormatError(f"expected (declare-const X_i Real) or (assert ...), got {_shown(command)}")

    def property(self) -> Property:
        inputs, outputs = self._count("X"), self._count("Y")
        base = _Box(inputs)
        rows = [atom for atom in self.common if not base.take(atom)]
        ways: list[list[_Atom]] = [[]]
        for alternatives in self.choices:
            ways = [way + more for way in ways for more in alternatives]
            if len(ways) > MOST_DISJUNCTS:
                raise FormatError(f"more than {MOST_DISJUNCTS} combinations of its disjunctions")
        disjuncts = []
        for way in ways:
            box = base.copy()
            conditions = rows + [atom for atom in way if not box.take(atom)]
            if (found := box.disjunct(conditions, outputs)) is not None:
                disjuncts.append(found)
        return Property(inputs, outputs, tuple(disjuncts))

    def _count(self, kind: str) -> int:
        numbers = sorted(int(name[2:]) for name in self.names if name[0] == kind)
        if not numbers or numbers != list(range(len(numbers))):
            raise FormatError(f"expected declarations of {kind}_0, {kind}_1, ..., got {len(numbers)} with gaps or none")
        return len(numbers)

    def _alternatives(self, condition: Any) -> list[list[_Atom]]:
        """A condition as a disjunction of conjunctions."""
        match condition:
            case ["<=", left, right]:
                return [[self._at_most(left, right)]]
            case [">=", left, right]:
                return [[self._at_most(right, left)]]
            case ["or", *parts] if parts:
                return [way for part in parts for way in self._alternatives(part)]
            case ["and", *parts] if parts:
                ways: list[list[_Atom]] = [[]]
                for part in parts:
                    ways = [way + more for way in ways for more in self._alternatives(part)]
                    if len(ways) > MOST_DISJUNCTS:
                        raise FormatError(f"more than {MOST_DISJUNCTS} combinations in one assertion")
                return ways
        raise FormatError(f"expected <=, >=, and, or, got {_shown(condition)}")

    def _at_most(self, left: Any, right: Any) -> _Atom:
        (first, constant), (second, other) = self._linear(left), self._linear(right)
        return _plus(first, second, -1.0), other - constant

    def _linear(self, term: Any) -> _Linear:
        match term:
            case str():
                if term in self.names:
                    return {term: 1.0}, 0.0
                return {}, _number(term)
            case ["+", *parts] if parts:
                return self._total([self._linear(part) for part in parts])
            case ["-", part]:
                return self._total([self._times(self._linear(part), -1.0)])
            case ["-", first, *parts] if parts:
                return self._total([self._linear(first), *(self._times(self._linear(p), -1.0) for p in parts)])
            case ["*", left, right]:
                first, second = self._linear(left), self._linear(right)
                if first[0] and second[0]:
                    raise FormatError(f"a product of two variables is not linear: {_shown(term)}")
                return self._times(first, second[1]) if first[0] else self._times(second, first[1])
        raise FormatError(f"expected a number, a declared variable, +, - or *, got {_shown(term)}")

    @staticmethod
    def _times(term: _Linear, factor: float) -> _Linear:
        return {name: factor * value for name, value in term[0].items()}, factor * term[1]

    @staticmethod
    def _total(terms: Sequence[_Linear]) -> _Linear:
        coefficients: dict[str, float] = {}
        for term in terms:
            coefficients = _plus(coefficients, term[0])
        return coefficients, sum(constant for _, constant in terms)


class _Box:
    """Bounds of the inputs while they are collected."""

    def __init__(self, inputs: int) -> None:
        self.lb, self.ub = np.full(inputs, -np.inf), np.full(inputs, np.inf)

    def copy(self) -> _Box:
        other = _Box(0)
        other.lb, other.ub = self.lb.copy(), self.ub.copy()
        return other

    def take(self, atom: _Atom) -> bool:
        """Use an atom about inputs; False for one about outputs."""
        coefficients, limit = {name: value for name, value in atom[0].items() if value}, atom[1]
        kinds = {name[0] for name in coefficients}
        if kinds == {"Y"}:
            return False
        if kinds != {"X"} or len(coefficients) != 1:
            raise FormatError(
                "every condition must bound one input by a number or relate outputs only, got one about "
                f"{', '.join(sorted(coefficients)[:4]) or 'no variable'}"
            )
        ((name, value),) = coefficients.items()
        place, bound = int(name[2:]), limit / value
        if value > 0:
            self.ub[place] = min(self.ub[place], bound)
        else:
            self.lb[place] = max(self.lb[place], bound)
        return True

    def disjunct(self, conditions: Sequence[_Atom], outputs: int) -> Disjunct | None:
        """The disjunct with these output conditions; None where the box is empty."""
        unbounded = np.flatnonzero(~(np.isfinite(self.lb) & np.isfinite(self.ub)))
        if len(unbounded):
            raise FormatError(f"input X_{unbounded[0]} is not bounded from both sides")
        if not conditions:
            raise FormatError("there is no condition on the outputs")
        matrix = np.zeros((len(conditions), outputs))
        for row, (coefficients, _) in zip(matrix, conditions, strict=True):
            for name, value in coefficients.items():
                row[int(name[2:])] = value
        limit = np.array([limit for _, limit in conditions])
        return Disjunct(self.lb, self.ub, matrix, limit) if (self.lb <= self.ub).all() else None


def _plus(left: dict[str, float], right: dict[str, float], factor: float = 1.0) -> dict[str, float]:
    total = dict(left)
    for name, value in right.items():
        total[name] = total.get(name, 0.0) + factor * value
    return total


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise FormatError(f"{text!r} is neither a number nor a declared variable") from None
    if not math.isfinite(value):
        raise FormatError(f"{text!r} is not finite")
    return value


def _expressions(text: str) -> Iterator[tuple[int, Any]]:
    """(line it begins in, parsed list) of each top-level expression."""
    stack: list[list[Any]] = []
    begin = 0
    for number, line in enumerate(text.splitlines(), 1):
        for token in re.findall(r"[()]|[^\s()]+", line.partition(";")[0]):
            if token == "(":
                begin = begin if stack else number
                stack.append([])
            elif token == ")" and stack:
                done = stack.pop()
                if stack:
                    stack[-1].append(done)
                else:
                    yield begin, done
            elif stack:
                stack[-1].append(token)
            else:
                raise FormatError(f"line {number}: expected '(', got {token!r}")
    if stack:
        raise FormatError(f"line {begin}: its parentheses are not closed; is the file truncated?")


def _shown(expression: Any) -> str:
    text = expression if isinstance(expression, str) else f"({' '.join(map(_shown, expression))})"
    return text if len(text) <= 60 else f"{text[:57]}..."
