"""Adam and its variants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robust.optimizer import OPTIMIZERS


@OPTIMIZERS.register("adam")
@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015), PyTorch's fused implementation: one pass over the parameters instead of a dozen."""

    lr: float = 5e-4
    weight_decay: float = 0.0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    lr: float = 5e-4
    weight_decay: float = 0.01

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@OPTIMIZERS.register("nadam")
@dataclass(frozen=True)
class NAdam:
    """Adam with Nesterov momentum (Dozat 2016)."""

    lr: float = 1e-3
    weight_decay: float = 0.0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.NAdam(parameters, lr=self.lr, weight_decay=self.weight_decay)


@OPTIMIZERS.register("radam")
@dataclass(frozen=True)
class RAdam:
    """Adam with rectified warm-up (Liu et al. 2020)."""

    lr: float = 5e-4
    weight_decay: float = 0.0

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(parameters, lr=self.lr, weight_decay=self.weight_decay)
