"""Methods as text: nothing is lost on the way there and back, and a mistyped word is answered with the known ones."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Literal

import pytest

from attacks.attack import ATTACKS
from attacks.registry import Registry, UnknownName, method_field, number

TOYS = Registry("toy", "attacks.methods")


@TOYS.register("ball")
@dataclass(frozen=True)
class Ball:
    radius: float = 1.0


@TOYS.register("kite")
@dataclass(frozen=True)
class Kite:
    tails: int = 2
    length: float = 1.5
    marks: tuple[float, ...] = (0.5, 0.75)
    knots: tuple[int, ...] = ()
    loud: bool = False
    colour: Literal["red", "blue"] = "red"
    name: str = "kite"
    wind: float | None = None
    toy: Ball = method_field(TOYS, Ball())
    spare: Ball | None = method_field(TOYS, None)


@TOYS.register("box")
@dataclass(frozen=True)
class Box:
    first: Kite | Ball = method_field(TOYS, Ball())
    second: Kite | Ball = method_field(TOYS, Kite())


VALUES = [
    Kite(),
    Kite(tails=-1, length=8 / 255),
    Kite(marks=(0.1,), knots=(3, 14, 15)),
    Kite(marks=()),
    Kite(loud=True, colour="blue", name="long-tail"),
    Kite(wind=1e-30),
    Kite(toy=Ball(0.1), spare=Ball()),
    Kite(length=float("inf")),
    Box(),
    Box(first=Kite(marks=(0.1, 0.2), toy=Ball(2.0)), second=Ball(1 / 3)),
]


@pytest.mark.parametrize("value", VALUES, ids=TOYS.spell)
def test_a_method_comes_back_from_its_text_unchanged(value):
    assert TOYS.parse(TOYS.spell(value)) == value


def test_defaults_are_left_out_of_the_text_and_fractions_may_be_typed():
    assert TOYS.spell(Kite()) == "kite"
    assert TOYS.spell(Kite(tails=3, toy=Ball(2.0))) == "kite:tails=3,toy=(ball:radius=2.0)"
    assert TOYS.parse("kite:length=8/255") == Kite(length=8 / 255)
    assert TOYS.parse(" kite:tails = 3 ") == Kite(tails=3)
    assert TOYS.parse("box:first=(kite:toy=(ball:radius=3),marks=0.1+0.2)") == Box(
        first=Kite(toy=Ball(3.0), marks=(0.1, 0.2))
    )
    assert TOYS.parse("kite:toy=ball") == Kite()


def probes(attack: type) -> list[object]:
    """The attack with its defaults, and with each number, string and flag changed."""
    changed = {int: [3], float: [1 / 3, 1e-9], str: [], bool: [True], tuple: [(0.25,), ()]}
    needed = {field.name: "a name" for field in fields(attack) if field.default is MISSING}
    made = [attack(**needed)]
    for field in fields(attack):
        words = [("a", "b=2"), ()] if field.type == "tuple[str, ...]" else None
        for value in words or changed.get(type(field.default), []):
            made.append(attack(**needed, **{field.name: value}))
    return made


@pytest.mark.parametrize("name", ATTACKS.names())
def test_every_attack_comes_back_from_its_text_unchanged(name):
    for attack in probes(ATTACKS[name]):
        assert ATTACKS.parse(ATTACKS.spell(attack)) == attack
        assert ATTACKS.name_of(attack) == name


@pytest.mark.parametrize(
    "text, message",
    [
        ("kit", "no toy named 'kit' \\(did you mean 'kite'\\?\\); known: ball, box, kite"),
        ("zebra", "no toy named 'zebra'; known: ball, box, kite"),
        ("", "no toy named ''"),
        ("kite:tail=3", "has no field 'tail' \\(did you mean 'tails'\\?\\); fields: tails, length"),
        ("kite:tails", "expected field=value, got 'tails'"),
        ("kite:tails=3,tails=4", "'tails' is given twice"),
        ("kite:tails=three", "field 'tails': expected a whole number, got 'three'"),
        ("kite:tails=1.5", "expected a whole number"),
        ("kite:length=long", "expected a number such as 0.1 or 8/255, got 'long'"),
        ("kite:length=1/0", "expected a number"),
        ("kite:loud=yes", "expected true or false, got 'yes'"),
        ("kite:colour=green", "expected one of red, blue, got 'green'"),
        ("kite:marks=0.1+x", "expected a number"),
        ("kite:toy=(bal)", "did you mean 'ball'"),
        ("kite:toy=(ball", "parentheses do not match"),
        ("kite:toy=ball)", "parentheses do not match"),
    ],
)
def test_a_mistyped_text_is_answered_with_what_was_expected(text, message):
    with pytest.raises(UnknownName, match=message):
        TOYS.parse(text)


def test_names_are_listed_and_looked_up():
    assert TOYS.names() == list(TOYS) == ["ball", "box", "kite"]
    assert "kite" in TOYS and "zebra" not in TOYS
    assert TOYS["kite"] is Kite and TOYS.name_of(Kite()) == "kite"
    with pytest.raises(UnknownName, match="object is no registered toy; known: ball, box, kite"):
        TOYS.name_of(object())


def test_only_dataclasses_register_and_a_name_belongs_to_one_class():
    registry = Registry("toy", "attacks.methods")
    with pytest.raises(TypeError, match="must be a dataclass"):
        registry.register("plain")(object)
    registry.register("ball")(Ball)
    registry.register("ball")(Ball)  # the same class once more, as when a module is imported again
    with pytest.raises(ValueError, match="'ball' is registered twice"):
        registry.register("ball")(Kite)


@pytest.mark.parametrize("bottom", [3, 255])
@pytest.mark.parametrize("top", [1, 2, 36])
def test_fractions_are_the_quotient_of_their_parts(top, bottom):
    assert number(f"{top}/{bottom}") == top / bottom


def test_a_field_without_a_default_is_asked_for():
    registry = Registry("toy", "attacks.methods")

    @registry.register("yo-yo")
    @dataclass(frozen=True)
    class YoYo:
        string: float
        colour: str = "red"

    assert registry.parse("yo-yo:string=0.5") == YoYo(0.5)
    with pytest.raises(UnknownName, match="toy 'yo-yo' needs string: yo-yo:string="):
        registry.parse("yo-yo:colour=blue")


@pytest.mark.parametrize("text", ["nan", "nan/255", "-nan", "inf/inf"])
def test_no_field_takes_nan(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number such as"):
        number(text)
