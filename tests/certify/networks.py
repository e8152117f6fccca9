"""Small random networks, one block per op of `certify.ops`, for property tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.lipschitz_layers.cayley import Cayley
from robust.lipschitz_layers.soc import SOC
from robust.min_max import MinMax

INPUT = (2, 5, 5)
CLASSES = 4

Shape = tuple[int, int, int]
Block = Callable[[Shape], nn.Module]
"""Maps the shape [C, H, W] it will be given to a module from images to images."""


class Apply(nn.Module):
    """A function of the input, and of submodules or buffers, as a module."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = []
        for number, part in enumerate(parts):
            name = f"part{number}"
            self.names.append(name)
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, name) for name in self.names))


def on_vectors(make: Callable[[int], tuple[nn.Module, int]]) -> Block:
    """Block that flattens, applies a layer of vectors and makes an image again."""

    def block(shape: Shape) -> nn.Module:
        layer, size = make(shape[0] * shape[1] * shape[2])
        return nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, (size // 4, 2, 2)))

    return block


def conv(**options: object) -> Block:
    defaults: dict[str, object] = {"kernel_size": 3, "padding": 1}
    return lambda shape: nn.Conv2d(shape[0], 4 if options.get("groups") else 3, **{**defaults, **options})  # type: ignore[arg-type]


def layer(make: Callable[[], nn.Module]) -> Block:
    """Block of a layer that does not depend on the shape."""
    return lambda shape: make()


def function(call: Callable[..., Tensor], *parts: Tensor) -> Block:
    return lambda shape: Apply(call, *parts)


def branches(call: Callable[..., Tensor], count: int, channels: int | None = None) -> Block:
    """Block of a function of the input and of `count` convolutions (which keep the shape by default)."""

    def block(shape: Shape) -> nn.Module:
        return Apply(call, *(nn.Conv2d(shape[0], channels or shape[0], 3, padding=1) for _ in range(count)))

    return block


def scaled_by_constants(x: Tensor, factor: Tensor) -> Tensor:
    return (1 - 2 * x * factor) / 0.7 + factor - 0.25


KINDS: dict[str, Block] = {
    "conv": conv(),
    "linear": on_vectors(lambda n: (nn.Linear(n, 12), 12)),
    "batch_norm_2d": lambda shape: nn.BatchNorm2d(shape[0]),
    "batch_norm_1d": lambda shape: nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(shape[0] * shape[1] * shape[2]), nn.Unflatten(1, shape)
    ),
    "zero_pad": layer(lambda: nn.ZeroPad2d((1, 0, 2, 1))),
    "relu": layer(nn.ReLU),
    "leaky_relu": layer(lambda: nn.LeakyReLU(0.2)),
    "sigmoid": layer(nn.Sigmoid),
    "tanh": layer(nn.Tanh),
    "max_pool": layer(lambda: nn.MaxPool2d(2, stride=1)),
    "avg_pool": layer(lambda: nn.AvgPool2d(2, stride=1)),
    "mean": function(lambda x: x.mean(1, keepdim=True)),
    "permute": function(lambda x: x.permute(0, 3, 1, 2)),
    "skip": branches(lambda x, f: x + F.relu(f(x)), 1),
    "difference": branches(lambda x, f, g: torch.relu(f(x)) - g(x), 2),
    "concat": branches(lambda x, f: torch.cat([F.relu(f(x)), x], 1), 1),
    "constants": function(scaled_by_constants, torch.tensor(-1.3)),
    "dropout": layer(nn.Dropout),
}
"""One block for each kind of op; tested in all ordered pairs."""

