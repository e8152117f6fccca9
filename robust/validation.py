"""Validation of a run: clean accuracy, and certified accuracy or accuracy under an attack, on the held-out images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS
from attacks.losses import misclassified
from attacks.mode import attack_mode
from attacks.threat import Ball
from certify.verifier import VERIFIERS
from robust.dataset import DataSet
from robust.team import Team

BATCH = 250


def parse_validator(text: str) -> Any:
    """The verifier or the attack that the text spells."""
    return (ATTACKS if text.partition(":")[0].strip() in ATTACKS else VERIFIERS).parse(text)


def is_attack(validator: Any) -> bool:
    """Whether a validator gives accuracy under attack, not certified accuracy."""
    return type(validator) in (ATTACKS[name] for name in ATTACKS.names())


def decisive(metrics: Mapping[str, float]) -> float:
    """What `select = best` compares: the certified accuracy, or the accuracy under attack, in percent."""
    return metrics["certified"] if "certified" in metrics else metrics["under_attack"]


def validate(
    model: nn.Module, data: DataSet, ball: Ball, validator: Any, device: torch.device, team: Team | None = None
) -> dict[str, float]:
    """Accuracies on the data set's test images, in percent: "clean", and "certified" or "under_attack".

    Args:
        validator: a verifier or an attack. An attack's accuracy is an upper bound of the robust accuracy.
        team: processes of which each judges every `size`-th batch.
    """
    attacks = is_attack(validator)
    counts = torch.zeros(2, dtype=torch.int64)
    for index, x, y in validation_batches(data, device, team):
        counts += torch.tensor((_attacked if attacks else _verified)(model, x, y, ball, validator, index))
    if team is not None:
        team.add_up([counts])
    names = ("clean", "under_attack" if attacks else "certified")
    return {name: 100 * count / len(data.test) for name, count in zip(names, counts.tolist(), strict=True)}


def validation_batches(
    data: DataSet, device: torch.device, team: Team | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(numbers, x, y) of the data set's test images, batch by batch; every `size`-th batch with a team."""
    rank, size = (0, 1) if team is None else (team.rank, team.size)
    for index in torch.arange(len(data.test)).split(BATCH)[rank::size]:
        yield (index, *data.test.batch(index, device))


def _verified(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, verifier: Any, index: Tensor) -> tuple[int, int]:
    """How many images are right, and how many certified."""
    statuses = [verdict.status for verdict in verifier(model, x, y, ball)]
    return len(y) - statuses.count("misclassified"), statuses.count("certified")


def _attacked(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Any, index: Tensor) -> tuple[int, int]:
    """How many images are right, and how many of them under attack."""
    with attack_mode(model):
        points = attack(model, x, y, ball, index=index)
        with torch.no_grad():
            right, held = (~misclassified(model(batch), y) for batch in (x, points))
    return int(right.sum()), int((right & held).sum())
