"""Small models that the tests of attacks share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def examples() -> Callable[..., Tensor]:
    """Factory of random images [B, 2, 3, 2] with some pixels exactly 0 and 1."""

    def make(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.rand((count, 2, 3, 2), dtype=dtype, generator=torch.Generator().manual_seed(seed))
        x[:, 0, 0, 0], x[:, 1, 1, 1] = 0.0, 1.0
        return x

    return make


@pytest.fixture
def small_net() -> Callable[..., nn.Module]:
    """Factory of two-layer networks with batch normalisation on those images."""

    def make(classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(3)
        return net.to(dtype).eval()

    return make
