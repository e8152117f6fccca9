"""Early-stopped PGD: points that are wrong, but only just."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.attack import ATTACKS, noise_of
from attacks.gradient import Precision, differentiate, forward
from attacks.losses import LOSSES, REFERENCE_LOSSES, misclassified
from attacks.methods.pgd import Start, start_points
from attacks.mode import Mode, Model, attack_mode
from attacks.noise import normal
from attacks.region import Unit, region_around
from attacks.threat import Ball


@ATTACKS.register("friendly_pgd")
@dataclass(frozen=True)
class FriendlyPGD:
    """PGD in which an example stops as soon as it is misclassified and has `patience` such steps behind it (Zhang et
    al. 2020, algorithm 1).

    Needs: gradients in the input. Returns: the point at which each example stopped, in the order of the batch. Meant
    for training (FAT); as a test of robustness it is weaker than PGD. Neither sound nor complete.

    Args:
        steps, step_size, loss, start, unit, mode, precision, seed: see PGD.
        patience: tau, steps that an example still takes from misclassified points.
        noise: standard deviation of the Gaussian noise that joins every step, in pixel units (omega).
    """

    steps: int = 10
    step_size: float = 0.007 / 0.031
    patience: int = 0
    noise: float = 1e-3
    loss: Literal["cross_entropy", "kl"] = "cross_entropy"
    start: Start = "uniform"
    unit: Unit = "eps"
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    # Each part of a mini-batch would take as many passes, and as much noise, as its own slowest example.
    undivided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.patience < 0 or self.noise < 0:
            raise ValueError(f"expected steps, patience and noise >= 0, got {self}")

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
        pace: Tensor | None = None,
    ) -> Tensor:
        """See `Attack`; `pace` multiplies the steps of every example, `[B]`."""
        noise = noise_of(self.seed, x, generator, index)
        region = region_around(x, ball, self.unit)
        region = region if pace is None else region.paced(pace)
        points = start_points(self.start, x, region, noise(None, 0))
        with attack_mode(model, self.mode):
            labels: tuple[Tensor, ...] = (y,)
            loss = LOSSES["cross_entropy"]
            if self.loss == "kl":
                with torch.no_grad():
                    labels, loss = (y, forward(model, x, self.precision)), REFERENCE_LOSSES["kl"]
            rows = torch.arange(len(x), device=x.device)
            patience = torch.full_like(y, self.patience)
            for step in range(self.steps):
                here = tuple(label[rows] for label in labels)
                gradient, _, logits = differentiate(model, loss, points[rows], here, self.precision)
                wrong = misclassified(logits, here[0])
                left = ~wrong | (patience > 0)
                rows, gradient, patience = rows[left], gradient[left], (patience - wrong.to(patience))[left]
                if not len(rows):
                    break
                moved = points[rows]
                if self.noise:
                    moved = moved + self.noise * normal(moved.shape, moved, noise(rows, 0, step + 1))
                points[rows] = region.select(rows).climb_(moved, gradient, self.step_size)
        return points
