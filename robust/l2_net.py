"""Networks whose l2 Lipschitz constant is trained: layers, and the estimate of the constant that training uses.

Weights may stand under parametrizations (`torch.nn.utils.parametrize`): `layer.weight` is then the effective weight,
which is what `certify` captures, whatever it is computed from.

Two numbers must not be confused. Training uses `L2Net.trunk_lipschitz`, power iteration with warm starts, which is
cheap, differentiable and too small by an unknown amount. Certificates use `certify.bounds.global_l2`, whose norms are
upper bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from certify.lipschitz.operator_norm import power_iteration
from certify.op import AffineOp
from certify.ops import affine
from robust.layers import Conv, Shape, normalization
from robust.min_max import MinMax
from robust.normalize import Normalize

Activation = Literal["minmax", "relu"]


class L2Net(nn.Sequential):
    """Layers in a row, the last of which gives the logits and the first of which only shifts pixels.

    The buffers `iterate<place>` hold, for each measured layer, the vector `[1, *in]` at which its power iteration
    stands. They are saved with the weights, so that a run goes on where it stopped.

    Args:
        measured: input shape of each layer whose norm is estimated, by place. All other layers but the last must be
            1-Lipschitz by construction.
    """

    def __init__(self, *layers: nn.Module, measured: Mapping[int, tuple[int, ...]] | None = None) -> None:
        super().__init__(*layers)
        self.measured = tuple(sorted(measured or ()))
        for place in self.measured:
            start = torch.ones(1, *(measured or {})[place], device="cpu")
            self.register_buffer(_iterate(place), start / start.norm())

    def trunk_lipschitz(self, iterations: int) -> Tensor:
        """Estimate from below of the l2 constant of all layers before the last, differentiable in the weights.

        In training mode the iterates move on by `iterations` steps, without gradient; in evaluation they stay.
        """
        constant = next(self.parameters()).new_ones(())
        for place in self.measured:
            iterate = self.get_buffer(_iterate(place))
            op = self._without_bias(place)
            if self.training:
                iterate.copy_(power_iteration(op, iterate, iterations).v)
            # A copy: the next step overwrites the iterate, which this step's gradient still needs.
            constant = constant * op.forward(iterate.clone()).norm()
        return constant

    def _without_bias(self, place: int) -> AffineOp:
        layer = self[place]
        if isinstance(layer, nn.Conv2d):
            shape = tuple(self.get_buffer(_iterate(place)).shape[1:])
            return affine.conv2d(layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups, shape)  # type: ignore[arg-type]
        assert isinstance(layer, nn.Linear)
        return affine.Linear(layer.weight)

    @torch.no_grad()
    def start_(self, generator: torch.Generator) -> None:
        """Orthogonal starting weights, but where a layer or parametrization has a `start_` itself; random iterates."""
        front: list[Any] = list(self)[:-1]
        for layer in front:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(stored_weight(layer), generator=generator)
                for part in parametrizations(layer):
                    if hasattr(part, "start_"):
                        part.start_(stored_weight(layer), generator)
            elif hasattr(layer, "start_"):
                layer.start_(generator)
        for place in self.measured:
            iterate = self.get_buffer(_iterate(place))
            iterate.copy_(torch.randn(iterate.shape, generator=generator, device=generator.device))
            iterate /= iterate.norm()


class Residual(nn.Module):
    """Parametrization W -> I + scale * gain * W, gain one trained number per output; W dense or a convolution.

    Shortcut and branch are one linear map, whose norm is measured as a whole: 1 + ||branch|| would be loose, and
    compound with depth (LiResNet: Hu et al. 2023).
    """

    def __init__(self, weight: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.gain = nn.Parameter(torch.ones(len(weight), *[1] * (weight.dim() - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        if weight.dim() == 4:
            side = weight.shape[2] // 2
            identity = F.pad(identity[:, :, None, None], (side,) * 4)
        return torch.addcmul(identity, self.gain, weight, value=self.scale)

    def start_(self, weight: Tensor, generator: torch.Generator) -> None:
        """Normal weights of standard deviation 1 / fan_in (1 / (9 width) for 3x3 kernels)."""
        noise = torch.randn(weight.shape, generator=generator, device=generator.device)
        weight.copy_(noise / weight[0].numel())


class UnitRows(nn.Module):
    """Parametrization of the last layer: rows of norm 1, so that differences of logits are 2 K-Lipschitz at most.

    Source: Singla et al. 2022, "last layer normalization".
    """

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1)


class L2Layers:
    """A list of layers in the making, with the shape that the next one will see.

    Args:
        name: of the architecture, for messages.
        input_shape, mean, std: as `robust.model.Architecture` has them. Pixels are shifted by 0.5 and not scaled, so
            that radii keep their meaning; the data's constants are checked and left.
    """

    def __init__(self, name: str, input_shape: Shape, mean: Sequence[float], std: Sequence[float]) -> None:
        normalization(name, input_shape, mean, std)
        self.name = name
        self.shape: tuple[int, ...] = input_shape
        self.layers: list[nn.Module] = [Normalize((0.5,) * input_shape[0], (1.0,) * input_shape[0])]
        self.measured: dict[int, tuple[int, ...]] = {}

    def add(self, layer: nn.Module, out_shape: tuple[int, ...], *, measured: bool = False) -> None:
        """Append a layer; `measured` if training has to estimate its norm."""
        if measured:
            self.measured[len(self.layers)] = self.shape
        self.layers.append(layer)
        self.shape = out_shape

    def conv(self, row: Conv) -> None:
        """A measured convolution; ValueError where it does not fit."""
        channels, height, width = self.shape
        out = (row.channels, row.output_size(height), row.output_size(width))
        if min(out) < 1:
            raise ValueError(
                f"{self.name}: a {row.kernel}x{row.kernel} convolution does not fit the {height}x{width} that reach it"
            )
        self.add(nn.Conv2d(channels, row.channels, row.kernel, row.stride, row.padding), out, measured=True)

    def residual_conv(self, kernel: int, scale: float) -> None:
        """A measured linear residual convolution without stride."""
        channels = self.shape[0]
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        parametrize.register_parametrization(layer, "weight", Residual(layer.weight, scale))
        self.add(layer, self.shape, measured=True)

    def flatten(self) -> None:
        """Vectors from here on."""
        self.add(nn.Flatten(), (int(torch.Size(self.shape).numel()),))

    def dense(self, features: int) -> None:
        """A measured dense layer."""
        self.add(nn.Linear(self.shape[0], features), (features,), measured=True)

    def activate(self, activation: Activation = "minmax") -> None:
        """MinMax or ReLU; ValueError for an odd number of channels to pair."""
        if activation == "minmax" and self.shape[0] % 2:
            raise ValueError(f"{self.name}: MinMax pairs channels; expected an even width, got {self.shape[0]}")
        self.add(MinMax() if activation == "minmax" else nn.ReLU(), self.shape)

    def network(self, classes: int, unit_rows: bool = True) -> L2Net:
        """The layers and a last one that gives the logits."""
        last = nn.Linear(self.shape[0], classes)
        if unit_rows:
            parametrize.register_parametrization(last, "weight", UnitRows())
        return L2Net(*self.layers, last, measured=self.measured)


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight that is trained: what an effective weight is computed from, where it is."""
    chain = _chain(layer)
    weight = layer.weight if chain is None else chain.original
    assert isinstance(weight, Tensor)
    return weight


def parametrizations(layer: nn.Module) -> list[Any]:
    """What makes the effective weight of a layer from the stored one, in order."""
    chain = _chain(layer)
    return [] if chain is None else list(chain)


def _chain(layer: nn.Module) -> parametrize.ParametrizationList | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = layer.get_submodule("parametrizations.weight")
    assert isinstance(chain, parametrize.ParametrizationList)
    return chain


def _iterate(place: int) -> str:
    return f"iterate{place}"