VARIANTS: dict[str, Block] = {
    "conv_stride": conv(stride=2),
    "conv_uneven": conv(kernel_size=(3, 2), stride=(2, 1), padding=(0, 1)),
    "conv_dilation": conv(dilation=2, padding=2),
    "conv_groups": lambda shape: nn.Conv2d(shape[0], 2 * shape[0], 3, padding=1, groups=shape[0]),
    "conv_same": conv(padding="same", dilation=2),
    "conv_valid": conv(padding="valid"),
    "conv_no_bias": conv(bias=False),
    "conv_pixels_unread": conv(kernel_size=2, stride=3, padding=0),
    "conv_function": branches(lambda x, f: F.conv2d(x, f.weight, f.bias, stride=2, padding=1), 1, 3),
    "linear_no_bias": on_vectors(lambda n: (nn.Linear(n, 8, bias=False), 8)),
    "linear_function": lambda shape: Apply(
        lambda x, w: F.linear(x.flatten(1), w).unsqueeze(2).unsqueeze(3), torch.randn(6, shape[0] * shape[1] * shape[2])
    ),
    "conv_batch_norm": lambda shape: nn.Sequential(nn.Conv2d(shape[0], 3, 3), nn.BatchNorm2d(3)),
    "conv_no_bias_batch_norm": lambda shape: nn.Sequential(nn.Conv2d(shape[0], 3, 3, bias=False), nn.BatchNorm2d(3)),
    "conv_read_twice_batch_norm": lambda shape: Apply(
        lambda x, f, n: (lambda h: F.relu(n(h)) + h)(f(x)), nn.Conv2d(shape[0], 3, 3), nn.BatchNorm2d(3)
    ),
    "batch_norm_not_affine": lambda shape: nn.BatchNorm2d(shape[0], affine=False),
    "relu_in_place": lambda shape: nn.Sequential(nn.Conv2d(shape[0], 3, 3), nn.ReLU(inplace=True)),
    "relu_method_in_place": branches(lambda x, f: f(x).relu_() + x, 1),
    "relu_function": function(torch.relu),
    "relu_method": function(lambda x: x.relu()),
    "leaky_relu_function": function(lambda x: F.leaky_relu(x, 0.05)),
    "sigmoid_function": function(torch.sigmoid),
    "tanh_method": function(lambda x: x.tanh()),
    "max_pool_padded": layer(lambda: nn.MaxPool2d(3, stride=2, padding=1)),
    "max_pool_dilated": layer(lambda: nn.MaxPool2d(2, stride=1, dilation=2)),
    "max_pool_ceil": layer(lambda: nn.MaxPool2d(2, stride=2, ceil_mode=True)),
    "max_pool_ceil_padded": layer(lambda: nn.MaxPool2d((3, 2), stride=(2, 3), padding=(1, 0), ceil_mode=True)),
    "max_pool_function": function(lambda x: F.max_pool2d(x, 2)),
    "avg_pool_padded": layer(lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)),
    "avg_pool_ceil": layer(lambda: nn.AvgPool2d(2, ceil_mode=True)),
    "avg_pool_function": function(lambda x: F.avg_pool2d(x, (1, 2))),
    "adaptive_avg_pool": layer(lambda: nn.AdaptiveAvgPool2d(2)),
    "adaptive_avg_pool_function": function(lambda x: F.adaptive_avg_pool2d(x, (1, 3))),
    "mean_over_pixels": function(lambda x: x.mean((2, 3)).unsqueeze(2).unsqueeze(3)),
    "mean_function": function(lambda x: torch.mean(x, dim=-1, keepdim=True)),
    "view": function(lambda x: x.view(x.size(0), 1, -1, 1)),
    "reshape": function(lambda x: x.reshape(x.shape[0], -1).reshape(x.shape[0], -1, 1, 1)),
    "flatten": function(lambda x: torch.flatten(x, 2).unsqueeze(1)),
    "transpose": function(lambda x: x.transpose(1, -1).contiguous()),
    "plus_itself": function(lambda x: x + x),
    "in_place_add": branches(lambda x, f: (lambda h: h.add_(x))(f(x)), 1),
    "slice": function(lambda x: x[:, :, 1:, ::2]),
    "index": function(lambda x: x[:, 0, ..., [2, 0, 2]].unsqueeze(1)),
    "chunks": branches(lambda x, f: (lambda h: h[0] - 2 * torch.relu(h[1]))(f(x).chunk(2, 1)), 1, 4),
    "split_unevenly": function(lambda x: (lambda h: torch.cat([h[1], h[0]], 2))(x.split([1, x.shape[2] - 1], dim=2))),
    "flip_and_roll": function(lambda x: torch.flip(x, (2,)).roll(1, 3)),
    "maximum": branches(lambda x, f: torch.maximum(f(x), x), 1),
    "minimum_method": branches(lambda x, f: f(x).minimum(x), 1),
    "abs": branches(lambda x, f: f(x).abs(), 1),
    "clamp": branches(lambda x, f: f(x).clamp(-0.1, max=0.2), 1),
    "clamp_above": branches(lambda x, f: torch.clamp(f(x), max=0.05), 1),
    "concat_pixels": branches(lambda x, f: torch.cat([x, f(x), x], dim=-1), 1),
    "negate": function(lambda x: -x),
    "minus_buffer": function(lambda x, b: torch.sub(x, b) * b, torch.tensor([[0.3]])),
    "buffer_minus": function(lambda x, b: b - x, torch.tensor([[[0.3]]])),
    "divide": function(lambda x, b: torch.div(x, b), torch.tensor(-0.4)),
    "dropout_function": function(lambda x: F.dropout(x, 0.5, training=False)),
    "identity": layer(nn.Identity),
    "min_max": lambda shape: nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), MinMax()),
    "silu": layer(nn.SiLU),
    "exponential": lambda shape: SOC(terms=4).conv(shape[0], 3, shape[1:]),
    "circular_conv": lambda shape: Cayley().conv(shape[0], 3, shape[1:]),
    "residual_of_residual": branches(lambda x, f, g: (lambda h: h + F.relu(g(h)))(x + f(F.relu(x))), 2),
}
"""Other forms of the same ops; tested between two ReLU layers."""


class Network(nn.Module):
    """Convolution, blocks, dense head; normalised pixels in, logits out."""

    def __init__(self, blocks: list[Block], channels: int = 3, input_shape: Shape = INPUT) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.6]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor([0.3, 0.5]).view(-1, 1, 1))
        stem = nn.Conv2d(input_shape[0], channels, 3, padding=1)
        modules: list[nn.Module] = [stem]
        value = stem(torch.zeros(2, *input_shape))
        for block in blocks:
            module = block(tuple(value.shape[1:]))
            modules.append(module)
            value = module(value)
        self.body = nn.Sequential(*modules)
        self.head = nn.Linear(value[0].numel(), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body((x - self.mean) / self.std).flatten(1))


def network(blocks: list[Block], seed: int, gain: float = 1.5) -> Network:
    """Network in evaluation mode with random weights; `gain` multiplies the usual initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(blocks)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data.mul_(gain)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
                if module.affine:
                    module.weight.data.normal_()
                    module.bias.data.normal_()
    return model.eval()


def pair(first: str, second: str, seed: int) -> Network:
    return network([KINDS[first], KINDS[second]], seed)


def sandwich(name: str, seed: int) -> Network:
    """A variant between two nonlinear layers, so that its input is a box and its output is relaxed."""
    return network([layer(nn.ReLU), VARIANTS[name], layer(nn.Tanh if name.startswith("relu") else nn.ReLU)], seed)
