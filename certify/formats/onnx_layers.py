"""Layers for the nodes of an ONNX graph: one rule an op. An op joins by a function `Call -> nn.Module` below."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from certify.ops.affine import pair


class Reader(Protocol):
    """What rules ask of the one who walks the graph.

    Attributes:
        onnx: the package. dtype: of the network.
        values: by name, what depends on the network's input, for an example. constants: what does not.
    """

    onnx: Any
    dtype: torch.dtype
    values: dict[str, Tensor]
    constants: dict[str, np.ndarray]

    def refuse(self, node: Any, reason: str) -> ValueError:
        """The error for a node that cannot be read."""
        ...


@dataclass
class Call:
    """A node as the rules below see it."""

    reader: Reader
    node: Any

    def __post_init__(self) -> None:
        helper = self.reader.onnx.helper
        self.attributes = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        self.traced_names = tuple(name for name in self.node.input if name in self.reader.values)
        self.traced = [self.reader.values[name] for name in self.traced_names]

    @property
    def x(self) -> Tensor:
        """Example value of the only input that depends on the network's input."""
        if len(self.traced) != 1 or self.node.input[0] not in self.reader.values:
            raise self.refuse("only its first input may depend on the network's input")
        return self.traced[0]

    def axis(self, axis: int) -> int:
        """An axis of the input counted from the front; an error for the batch axis."""
        found = axis % self.x.dim()
        if found == 0:
            raise self.refuse("the batch axis cannot be cut")
        return found

    def constant(self, place: int) -> np.ndarray | None:
        """Input `place`, None where it is absent; an error where it is not constant."""
        if place >= len(self.node.input) or not self.node.input[place]:
            return None
        if self.node.input[place] not in self.reader.constants:
            raise self.refuse(f"its input {self.node.input[place]!r} depends on the network's input")
        return self.reader.constants[self.node.input[place]]

    def tensor(self, place: int) -> Tensor:
        """A constant of the network's precision that must be there."""
        found = self.constant(place)
        if found is None:
            raise self.refuse(f"it lacks input {place}")
        return torch.from_numpy(np.array(found)).to(self.reader.dtype)

    def refuse(self, reason: str) -> ValueError:
        return self.reader.refuse(self.node, reason)

    def attribute(self, name: str, default: Any) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def only(self, **allowed: Any) -> None:
        """Refuse attributes with another value than the only one that is supported."""
        for name, wanted in allowed.items():
            got = self.attribute(name, wanted)
            if got != wanted:
                raise self.refuse(f"{name}={got} is not supported, only {wanted}")

    def integers(self, attribute: str, place: int) -> list[int] | None:
        """A list that older opsets keep in an attribute and newer ones in an input; None where it is absent."""
        found = self.attributes.get(attribute, self.constant(place))
        return None if found is None else [int(value) for value in np.atleast_1d(found)]


Build = Callable[[Call], nn.Module]
LAYERS: dict[str, Build] = {}


def _layer(*ops: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        LAYERS.update(dict.fromkeys(ops, build))
        return build

    return add


class _Apply(nn.Module):
    """A function of tensors as a layer."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


class _WithConstant(nn.Module):
    """`function(x, constant)`, or the other way round."""

    constant: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], constant: Tensor, on_left: bool) -> None:
        super().__init__()
        self.function, self.on_left = function, on_left
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.constant, x) if self.on_left else self.function(x, self.constant)


class _Reshape(nn.Module):
    """Another shape for each example."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


def narrow(axis: int, start: int, length: int) -> nn.Module:
    return _Apply(lambda x: x.narrow(axis, start, length))


def _reshaped(call: Call, shape: Sequence[int]) -> nn.Module:
    """Layer for a value of the given shape, of which the first axis must be the batch of one."""
    shape = tuple(call.x.reshape(tuple(shape)).shape)
    if not shape or shape[0] != 1:
        raise call.refuse(f"the new shape {list(shape)} moves the batch axis, which must stay in front")
    return _Reshape(shape[1:])


@_layer("Conv")
def _conv(call: Call) -> nn.Module:
    weight, bias = call.tensor(1), call.constant(2)
    if weight.dim() != 4:
        raise call.refuse(f"only 2-d convolutions are supported, got weights of shape {tuple(weight.shape)}")
    (stride, dilation), kernel = _window(call), pair(weight.shape[2:])
    groups = call.attribute("group", 1)
    before, padding = _padding(call, kernel, stride, dilation)
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias is not None,
    )
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(call.tensor(2))
    return layer if before is None else nn.Sequential(before, layer)


