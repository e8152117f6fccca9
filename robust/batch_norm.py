"""Running statistics of BatchNorm, re-estimated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LAYERS = nn.modules.batchnorm._BatchNorm


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has running statistics."""
    return any(isinstance(module, LAYERS) and module.running_mean is not None for module in model.modules())


@contextmanager
def statistics_kept(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Passes in training mode use batch statistics as ever, but leave the layers' running statistics alone."""
    tracking = [layer for layer in layers if isinstance(layer, LAYERS) and layer.track_running_stats]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


@torch.no_grad()
def reestimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics by the average over the given batches, at the present weights ("precise BN").

    Training mode is needed for the pass; each module's mode and momentum are put back.
    """
    layers = [module for module in model.modules() if isinstance(module, LAYERS) and module.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # PyTorch's cumulative average: weight 1/k at batch k
        for x in batches:
            model(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
