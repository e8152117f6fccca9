"""One pass of an attack through the model: loss values, logits and, where wanted, the gradient in the input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attacks.losses import Loss
from attacks.mode import Model

Precision = Literal["float32", "bfloat16"]
"""Arithmetic of the model's passes inside an attack; points, losses and steps keep the dtype of the input."""


def differentiate(
    model: Model, loss: Loss, point: Tensor, labels: tuple[Tensor, ...], precision: Precision = "float32"
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the summed loss in the input, loss values [B], logits [B, K]), all detached.

    The loss is summed, not averaged, so that the gradient of an example does not depend on the size of the batch.
    Nothing is accumulated in any `.grad`.
    """
    with torch.enable_grad():
        inputs = point.detach().requires_grad_()
        logits = forward(model, inputs, precision)
        values = loss(logits, *labels)
        (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return gradient, values.detach(), logits.detach()


def measure(
    model: Model, loss: Loss, point: Tensor, labels: tuple[Tensor, ...], precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """(loss values [B], logits [B, K]) without the cost of a gradient."""
    with torch.no_grad():
        logits = forward(model, point, precision)
        return loss(logits, *labels), logits


def forward(model: Model, point: Tensor, precision: Precision = "float32") -> Tensor:
    """Logits, computed in `precision` and returned in the dtype of the point."""
    with torch.autocast(point.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(point)
    return logits.to(point.dtype)
