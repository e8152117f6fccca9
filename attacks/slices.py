"""Passes of a large batch through a model in the form that suits a processor best.

The attacks of an evaluation keep hundreds of examples in flight. On a CPU two things make their passes faster and
change results by rounding only: slices of a few dozen examples, whose activations stay in the cache, and images whose
channels lie side by side in memory, which saves convolutions the rearranging.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.input_gradient import MOST_IMAGE_CHANNELS
from attacks.mode import Model

SLICE = 64


def gains_from_channels_last(model: Model) -> bool:
    """Whether a model should be handed images whose channels lie side by side in memory.

    Convolutions without strides behind the first one gain by it. Where there are none, the first layers of a model are
    the larger part of it, and with the one or three channels of an image side by side those are slower.
    """
    if not isinstance(model, nn.Module):
        return True
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(
        conv.in_channels > MOST_IMAGE_CHANNELS and max(conv.stride) == 1 and max(conv.kernel_size) > 1 for conv in convs
    )


@dataclass(frozen=True)
class Sliced:
    """A model whose passes take about `rows` examples at a time.

    Args:
        channels_last: whether images [B, C, H, W] are handed over with their channels side by side in memory.
    """

    model: Model
    channels_last: bool
    rows: int = SLICE

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(part) for (part,) in self.parts(x)])

    def parts(self, x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
        """The batches [B, ...] cut alike into slices of nearly equal size, at least one."""
        count = max(round(len(x) / self.rows), 1)
        images = x.tensor_split(count)
        if self.channels_last and x.dim() == 4:
            images = tuple(part.contiguous(memory_format=torch.channels_last) for part in images)
        return list(zip(images, *(other.tensor_split(count) for other in others), strict=True))
