"""How often each class is wrong on held-out images: clean, and under an attack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.losses import misclassified
from attacks.threat import Ball


class ClassErrors(NamedTuple):
    """Shares of the held-out images, `[K]` each, and the numbers of images."""

    clean: Tensor
    attacked: Tensor
    images: Tensor


def class_errors(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], attack: Attack, ball: Ball, classes: int
) -> ClassErrors:
    """Errors of the network in evaluation mode; its modes are put back.

    Raises:
        ValueError: there are no held-out images, or none of a class.
    """
    clean, attacked, count = (torch.zeros(classes, dtype=torch.float64) for _ in range(3))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for x, y in batches:
            x_adv = attack(model, x, y, ball)
            with torch.no_grad():
                wrong = [misclassified(model(points), y).cpu().double() for points in (x, x_adv)]
            clean += torch.bincount(y.cpu(), wrong[0], minlength=classes)
            attacked += torch.bincount(y.cpu(), torch.maximum(*wrong), minlength=classes)
            count += torch.bincount(y.cpu(), minlength=classes)
    finally:
        for module, training in modes.items():
            module.training = training
    if not count.all():
        raise ValueError(
            f"class statistics need held-out images of every class, got {count.int().tolist()}; set validation=0.1"
        )
    return ClassErrors(clean / count, attacked / count, count)
