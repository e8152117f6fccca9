"""Another architecture with its layers' weights written as products of rank-deficient factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from attacks.registry import method_field
from robust.layers import Shape
from robust.model import MODELS, Architecture
from robust.models.cnn3 import CNN3


class Factorised(nn.Sequential):
    """A convolutional or dense layer as three: W = U S V' for the matrix W `[out, in * kernel]` of its weights.

    The layers are V' (with the kernel, stride and padding), S `[rank, rank]` and U (with the bias), in this order. They
    start at the largest `rank` singular values of the layer.

    Args:
        layer: without groups.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int) -> None:
        bias = layer.bias is not None
        inner: nn.Module
        if isinstance(layer, nn.Linear):
            inner = nn.Linear(layer.in_features, rank, bias=False)
            middle: nn.Module = nn.Linear(rank, rank, bias=False)
            outer: nn.Module = nn.Linear(rank, layer.out_features, bias=bias)
        else:
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            inner = nn.Conv2d(layer.in_channels, rank, *geometry, bias=False)  # type: ignore[arg-type]
            middle = nn.Conv2d(rank, rank, 1, bias=False)
            outer = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
        super().__init__(inner, middle, outer)
        u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        with torch.no_grad():
            for weight, value in zip(self.weights(), (v[:rank], s[:rank].diag(), u[:, :rank]), strict=True):
                weight.copy_(value.reshape(weight.shape))
            if layer.bias is not None:
                outer.get_parameter("bias").copy_(layer.bias)

    def weights(self) -> list[nn.Parameter]:
        """V', S and U, in the shapes of their layers."""
        return [layer.get_parameter("weight") for layer in self]


@MODELS.register("low_rank")
@dataclass(frozen=True)
class LowRank:
    """The architecture `model` with factorised layers, all but the last; what the hook condlr trains.

    Args:
        model: architecture. ratio: rank over the full rank of each layer's weight matrix.
    """

    model: Architecture = method_field(MODELS, CNN3())
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: expected a share above 0, at most 1")

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
        network = self.model(input_shape, classes, mean, std)
        names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for name in names[:-1]:
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            rank = max(1, round(self.ratio * min(layer.weight.flatten(1).shape)))
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, Factorised(layer, rank))
        return network