@_layer("MaxPool")
def _max_pool(call: Call) -> nn.Module:
    if len(call.node.output) > 1 and call.node.output[1]:
        raise call.refuse("the indices of a maximum are not supported")
    kernel, (stride, dilation) = pair(call.attribute("kernel_shape", ())), _window(call)
    before, padding = _padding(call, kernel, stride, dilation)
    if before is not None:
        raise call.refuse("padding that differs from side to side is not supported")
    return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=bool(call.attribute("ceil_mode", 0)))


@_layer("AveragePool")
def _average_pool(call: Call) -> nn.Module:
    kernel, (stride, dilation) = pair(call.attribute("kernel_shape", ())), _window(call)
    before, padding = _padding(call, kernel, stride, dilation)
    if before is not None or dilation != (1, 1):
        raise call.refuse("dilation, and padding that differs from side to side, are not supported")
    counts = bool(call.attribute("count_include_pad", 0))
    return nn.AvgPool2d(kernel, stride, padding, bool(call.attribute("ceil_mode", 0)), counts)


def _window(call: Call) -> tuple[tuple[int, int], tuple[int, int]]:
    """(stride, dilation) of a window over images."""
    if call.x.dim() != 4:
        raise call.refuse(f"expected images [1, C, H, W], got shape {tuple(call.x.shape)}")
    return pair(call.attribute("strides", (1, 1))), pair(call.attribute("dilations", (1, 1)))


