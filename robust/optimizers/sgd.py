"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from robust.optimizer import OPTIMIZERS


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True)
class SGD:
    """SGD with momentum, the defaults of adversarial training (Rice et al. 2020)."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,
        )
        if self.momentum:
            # The fused step takes buffers for all parameters or for none, and one may get its first gradient late:
            # a head that is trained from some epoch on. Zeros are where momentum starts.
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
