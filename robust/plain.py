"""A network as plain layers with fixed weights: what formats and runtimes that know nothing of this suite can take."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


@torch.no_grad()
def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode that computes the same, up to rounding, from effective weights.

    Parametrizations (`torch.nn.utils.parametrize`) are carried out, and layers with a method `plain()` are replaced by
    what it returns. The copy is not for training.
    """
    replaced = _plain(copy.deepcopy(model).eval())
    return replaced.requires_grad_(False)


def _plain(module: nn.Module) -> nn.Module:
    replacement: Any = getattr(module, "plain", None)
    if replacement is not None:
        found: nn.Module = replacement()
        return found.eval()
    if parametrize.is_parametrized(module):
        module = _without_parametrizations(module)
    for name, child in module.named_children():
        setattr(module, name, _plain(child))
    return module


def _without_parametrizations(layer: nn.Module) -> nn.Module:
    """The layer as its own class has it. torch's remove_parametrizations would change the class, which a copy of the
    layer shares with its original."""
    kind: Any = type(layer).__bases__[0]
    chains = layer.get_submodule("parametrizations")
    assert isinstance(chains, nn.ModuleDict)
    found: nn.Module = kind.__new__(kind)
    found.__dict__.update(layer.__dict__)
    weights = {name: nn.Parameter(getattr(layer, name).clone()) for name in chains}
    found._parameters = {**layer._parameters, **weights}
    found._modules = {name: child for name, child in layer._modules.items() if name != "parametrizations"}
    return found
