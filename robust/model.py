"""Registry of architectures: `MODELS.parse("cnn7:width=64")(input_shape, classes, mean, std)` builds a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from attacks.registry import Registry

MODELS = Registry("model", "robust.models")


def names_file(text: str) -> bool:
    """Whether the text of a model, FILE.py:NAME, names a network of the user's own."""
    return text.partition(":")[0].endswith(".py")


class Architecture(Protocol):
    """Frozen dataclass of sizes; called with the problem it returns a freshly initialised network.

    The network takes pixels in [0, 1], `[B, C, H, W]`, and returns logits `[B, classes]`; its first layer is
    `Normalize(mean, std)`.

    Args:
        input_shape: (C, H, W) of one image.
        classes: number of logits.
        mean, std: one value per channel, in pixel units.

    Raises:
        ValueError: the images are too small for the architecture, or mean and std do not have C values.
    """

    def __call__(
        self, input_shape: tuple[int, int, int], classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> nn.Module: ...
