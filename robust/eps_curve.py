"""Accuracies over growing radii: how fast certified and attacked accuracy fall as the ball grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS, Attack
from attacks.mode import attack_mode
from attacks.threat import Ball
from certify.precision import exact_arithmetic
from certify.verdict import logits_of
from certify.verifier import VERIFIERS
from robust.checkpoint import ball_facts
from robust.evaluate import AnyVerifier, classified, describe, seeded


@dataclass(frozen=True)
class EpsCurve:
    """Accuracies over growing radii, for plots.

    Attributes:
        norm: of the ball. eps: radii in pixel units, ascending.
        certified, under_attack: fraction of all examples at each radius; empty where not measured.
        clean: fraction right without perturbation. examples: how many were used.
        verifier, attack: what measured `certified` and `under_attack`, as text.
    """

    norm: str
    eps: tuple[float, ...]
    certified: tuple[float, ...] = ()
    under_attack: tuple[float, ...] = ()
    clean: float | None = None
    examples: int = 0
    verifier: str = ""
    attack: str = ""

    def __post_init__(self) -> None:
        for name in ("certified", "under_attack"):
            if len(getattr(self, name)) not in (0, len(self.eps)):
                raise ValueError(f"expected {len(self.eps)} values of {name}, got {len(getattr(self, name))}")


def certified_over_eps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    factors: Sequence[float],
    bound: AnyVerifier,
    batch_size: int = 100,
) -> list[float]:
    """Fraction of all examples that `bound` certifies in the ball scaled by each factor, in the order of `factors`.

    The largest ball comes first: what is certified there is certified in every smaller one, so the fractions never
    grow with the radius, and `bound` sees only what larger balls left.

    Args:
        images, labels: [N, C, H, W] in [0, 1] and [N], where the model is.
        bound: a cheap verifier.
    """

    def proved(x: Tensor, y: Tensor, scaled: Ball) -> list[bool]:
        return [verdict.status == "certified" for verdict in bound(model, x, y, scaled)]

    with attack_mode(model):
        radius = _first_hit(proved, model, images, labels, ball, sorted(factors, reverse=True), batch_size)
    return [_share(r is not None and factor <= r for r in radius) for factor in factors]


def attacked_over_eps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    factors: Sequence[float],
    attack: Attack,
    batch_size: int = 100,
) -> list[float]:
    """Fraction of all examples that stay right under the attack in the ball scaled by each factor.

    The smallest ball comes first: a witness found there lies in every larger one, too.
    """

    def broken(x: Tensor, y: Tensor, scaled: Ball) -> list[bool]:
        with exact_arithmetic():
            x_adv = scaled.project(attack(model, x, y, scaled), x)
        return (logits_of(model, x_adv).argmax(dim=1) != y).tolist()

    with attack_mode(model):
        right = _right(model, images, labels, batch_size)
        radius = _first_hit(broken, model, images, labels, ball, sorted(factors), batch_size)
    pairs = list(zip(right, radius, strict=True))
    return [_share(ok and (r is None or factor < r) for ok, r in pairs) for factor in factors]


def eps_curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    factors: Sequence[float],
    bound: AnyVerifier | None = None,
    attack: Attack | None = None,
    batch_size: int = 100,
) -> EpsCurve:
    """Clean, attacked and certified accuracy over radii, for a plot; `factors` multiply the radius of `ball`."""
    factors, facts = sorted(factors), ball_facts(ball)
    arguments = (model, images, labels, ball, factors)
    with attack_mode(model):
        clean = _share(_right(model, images, labels, batch_size))
    return EpsCurve(
        norm=facts["norm"],
        eps=tuple(facts["eps"] * factor for factor in factors),
        certified=tuple(certified_over_eps(*arguments, bound, batch_size)) if bound else (),
        under_attack=tuple(attacked_over_eps(*arguments, attack, batch_size)) if attack else (),
        clean=clean,
        examples=len(images),
        verifier=describe(VERIFIERS, bound) or "",
        attack=describe(ATTACKS, attack) or "",
    )


def _first_hit(
    test: Callable[[Tensor, Tensor, Ball], list[bool]],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    factors: Sequence[float],
    batch_size: int,
) -> list[float | None]:
    """For each example the first factor at which `test` holds, None where there is none or the clean image is wrong."""
    result: list[float | None] = [None] * len(images)
    right = _right(model, images, labels, batch_size)
    for start in range(0, len(images), batch_size):
        left = [i for i in range(start, min(start + batch_size, len(images))) if right[i]]
        for factor in factors:
            if not left:
                break
            chosen = torch.tensor(left, device=images.device)
            with seeded(start, images.device):
                hits = test(images[chosen], labels[chosen], ball.select(chosen).scaled(factor))
            for i, hit in zip(left, hits, strict=True):
                result[i] = factor if hit else None
            left = [i for i in left if result[i] is None]
    return result


def _right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[bool]:
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return [right for x, y in batches for right in classified(logits_of(model, x), y).tolist()]


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else math.nan
