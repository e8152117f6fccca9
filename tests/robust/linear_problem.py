"""A linear model on a tiny data set: its exact robust margin is known, and so is the point where it is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attacks.threat import Ball, LinfBall
from robust.dataset import DataSet
from robust.images import MemoryImages
from robust.model import MODELS

SHAPE, CLASSES = (1, 3, 3), 3
BALL = LinfBall(0.05, None)


@dataclass(frozen=True)
class Decision:
    """Stands in for a verdict, so that these tests choose its every field."""

    status: Literal["certified", "falsified", "unknown", "misclassified"]
    margin_lb: float
    method: str = "exact"
    seconds: float = 0.5
    witness: Tensor | None = None
    precision: str = "float64"
    domains: int = 0


@dataclass(frozen=True)
class ExactLinear:
    """Sound and complete for a linear model without a pixel range: the margin falls by eps times a dual norm."""

    witnesses: bool = True

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None) -> list[Any]:
        point, margin = worst_point(model, x, y, ball)
        return [
            Decision("certified", m)
            if m > 0
            else Decision("falsified", m, witness=p)
            if self.witnesses
            else Decision("unknown", -math.inf)
            for p, m in zip(point, margin.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class WorstPoint:
    """Attack that moves a share of eps straight towards the nearest other class."""

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    share: float = 1.0
    seed: int = 0

    def __call__(
        self, model: Any, x: Tensor, y: Tensor, ball: Ball, *, generator: Any = None, index: Any = None
    ) -> Tensor:
        return worst_point(model, x, y, ball.scaled(self.share))[0]


def worst_point(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, Tensor]:
    """The point of the ball where the smallest margin is smallest, and that margin, for a linear model."""
    weight = jacobian(model, x)
    logits = model(x).detach()
    gaps = weight[y][:, None] - weight[None]  # [B, K, *x]
    fall = float(ball.eps) * ball.dual_norm(gaps, (2, 3, 4))
    margin = logits.gather(1, y[:, None]) - logits - fall
    margin.scatter_(1, y[:, None], math.inf)
    lowest, target = margin.min(dim=1)
    direction = -gaps[torch.arange(len(x)), target]
    step = direction.sign() if ball.norm == "linf" else direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return x + float(ball.eps) * step, lowest


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    zero = torch.zeros_like(x[:1])
    basis = torch.eye(zero.numel()).view(-1, *zero.shape[1:])
    with torch.no_grad():
        return (model(basis) - model(zero)).t().reshape(-1, *zero.shape[1:])


def linear_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.parse("mlp:hidden=")(SHAPE, CLASSES, (0.5,), (0.25,)).eval()


def data(count: int = 23) -> DataSet:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(count, *SHAPE, generator=generator)
    labels = linear_model()(pixels).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % CLASSES  # every fifth is misclassified
    images = MemoryImages(pixels, labels)
    return DataSet("tiny", images, images, ("a", "b", "c"), (0.5,), (0.25,), None, SHAPE)
