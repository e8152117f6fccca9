"""One pass of an attack through the model: loss values, logits and, where wanted, the gradient in the input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attacks.losses import Loss
from attacks.mode import Mode, Model
from attacks.slices import Sliced, gains_from_channels_last

Precision = Literal["float32", "bfloat16"]
"""Arithmetic of the model's passes inside an attack; points, losses and steps keep the dtype of the input."""


def differentiate(
    model: Model,
    loss: Loss,
    point: Tensor,
    labels: tuple[Tensor, ...],
    precision: Precision = "float32",
    samples: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the summed loss in the input, loss values [B], logits [B, K]), all detached.

    The loss is summed, not averaged, so that the gradient of an example does not depend on the size of the batch.
    Nothing is accumulated in any `.grad`.

    Args:
        samples: passes over which the gradient is averaged, for a model with noise of its own (expectation over
            transformation; Athalye et al., 2018); values and logits are those of the last one.
    """
    if isinstance(model, Sliced):
        # Backwards slice by slice, too, while the activations of the slice are at hand.
        parts = model.parts(point, *labels)
        passes = [differentiate(model.model, loss, part, tuple(rest), precision, samples) for part, *rest in parts]
        gradient, values, logits = map(torch.cat, zip(*passes, strict=True))
        return gradient.contiguous(), values, logits
    total = torch.zeros_like(point) if samples > 1 else point
    for _ in range(samples):
        with torch.enable_grad():
            inputs = point.detach().requires_grad_()
            logits = forward(model, inputs, precision)
            values = loss(logits, *labels)
            if not values.requires_grad:
                raise ValueError(
                    "the model's logits have no gradient in its input (a detach or no_grad in its forward?); attack it "
                    "without gradients, as square does"
                )
            (drawn,) = torch.autograd.grad(values.sum(), inputs)
        total = drawn if samples == 1 else total.add_(drawn, alpha=1 / samples)
    return total, values.detach(), logits.detach()


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


def prepared(model: Model, mode: Mode, x: Tensor, precision: Precision = "float32") -> tuple[Model, Tensor]:
    """The form of the model that an attack on x in this mode should use, and the logits [B, K] of x.

    With the statistics of the batch an example's logits depend on what is beside it, and a GPU is fastest when it is
    full: in these cases the model is returned as it is.
    """
    with torch.no_grad():
        if mode != "eval" or x.device.type != "cpu":
            return model, forward(model, x, precision)
        try:
            sliced = Sliced(model, channels_last=gains_from_channels_last(model))
            return sliced, forward(sliced, x, precision)
        except RuntimeError as error:
            # A model may ask for one layout: x.view(B, -1) works for channels apart only.
            if "view size is not compatible" not in str(error):
                raise
            sliced = Sliced(model, channels_last=False)
            return sliced, forward(sliced, x, precision)
