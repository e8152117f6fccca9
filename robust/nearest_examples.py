"""Nearest adversarial examples of a report's images: how close the decision boundary comes, for readers to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS
from attacks.mode import attack_mode
from attacks.threat import Ball
from certify.precision import exact_arithmetic
from certify.verdict import SoundnessError, logits_of
from robust.images import Images
from robust.page import NORM_WORDS
from robust.plots import choose_examples, class_name
from robust.report import Report, ReportError, Row
from robust.tensor_file import CheckpointError, load_tensors, save_tensors

NEAREST_FILE = "nearest.safetensors"
KIND = "nearest adversarial examples"

FIRST = 6
"""So many of a report's first images get one besides those of its page: they are the same for every model that was
judged on the data set, and runs are compared by them."""

SEARCH, ATTACK = "fab:targets=3,steps=40", "pgd:steps=20"
HALVINGS = 12


@dataclass(frozen=True)
class NearestExamples:
    """Adversarial examples by the number of their image; images without one are left out.

    Attributes:
        norm: in which they are near.
        points: [C, H, W] each. distances: from the image, in pixel units. predicted: the wrong class.
    """

    norm: str
    points: dict[int, Tensor]
    distances: dict[int, float]
    predicted: dict[int, int]

    def words(self, report: Report, index: int) -> str:
        """Distance and class of one of them, for readers."""
        return f"{NORM_WORDS[self.norm]} {self.distances[index]:.3g} → {class_name(report, self.predicted[index])}"

    def save(self, folder: Path) -> None:
        """Write them to `folder`, where the report finds them."""
        facts = {
            "kind": KIND,
            "norm": self.norm,
            "examples": [[i, self.distances[i], self.predicted[i]] for i in self.points],
        }
        save_tensors(folder / NEAREST_FILE, {str(i): point for i, point in self.points.items()}, facts)

    @classmethod
    def load(cls, folder: Path) -> NearestExamples | None:
        """Those in `folder`, None where there are none; ReportError where the file is damaged."""
        path = folder / NEAREST_FILE
        if not path.exists():
            return None
        try:
            points, facts = load_tensors(path)
        except CheckpointError as error:
            raise ReportError(f"{error}; remove it") from None
        if facts.get("kind") != KIND:
            raise ReportError(f"{path}: holds {facts.get('kind', 'tensors')!r}, expected {KIND}; remove it")
        examples: list[Any] = facts["examples"]
        return cls(
            facts["norm"],
            {i: points[str(i)] for i, _, _ in examples},
            {i: distance for i, distance, _ in examples},
            {i: label for i, _, label in examples},
        )


def nearest_examples(model: nn.Module, images: Images, report: Report, ball: Ball) -> NearestExamples:
    """Nearest adversarial examples, by FAB and PGD, of some images of the report that the model classifies right.

    Each point is checked by a forward pass of its own. A distance is an upper bound: a nearer example may exist.

    Args:
        images: the split that the report's indices count. ball: gives norm, pixel range and the radius of PGD.

    Raises:
        SoundnessError: one of them lies in the ball of a certified image.
    """
    chosen = {row.index: row for row in [*report.rows[:FIRST], *choose_examples(report)]}
    rows = [row for row in chosen.values() if row.status != "misclassified"]
    if not rows:
        return NearestExamples(ball.norm, {}, {}, {})
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    x, y = images.batch(torch.tensor([row.index for row in rows]), device)
    points, distances, predicted = _nearest(model, x, y, ball, [row.index for row in rows])
    _check(rows, points, x, ball)
    found = {row.index: k for k, row in enumerate(rows) if distances[k] < torch.inf}
    return NearestExamples(
        ball.norm,
        {index: points[k].cpu() for index, k in found.items()},
        {index: float(distances[k]) for index, k in found.items()},
        {index: int(predicted[k]) for index, k in found.items()},
    )


def _nearest(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Points, their distances (infinite where none was found) and their classes."""
    numbers = torch.tensor(index)
    with attack_mode(model), exact_arithmetic():
        candidates = [
            ATTACKS.parse(SEARCH).nearest(model, x, y, ball, index=numbers).points,
            ATTACKS.parse(ATTACK)(model, x, y, ball, index=numbers),
        ]
        best, distance = x.clone(), torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        for candidate in candidates:
            point = _pulled_back(model, x, y, candidate)
            length = torch.where(_wrong(model, point, y), ball.length(point.double() - x.double()), torch.inf)
            nearer = length < distance
            best, distance = torch.where(_wide(nearer, x), point, best), torch.where(nearer, length, distance)
        return best, distance, torch.cat([logits_of(model, point[None]).argmax(1) for point in best])


def _pulled_back(model: nn.Module, x: Tensor, y: Tensor, point: Tensor) -> Tensor:
    """The points moved towards x as far as a bisection of the segment finds them misclassified."""
    near, far = torch.zeros(len(x), device=x.device), torch.ones(len(x), device=x.device)
    for _ in range(HALVINGS):
        middle = (near + far) / 2
        wrong = logits_of(model, x + _wide(middle, x) * (point - x)).argmax(1) != y
        near, far = torch.where(wrong, near, middle), torch.where(wrong, middle, far)
    moved = x + _wide(far, x) * (point - x)
    return torch.where(_wide(_wrong(model, moved, y), x), moved, point)


def _wrong(model: nn.Module, points: Tensor, y: Tensor) -> Tensor:
    """Misclassified in a pass of its own, bool [B]: in a batch, rounding may differ."""
    return torch.cat([logits_of(model, point[None]).argmax(1) for point in points]) != y


def _wide(values: Tensor, x: Tensor) -> Tensor:
    return values.view((-1,) + (1,) * (x.dim() - 1))


def _check(rows: Sequence[Row], points: Tensor, x: Tensor, ball: Ball) -> None:
    """SoundnessError where an image is certified and an adversarial example lies in its ball."""
    inside = ball.contains(points, x) & (points != x).flatten(1).any(1)
    for row, hit in zip(rows, inside.tolist(), strict=True):
        if hit and row.status == "certified":
            raise SoundnessError(
                f"example {row.index} is certified by {row.method!r}, and an adversarial example lies in its ball: one "
                "of the two is wrong, and no number of this report can be trusted"
            )
