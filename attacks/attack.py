"""What an attack is: a frozen value that, called with a model, examples and a threat model, proposes points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from attacks.losses import misclassified
from attacks.mode import Model
from attacks.noise import Generators, streams
from attacks.registry import Registry
from attacks.threat import Ball, make_ball

ATTACKS = Registry("attack", "attacks.methods")


@runtime_checkable
class Attack(Protocol):
    """Interface of all attacks.

    Attributes:
        norms: norms of the balls that the attack can search.
        seed: key of its noise where no generator is given.
    """

    norms: ClassVar[tuple[str, ...]]

    @property
    def seed(self) -> int: ...

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Point proposed for each example: detached, truly inside the ball; same shape as x.

        Args:
            model: maps pixels in the ball's range to logits [B, K].
            x, y: clean inputs [B, ...] and true classes [B].
            generator: source of all noise, drawn for the whole batch (training). None: every example has streams of
                its own, keyed by (seed, restart, its number).
            index: numbers of the examples [B], their positions in the batch by default; with the numbers in the data
                set, the noise of an example does not depend on the batch it comes in.
        """
        ...


@runtime_checkable
class Ensemble(Attack, Protocol):
    """An attack made of attacks, whose outcomes a report tells apart.

    Attributes:
        individual: whether an evaluation tries every attack on every example, not only on those that the attacks
            before it left.
    """

    @property
    def individual(self) -> bool: ...

    def stages(self, ball: Ball) -> dict[str, Attack]:
        """The attacks by name, in the order in which they run."""
        ...


Noise = Callable[..., Generators]
"""(rows, *keys) -> generators for those rows of the batch (None: all of them); keys tell restarts and targets apart."""


def noise_of(seed: int, x: Tensor, generator: torch.Generator | None, index: Tensor | None) -> Noise:
    """Where an attack on x takes its noise from: the generator, or private streams of each example."""
    numbers = range(len(x)) if index is None or generator is not None else index.tolist()

    def generators(rows: Tensor | None, *keys: int) -> Generators:
        if generator is not None:
            return generator
        return streams(seed, numbers if rows is None else [numbers[row] for row in rows.tolist()], *keys)

    return generators


def require_norm(attack: Attack, ball: Ball) -> None:
    """ValueError where the attack has no steps for the ball's norm."""
    if ball.norm not in attack.norms:
        known = ", ".join(attack.norms)
        raise ValueError(f"{type(attack).__name__} has no steps for the norm {ball.norm}; it knows: {known}")


def as_torchattack(attack: Attack, model: Model, ball: Ball) -> Callable[[Tensor, Tensor], Tensor]:
    """The attack as code written for the torchattacks package calls it: (images, labels) -> adversarial images.

    Images outside the pixel range are a ValueError: they were normalised, and the radius would not mean pixels.
    """

    def propose(images: Tensor, labels: Tensor) -> Tensor:
        if ball.pixel_range is not None and images.numel():
            low, high = float(images.min()), float(images.max())
            if low < ball.pixel_range[0] or high > ball.pixel_range[1]:
                raise ValueError(
                    f"images span [{low:g}, {high:g}], the pixel range is {list(ball.pixel_range)}; "
                    "put the normalisation into the model's first layer"
                )
        return attack(model, images, labels, ball)

    return propose


def as_foolbox_attack(attack: Attack, norm: str) -> Callable[..., tuple[Any, Any, Tensor]]:
    """The attack as code written for Foolbox calls it: (model, inputs, criterion, epsilons=) -> (points, points,
    success), lists over the radii where several are given.

    Args:
        norm: of the balls. Their pixel range is the model's bounds.
    """

    def propose(model: Any, inputs: Tensor, criterion: Any, *, epsilons: Any) -> tuple[Any, Any, Tensor]:
        labels = getattr(criterion, "labels", criterion)
        labels = getattr(labels, "raw", labels)
        radii = list(epsilons) if isinstance(epsilons, Iterable) else [epsilons]
        balls = [make_ball(norm, radius, tuple(model.bounds)) for radius in radii]
        points = [attack(model, inputs, labels, ball) for ball in balls]
        with torch.no_grad():
            success = torch.stack([misclassified(model(found), labels) for found in points])
        if isinstance(epsilons, Iterable):
            return points, points, success
        return points[0], points[0], success[0]

    return propose
