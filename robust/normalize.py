"""Input normalisation as a model's first layer, so that radii and boxes stay in pixel units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, for x `[B, C, H, W]` or `[C, H, W]`.

    The constants are buffers `[C, 1, 1]`: they move with the model, are stored with it, and no optimiser sees them.

    Raises:
        ValueError: the lengths differ, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"one mean and one std per channel expected, got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"every std must be positive, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        mean, std = ([round(value, 4) for value in buffer.flatten().tolist()] for buffer in (self.mean, self.std))
        return f"mean={mean}, std={std}"
