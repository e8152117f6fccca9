"""Registry of optimisers: `OPTIMIZERS.parse("adam:lr=0.0005")(parameters)` makes one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from attacks.registry import Registry

OPTIMIZERS = Registry("optimizer", "robust.optimizers")


class OptimizerFactory(Protocol):
    """Frozen dataclass of hyper-parameters; `lr` is what the learning-rate schedule multiplies."""

    lr: float

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...
