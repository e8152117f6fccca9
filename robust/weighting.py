"""Registry of weightings: factors on the loss terms, the radius and the attack's steps, per example or per class.

A weighting is a frozen dataclass; one that learns from the run (class statistics, past losses) has `start(run)`, see
`robust.active`. Several of them act one behind the other.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from attacks.attack import ATTACKS
from attacks.registry import Registry
from robust.active import RunFacts
from robust.views import Views

WEIGHTINGS = Registry("weighting", "robust.weightings")

DIVERGENCES = frozenset({"kl", "distillation", "clean_distillation", "smooth"})
"""Terms that compare two predictions; all others compare a prediction, or a bound of it, with the label."""


class Radius(NamedTuple):
    """Factors on the radius and on the length of the attack's steps, each `[B]`."""

    eps: Tensor
    step: Tensor


class Weighting:
    """Base of all weightings; what a method leaves out changes nothing.

    Attributes:
        needs_kappa: whether `views.kappa` is read; attacks then count it.
    """

    needs_kappa: ClassVar[bool] = False

    def radius(self, y: Tensor) -> Radius | None:
        """Factors for examples with the labels y `[B]`, asked for before the attack; None for 1."""
        return None

    def __call__(self, views: Views, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objective's terms, each `[B]`, times their weights; a weighting may also replace terms."""
        return terms


Normalisation = Literal["none", "mean_one", "sum_one"]


def weighted(terms: dict[str, Tensor], weight: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The terms, of which those named are multiplied by `weight` `[B]`."""
    return {name: weight * value if name in names else value for name, value in terms.items()}


def weighted_term(terms: dict[str, Tensor], weight: Tensor, name: str, method: str) -> dict[str, Tensor]:
    """The terms, of which the one named is multiplied by `weight` `[B]`.

    Raises:
        ValueError: the objective has no such term.
    """
    if name not in terms:
        raise ValueError(f"{method} weights the term {name!r}, and the objective has {', '.join(terms)}; set term=")
    return weighted(terms, weight, (name,))


def check_start(name: str, start_epoch: float, run: RunFacts) -> None:
    """ValueError where the run ends before the weights would act."""
    if start_epoch >= run.epochs:
        raise ValueError(
            f"{name}: start_epoch={start_epoch:g} of {run.epochs} epochs leaves none with weights; give a smaller one, "
            f"such as {name}:start_epoch={run.epochs // 2}"
        )


def check_class_steps(name: str, run: RunFacts) -> None:
    """ValueError where the run's objective has an attack whose steps cannot be scaled per example."""
    for attack in _attacks_in(run.objective):
        if "pace" not in inspect.signature(attack.__call__).parameters:
            raise ValueError(
                f"{name} gives every class a radius and steps of its own, and the attack {ATTACKS.spell(attack)} has "
                "no such steps; give the objective pgd, fgsm or friendly_pgd"
            )


def _attacks_in(method: Any) -> Iterator[Any]:
    """Attacks among the fields of a method, those of methods among them included."""
    for field in dataclasses.fields(method) if dataclasses.is_dataclass(method) else ():
        value = getattr(method, field.name)
        if any(isinstance(value, ATTACKS[name]) for name in ATTACKS):
            yield value
        else:
            yield from _attacks_in(value)


def label_terms(terms: dict[str, Tensor]) -> list[str]:
    """Names of the terms that compare with the label."""
    return [name for name in terms if name not in DIVERGENCES]


def normalised(weight: Tensor, rule: Normalisation) -> Tensor:
    """Weights `[B]` scaled to mean 1 or to sum 1 over the batch; 0 throughout stays 0."""
    if rule == "none":
        return weight
    total = weight.sum().clamp(min=1e-12)
    return weight / total if rule == "sum_one" else weight * (len(weight) / total)


def radius_of(weightings: Sequence[Weighting], y: Tensor) -> Radius | None:
    """Product of all weightings' factors."""
    product = None
    for weighting in weightings:
        factors = weighting.radius(y)
        if factors is not None:
            one = product or Radius(*(factors.eps.new_ones(()),) * 2)
            product = Radius(one.eps * factors.eps, one.step * factors.step)
    return product
