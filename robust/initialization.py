"""Starting weights, drawn from an explicit generator so that a seed gives the same network on every device."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from robust.l2_net import L2Net, stored_weight

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class Initialization(Protocol):
    """Overwrites the parameters of `model` in place with draws from `generator`."""

    def __call__(self, model: nn.Module, generator: torch.Generator) -> None: ...


@torch.no_grad()
def default_init_(model: nn.Module, generator: torch.Generator) -> None:
    """PyTorch's own default: weights and biases uniform in +-1/sqrt(fan_in), batch norms reset.

    It is Kaiming's uniform rule for the slope sqrt(5). CTBench trains its PGD and EDAC rows from it. An
    L2Net then starts in its own way (`L2Net.start_`).
    """
    for layer in _layers(model):
        bound = 1 / math.sqrt(_fan_in(layer))
        _draw_(stored_weight(layer), generator, -bound, bound)
        if layer.bias is not None:
            _draw_(layer.bias, generator, -bound, bound)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_parameters()
    if isinstance(model, L2Net):
        model.start_(generator)


@torch.no_grad()
def kaiming_normal_init_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of convolutions normal with std sqrt(2 / fan_out), for wide ResNets; the rest as `default_init_`.

    Source: He et al. 2015, in the fan-out form of the TRADES and AWP networks. Logits start without bias.
    """
    default_init_(model, generator)
    layers = list(_layers(model))
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            fan_out = layer.weight.numel() // layer.weight.shape[1]
            _draw_normal_(layer.weight, generator, math.sqrt(2 / fan_out))
    if layers and isinstance(layers[-1], nn.Linear) and layers[-1].bias is not None:
        layers[-1].bias.zero_()


@torch.no_grad()
def ibp_init_(model: nn.Module, generator: torch.Generator, *, halve_after_sum: bool = True) -> None:
    """Weights under which the mean radius of interval bounds is the same in every layer.

    Every convolution and linear layer but the last gets normal weights of std sqrt(2 pi) / fan_in. Then E|w| = 2 /
    fan_in, so that a layer doubles the mean radius, and the ReLU behind it halves it again. The last layer, biases and
    batch norms are as in `default_init_`.

    Args:
        halve_after_sum: halve the weights of layers that read a residual sum, directly or through a ReLU, because the
            sum has doubled the radius. It needs a model that torch.fx can trace.

    Source: Shi et al. 2021, and their code, which halves exactly the layers behind a sum and its ReLU (not
    the ones that feed it).
    """
    default_init_(model, generator)
    for layer in list(_layers(model))[:-1]:
        _draw_normal_(layer.weight, generator, ibp_std(_fan_in(layer)))
    if halve_after_sum:
        for layer in _layers_after_sums(model):
            layer.weight /= 2


def ibp_std(fan_in: int) -> float:
    """Standard deviation sqrt(2 pi) / fan_in of `ibp_init_`."""
    return math.sqrt(2 * math.pi) / fan_in


def as_built_(model: nn.Module, generator: torch.Generator) -> None:
    """The weights that the network comes with: a user's own may be trained ones."""


INITIALIZATIONS: dict[str, Initialization] = {
    "default": default_init_,
    "ibp": ibp_init_,
    "kaiming_normal": kaiming_normal_init_,
    "as_built": as_built_,
}


def initialize_(model: nn.Module, name: str, generator: torch.Generator) -> None:
    """Applies the initialisation called `name`; ValueError lists the names there are."""
    if name not in INITIALIZATIONS:
        raise ValueError(f"no initialization named {name!r}; known: {', '.join(INITIALIZATIONS)}")
    INITIALIZATIONS[name](model, generator)


def _layers(model: nn.Module) -> Iterator[Layer]:
    return (module for module in model.modules() if isinstance(module, Layer))


def _fan_in(layer: Layer) -> int:
    """Number of inputs that one output sees."""
    return layer.weight[0].numel()


def _draw_(parameter: Tensor, generator: torch.Generator, low: float, high: float) -> None:
    parameter.copy_(torch.empty(parameter.shape, device=generator.device).uniform_(low, high, generator=generator))


def _draw_normal_(parameter: Tensor, generator: torch.Generator, std: float) -> None:
    parameter.copy_(torch.empty(parameter.shape, device=generator.device).normal_(0, std, generator=generator))


def _layers_after_sums(model: nn.Module) -> list[Layer]:
    """Convolutions and linear layers whose input is the sum of two branches, or its ReLU."""
    modules = dict(model.named_modules())
    found = []
    for node in fx.symbolic_trace(model).graph.nodes:
        layer = modules[node.target] if node.op == "call_module" else None
        if isinstance(layer, Layer):
            source = node.args[0]
            if source.op == "call_module" and isinstance(modules[source.target], nn.ReLU):
                source = source.args[0]
            if _is_sum(source):
                found.append(layer)
    return found


def _is_sum(node: fx.Node) -> bool:
    added = node.target in (operator.add, operator.iadd, torch.add, "add")
    return added and sum(isinstance(argument, fx.Node) for argument in node.args) == 2
