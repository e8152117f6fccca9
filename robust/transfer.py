"""Transfer: points that were crafted on one model, tried on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.mode import attack_mode
from attacks.threat import Ball
from certify.precision import exact_arithmetic
from certify.verdict import logits_of
from robust.images import Images


@dataclass(frozen=True)
class Transfer:
    """Accuracies of models on points that were crafted on each of them.

    Attributes:
        models: names, in the order of rows and columns.
        clean: accuracy of each model without perturbation.
        accuracy: accuracy[i][j] of model j on the points crafted on model i, over all examples. The diagonal is the
            white-box result; an entry below it in its column means that the white-box attack on model j is too weak.
        examples: how many there were.
    """

    models: tuple[str, ...]
    clean: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]
    examples: int

    def masked(self, limit: float = 0.0) -> list[tuple[str, str]]:
        """(source, target) where transfer beats the white-box attack on the target by more than `limit`."""
        names = list(enumerate(self.models))
        return [
            (source, target)
            for i, source in names
            for j, target in names
            if i != j and self.accuracy[i][j] < self.accuracy[j][j] - limit
        ]


def transfer(
    models: Mapping[str, nn.Module], x: Tensor, y: Tensor, ball: Ball, attack: Attack, batch_size: int = 100
) -> Transfer:
    """Attack each model and try its points on all of them.

    Args:
        models: by name, all on the device of x; used in evaluation mode and left as they were.
        x, y: images in the ball's pixel range and their true classes.
        attack: called with each model; of examples that the source gets wrong most attacks return the clean image.
    """
    if not len(x):
        raise ValueError("transfer needs examples, got none")
    index = torch.arange(len(x), device=x.device)
    correct: dict[str, list[Tensor]] = {name: [] for name in models}
    clean: list[Tensor] = []
    for name, model in models.items():
        with attack_mode(model):
            clean.append(logits_of(model, x).argmax(1) == y)
            with exact_arithmetic():
                parts = [_attacked(model, x, y, ball, attack, rows) for rows in index.split(batch_size)]
        points = torch.cat(parts)
        for target in models.values():
            with attack_mode(target):
                correct[name].append(logits_of(target, points).argmax(1) == y)
    return Transfer(
        models=tuple(models),
        clean=tuple(_share(flags) for flags in clean),
        accuracy=tuple(tuple(_share(flags) for flags in row) for row in correct.values()),
        examples=len(x),
    )


def stored_points(
    model: nn.Module,
    images: Images,
    ball: Ball,
    attack: Attack,
    copies: int,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Points of the model around all images, `copies` of each, in whole grey levels: uint8 `[copies, N, C, H, W]`.

    A pixel moves by at most half a grey level when it is rounded; an linf ball of whole grey levels around images of
    grey levels is never left. The copies differ in the attack's seed.
    """
    found = []
    for copy in range(copies):
        seeded = replace(attack, seed=copy)  # type: ignore[type-var]
        for rows in torch.arange(len(images)).split(batch_size):
            x, y = images.batch(rows, device)
            with attack_mode(model), exact_arithmetic():
                points = ball.project(seeded(model, x, y, ball, index=rows), x)
            found.append((255 * points).round().to("cpu", torch.uint8))
    return torch.cat(found).unflatten(0, (copies, len(images)))


def _attacked(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, rows: Tensor) -> Tensor:
    here = ball.select(rows)
    return here.project(attack(model, x[rows], y[rows], here, index=rows.cpu()), x[rows])


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