def _padding(
    call: Call, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[nn.Module | None, tuple[int, int]]:
    """(layer of zeros put in front where the sides differ, symmetric padding of the window)."""
    auto = call.attribute("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size, 0)
            for size, k, s, d in zip(call.x.shape[2:], kernel, stride, dilation, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        top, left, bottom, right = (*small, *large) if auto == "SAME_UPPER" else (*large, *small)
    else:
        top, left, bottom, right = call.attribute("pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return None, (top, left)
    return nn.ZeroPad2d((left, right, top, bottom)), (0, 0)


@_layer("Pad")
def _pad(call: Call) -> nn.Module:
    call.only(mode="constant")
    pads, value = call.integers("pads", 1), call.constant(2)
    if call.attribute("value", 0.0) != 0.0 or (value is not None and value.any()) or call.constant(3) is not None:
        raise call.refuse("only zero padding of the image's sides is supported")
    if pads is None or len(pads) != 8 or any(pads[place] for place in (0, 1, 4, 5)):
        raise call.refuse(f"only padding of the last two of four axes is supported, got {pads}")
    return nn.ZeroPad2d((pads[3], pads[7], pads[2], pads[6]))


@_layer("Gemm")
def _gemm(call: Call) -> nn.Module:
    call.only(transA=0)
    weight = call.tensor(1) if call.attribute("transB", 0) else call.tensor(1).T
    bias = None if call.constant(2) is None else call.attribute("beta", 1.0) * call.tensor(2)
    return _linear(call, call.attribute("alpha", 1.0) * weight, bias)


@_layer("MatMul")
def _matmul(call: Call) -> nn.Module:
    return _linear(call, call.tensor(1).T, None)


def _linear(call: Call, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if weight.dim() != 2 or call.x.shape[-1] != weight.shape[1]:
        raise call.refuse(
            f"values of shape {tuple(call.x.shape)} times a matrix {tuple(weight.shape)} is not supported"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.expand(1, len(weight))[0].clone())
    return layer


@_layer("BatchNormalization")
def _batch_norm(call: Call) -> nn.Module:
    call.only(training_mode=0)
    scale, shift, mean, var = (call.tensor(place) for place in (1, 2, 3, 4))
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(call.x.dim())
    if kind is None:
        raise call.refuse(f"expected [1, C] or [1, C, H, W], got shape {tuple(call.x.shape)}")
    layer = kind(len(scale), eps=call.attribute("epsilon", 1e-5)).eval()
    layer.weight, layer.bias = nn.Parameter(scale), nn.Parameter(shift)
    layer.running_mean, layer.running_var = mean, var
    return layer


@_layer("Relu")
def _relu(call: Call) -> nn.Module:
    return nn.ReLU()


@_layer("LeakyRelu")
def _leaky_relu(call: Call) -> nn.Module:
    return nn.LeakyReLU(call.attribute("alpha", 0.01))


@_layer("Sigmoid")
def _sigmoid(call: Call) -> nn.Module:
    return nn.Sigmoid()


@_layer("Tanh")
def _tanh(call: Call) -> nn.Module:
    return nn.Tanh()


@_layer("Identity", "Dropout")
def _identity(call: Call) -> nn.Module:
    return nn.Identity()


@_layer("Cast")
def _cast(call: Call) -> nn.Module:
    types = call.reader.onnx.TensorProto
    if call.attribute("to", 0) != {torch.float32: types.FLOAT, torch.float64: types.DOUBLE}[call.reader.dtype]:
        raise call.refuse("a change of precision is not supported")
    return nn.Identity()


@_layer("Neg")
def _negate(call: Call) -> nn.Module:
    return _Apply(operator.neg)


@_layer("Add", "Sub", "Mul", "Div")
def _arithmetic(call: Call) -> nn.Module:
    function = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}[
        call.node.op_type
    ]
    if len(call.traced) == 2:
        return _Apply(function)
    on_left = call.node.input[0] not in call.reader.values
    return _WithConstant(function, call.tensor(0 if on_left else 1), on_left)


@_layer("Max", "Min")
def _extremum(call: Call) -> nn.Module:
    function = torch.maximum if call.node.op_type == "Max" else torch.minimum
    if len(call.node.input) != 2:
        raise call.refuse(f"expected two inputs, got {len(call.node.input)}")
    if len(call.traced) == 2:
        return _Apply(function)
    bound = call.tensor(0 if call.node.input[0] not in call.reader.values else 1)
    if bound.numel() != 1:
        raise call.refuse(f"a bound of shape {tuple(bound.shape)} is not supported, only a single number")
    limit = bound.item()
    return _clip(limit, None) if call.node.op_type == "Max" else _clip(None, limit)


@_layer("Abs")
def _absolute(call: Call) -> nn.Module:
    return _Apply(torch.abs)


@_layer("Clip")
def _clip_node(call: Call) -> nn.Module:
    low, high = (
        call.attributes.get(name, None if call.constant(k) is None else call.tensor(k).item())
        for k, name in ((1, "min"), (2, "max"))
    )
    return _clip(low, high)


def _clip(low: float | None, high: float | None) -> nn.Module:
    return nn.Identity() if low is high is None else _Apply(lambda x: torch.clamp(x, low, high))


@_layer("Slice")
def _slice(call: Call) -> nn.Module:
    starts, ends, axes, steps = (
        call.integers(name, k) for k, name in ((1, "starts"), (2, "ends"), (3, "axes"), (4, "steps"))
    )
    if starts is None or ends is None:
        raise call.refuse("it lacks its starts or ends")
    cut = [slice(None)] * call.x.dim()
    axes = axes if axes is not None else list(range(len(starts)))
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(axes), strict=True):
        if step < 1:
            raise call.refuse(f"a step of {step} is not supported, only steps from 1")
        cut[call.axis(axis)] = slice(start, end, step)
    return _Apply(lambda x: x[tuple(cut)])


@_layer("Flatten")
def _flatten(call: Call) -> nn.Module:
    call.only(axis=1)
    return nn.Flatten()


@_layer("Reshape")
def _reshape(call: Call) -> nn.Module:
    wanted = call.integers("shape", 1)
    if wanted is None:
        raise call.refuse("it lacks a shape")
    copies = not call.attribute("allowzero", 0)
    return _reshaped(call, [call.x.shape[axis] if size == 0 and copies else size for axis, size in enumerate(wanted)])


@_layer("Squeeze")
def _squeeze(call: Call) -> nn.Module:
    axes = call.integers("axes", 1)
    if axes is None:
        raise call.refuse("it must name its axes")
    away = {axis % call.x.dim() for axis in axes}
    return _reshaped(call, [size for axis, size in enumerate(call.x.shape) if axis not in away])


@_layer("Unsqueeze")
def _unsqueeze(call: Call) -> nn.Module:
    shape = list(call.x.shape)
    axes = call.integers("axes", 1) or []
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return _reshaped(call, shape)


@_layer("Transpose")
def _transpose(call: Call) -> nn.Module:
    order = tuple(call.attribute("perm", range(call.x.dim())[::-1]))
    if order[0] != 0:
        raise call.refuse(f"perm={list(order)} moves the batch axis, which must stay in front")
    return _Apply(lambda x: x.permute(order))


@_layer("Concat")
def _concat(call: Call) -> nn.Module:
    if len(call.traced) != len(call.node.input):
        raise call.refuse("concatenation with a constant is not supported")
    axis = call.attribute("axis", 1)
    return _Apply(lambda *values: torch.cat(values, axis))


@_layer("GlobalAveragePool")
def _global_average_pool(call: Call) -> nn.Module:
    return _Apply(lambda x: x.mean((2, 3), keepdim=True))


@_layer("ReduceMean")
def _reduce_mean(call: Call) -> nn.Module:
    axes = call.integers("axes", 1)
    if axes is None or 0 in {axis % call.x.dim() for axis in axes}:
        raise call.refuse("a mean over the batch axis is not supported; name other axes")
    keepdim = bool(call.attribute("keepdims", 1))
    return _Apply(lambda x: x.mean(tuple(axes), keepdim=keepdim))
