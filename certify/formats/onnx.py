"""ONNX networks as `nn.Module`s of the layers that have bound rules, and onnxruntime, which says what they compute.

Needs the extra `[onnx]`: onnx and onnxruntime.
"""

from __future__ import annotations

import gzip
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.ops.affine import pair


class FormatError(ValueError):
    """A file that is not what it should be, or that holds what the suite has no rule for; one line, file first."""


@dataclass(frozen=True)
class OnnxModel:
    """A network read from an ONNX file.

    Attributes:
        network: takes `[B, *input_shape]` to `[B, K]` like the file's graph, outputs flattened; in evaluation mode.
        input_shape: shape of one example.
        dtype: of inputs and weights, float32 or float64.
        session: the file as an onnxruntime.InferenceSession, whose results are the ones that count.
    """

    network: nn.Module
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    session: Any

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """onnxruntime's outputs `[K]` for one example `[*input_shape]`."""
        (source,) = self.session.get_inputs()
        value = np.ascontiguousarray(x, dtype=_NUMPY[self.dtype]).reshape(1, *self.input_shape)
        return np.asarray(self.session.run(None, {source.name: value})[0]).reshape(-1)


def load_onnx(path: Path) -> OnnxModel:
    """The network in an ONNX file (or a gzipped one), compared with onnxruntime on a few inputs.

    Raises:
        FormatError: no such file, no ONNX model, an op without a rule, several inputs or outputs, a batch axis other
            than 1 or free, or a network that does not compute what onnxruntime computes.
    """
    path = Path(path)
    onnx, runtime = _libraries()
    content = _content(path)
    proto = _parsed(onnx, content, path)
    try:
        runtime.set_default_logger_severity(3)
        session = runtime.InferenceSession(
            str(path) if content is None else content, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exception types have no common base
        raise FormatError(f"{path}: onnxruntime refuses it ({_line(error)})") from None
    reader = _Reader(onnx, proto, path)
    model = OnnxModel(reader.network.eval(), reader.input_shape, reader.dtype, session)
    _compare(model, path)
    return model


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnx.checker
        import onnx.numpy_helper
        import onnx.reference
        import onnxruntime
    except ImportError as error:
        raise FormatError(
            f"reading ONNX files needs the packages onnx and onnxruntime ({error}); pip install 'robust-suite[onnx]'"
        ) from None
    return onnx, onnxruntime


def _content(path: Path) -> bytes | None:
    """Unpacked content of a gzipped file; None for a plain one, whose weights may lie in files beside it."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.suffix != ".gz":
        return None
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise FormatError(f"{path}: cannot be unpacked ({error})") from None


def _parsed(onnx: Any, content: bytes | None, path: Path) -> Any:
    try:
        proto = onnx.load(str(path)) if content is None else onnx.load_model_from_string(content)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf's, the checker's or the system's: none is an ONNX model that can be used
        raise FormatError(f"{path}: no valid ONNX model ({_line(error)})") from None
    return proto


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _compare(model: OnnxModel, path: Path) -> None:
    """Refuse a network whose outputs differ from onnxruntime's by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((2, *model.input_shape), generator=generator, dtype=model.dtype)
    x = torch.cat([pixels, torch.randn(pixels.shape, generator=generator, dtype=model.dtype)])
    with torch.no_grad():
        ours = model.network(x).double().numpy()
    theirs = np.stack([model.evaluate(one).astype(np.float64) for one in x.numpy()])
    scale = max(1.0, float(np.abs(theirs).max())) if np.isfinite(theirs).all() else math.nan
    if not (ours.shape == theirs.shape and bool((np.abs(ours - theirs) <= 1e-4 * scale).all())):
        raise FormatError(f"{path}: read as a network that differs from onnxruntime's; please report this file")


class _Network(nn.Module):
    """Layers in the order of the graph; `wires` are (names of inputs, name of output)."""

    def __init__(self, layers: Sequence[nn.Module], wires: Sequence[tuple[tuple[str, ...], str]], source: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.wires = tuple(wires)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        values = {self.source: x}
        for layer, (inputs, output) in zip(self.layers, self.wires, strict=True):
            x = values[output] = layer(*(values[name] for name in inputs))
        return x


class _Reader:
    """Walks the graph once with an example, and makes a layer of every node that depends on the input."""

    def __init__(self, onnx: Any, proto: Any, path: Path) -> None:
        self.onnx, self.path, self.opsets = onnx, path, proto.opset_import
        graph = proto.graph
        self.constants: dict[str, np.ndarray] = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        source = self._only([i for i in graph.input if i.name not in self.constants], "input")
        target = self._only(graph.output, "output")
        self.dtype = self._dtype(source)
        self.input_shape = self._example_shape(source)
        self.values: dict[str, Tensor] = {source.name: torch.zeros((1, *self.input_shape), dtype=self.dtype)}
        self.layers: list[nn.Module] = []
        self.wires: list[tuple[tuple[str, ...], str]] = []
        needed = _needed(graph, target.name)
        for node in graph.node:
            if needed.intersection(node.output):
                with torch.no_grad():
                    self._visit(node)
        if target.name not in self.values:
            raise FormatError(f"{path}: its output {target.name!r} does not depend on its input")
        self._finish(source.name, target.name)
        self.network = _Network(self.layers, self.wires, source.name)

    def refuse(self, node: Any, reason: str) -> FormatError:
        name = f" (node {node.name!r})" if node.name else ""
        return FormatError(f"{self.path}: {node.op_type}{name}: {reason}")

    def _only(self, found: Sequence[Any], kind: str) -> Any:
        if len(found) != 1:
            raise FormatError(
                f"{self.path}: expected one {kind}, got {len(found)} ({', '.join(f.name for f in found)})"
            )
        return found[0]

    def _dtype(self, source: Any) -> torch.dtype:
        kinds = {self.onnx.TensorProto.FLOAT: torch.float32, self.onnx.TensorProto.DOUBLE: torch.float64}
        kind = source.type.tensor_type.elem_type
        if kind not in kinds:
            raise FormatError(
                f"{self.path}: expected float32 or float64 inputs, got {self.onnx.TensorProto.DataType.Name(kind)}"
            )
        return kinds[kind]

    def _example_shape(self, source: Any) -> tuple[int, ...]:
        sizes = [axis.dim_value for axis in source.type.tensor_type.shape.dim]
        if len(sizes) < 2 or sizes[0] not in (0, 1) or min(sizes[1:]) < 1:
            shown = [axis.dim_param or axis.dim_value for axis in source.type.tensor_type.shape.dim]
            raise FormatError(
                f"{self.path}: expected an input [1, ...] or [batch, ...] with known sizes behind the batch, "
                f"got {shown}"
            )
        return tuple(sizes[1:])

    def _visit(self, node: Any) -> None:
        if not any(name in self.values for name in node.input):
            self._fold(node)
            return
        if node.op_type == "Shape":
            self._shape(node)
            return
        if node.op_type == "Split":
            self._split(node)
            return
        build = _LAYERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if build is None:
            known = ", ".join(sorted({*_LAYERS, "Shape", "Split"}))
            raise self.refuse(node, f"no rule for this op; rules exist for {known}")
        call = _Call(self, node)
        try:
            self._append(build(call).to(self.dtype), call.traced_names, node.output[0])
        except FormatError:
            raise
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise self.refuse(node, _line(error)) from None
        shape = tuple(self.values[node.output[0]].shape)
        if shape[:1] != (1,):
            raise self.refuse(node, f"its value of shape {shape} mixes the batch with other axes")

    def _append(self, layer: nn.Module, inputs: tuple[str, ...], output: str) -> None:
        self.values[output] = layer(*(self.values[name] for name in inputs))
        self.layers.append(layer.requires_grad_(False))
        self.wires.append((inputs, output))

    def _split(self, node: Any) -> None:
        """The only op with several outputs: each of them is a slice."""
        call = _Call(self, node)
        axis = call.axis(call.attribute("axis", 0))
        sizes = call.integers("split", 1)
        if sizes is None:
            size, most = call.x.shape[axis], -(-call.x.shape[axis] // len(node.output))
            sizes = [min(most, size - k * most) for k in range(len(node.output))]
        for k, output in enumerate(node.output):
            self._append(_narrow(axis, sum(sizes[:k]), sizes[k]), call.traced_names, output)

    def _shape(self, node: Any) -> None:
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        sizes = list(self.values[node.input[0]].shape)
        self.constants[node.output[0]] = np.array(sizes[attributes.get("start", 0) : attributes.get("end")], np.int64)

    def _fold(self, node: Any) -> None:
        """Value of a node that depends on constants only, from ONNX's reference implementation."""
        given = [name for name in node.input if name]
        helper = self.onnx.helper
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(self.constants[n].dtype), None)
            for n in given
        ]
        outs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        model = helper.make_model(helper.make_graph([node], "constant", infos, outs), opset_imports=self.opsets)
        try:
            found = self.onnx.reference.ReferenceEvaluator(model).run(None, {n: self.constants[n] for n in given})
        except Exception as error:  # whatever an op of the reference raises, it has no value
            raise self.refuse(node, f"constant without a value ({_line(error)})") from None
        self.constants |= zip([name for name in node.output if name], map(np.asarray, found), strict=True)

    def _finish(self, source: str, target: str) -> None:
        """Make the target the last value, a vector per example."""
        place = max((k for k, (_, output) in enumerate(self.wires) if output == target), default=-1)
        del self.layers[place + 1 :], self.wires[place + 1 :]
        value = self.values[target]
        if value.dim() != 2:
            self._append(nn.Flatten(), (target,), f"{target} flat")


@dataclass
class _Call:
    """A node as the rules below see it."""

    reader: _Reader
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

    def refuse(self, reason: str) -> FormatError:
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


Build = Callable[[_Call], nn.Module]
_LAYERS: dict[str, Build] = {}
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _layer(*ops: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        _LAYERS.update(dict.fromkeys(ops, build))
        return build

    return add


def _needed(graph: Any, target: str) -> set[str]:
    """Names of the values that the output depends on."""
    needed = {target}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    return needed


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


def _narrow(axis: int, start: int, length: int) -> nn.Module:
    return _Apply(lambda x: x.narrow(axis, start, length))


def _reshaped(call: _Call, shape: Sequence[int]) -> nn.Module:
    """Layer for a value of the given shape, of which the first axis must be the batch of one."""
    shape = tuple(call.x.reshape(tuple(shape)).shape)
    if not shape or shape[0] != 1:
        raise call.refuse(f"the new shape {list(shape)} moves the batch axis, which must stay in front")
    return _Reshape(shape[1:])


@_layer("Conv")
def _conv(call: _Call) -> nn.Module:
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
def _max_pool(call: _Call) -> nn.Module:
    if len(call.node.output) > 1 and call.node.output[1]:
        raise call.refuse("the indices of a maximum are not supported")
    kernel, (stride, dilation) = pair(call.attribute("kernel_shape", ())), _window(call)
    before, padding = _padding(call, kernel, stride, dilation)
    if before is not None:
        raise call.refuse("padding that differs from side to side is not supported")
    return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=bool(call.attribute("ceil_mode", 0)))


@_layer("AveragePool")
def _average_pool(call: _Call) -> nn.Module:
    kernel, (stride, dilation) = pair(call.attribute("kernel_shape", ())), _window(call)
    before, padding = _padding(call, kernel, stride, dilation)
    if before is not None or dilation != (1, 1):
        raise call.refuse("dilation, and padding that differs from side to side, are not supported")
    counts = bool(call.attribute("count_include_pad", 0))
    return nn.AvgPool2d(kernel, stride, padding, bool(call.attribute("ceil_mode", 0)), counts)


def _window(call: _Call) -> tuple[tuple[int, int], tuple[int, int]]:
    """(stride, dilation) of a window over images."""
    if call.x.dim() != 4:
        raise call.refuse(f"expected images [1, C, H, W], got shape {tuple(call.x.shape)}")
    return pair(call.attribute("strides", (1, 1))), pair(call.attribute("dilations", (1, 1)))


def _padding(
    call: _Call, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
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
def _pad(call: _Call) -> nn.Module:
    call.only(mode="constant")
    pads, value = call.integers("pads", 1), call.constant(2)
    if call.attribute("value", 0.0) != 0.0 or (value is not None and value.any()) or call.constant(3) is not None:
        raise call.refuse("only zero padding of the image's sides is supported")
    if pads is None or len(pads) != 8 or any(pads[place] for place in (0, 1, 4, 5)):
        raise call.refuse(f"only padding of the last two of four axes is supported, got {pads}")
    return nn.ZeroPad2d((pads[3], pads[7], pads[2], pads[6]))


@_layer("Gemm")
def _gemm(call: _Call) -> nn.Module:
    call.only(transA=0)
    weight = call.tensor(1) if call.attribute("transB", 0) else call.tensor(1).T
    bias = None if call.constant(2) is None else call.attribute("beta", 1.0) * call.tensor(2)
    return _linear(call, call.attribute("alpha", 1.0) * weight, bias)


@_layer("MatMul")
def _matmul(call: _Call) -> nn.Module:
    return _linear(call, call.tensor(1).T, None)


def _linear(call: _Call, weight: Tensor, bias: Tensor | None) -> nn.Module:
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
def _batch_norm(call: _Call) -> nn.Module:
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
def _relu(call: _Call) -> nn.Module:
    return nn.ReLU()


@_layer("LeakyRelu")
def _leaky_relu(call: _Call) -> nn.Module:
    return nn.LeakyReLU(call.attribute("alpha", 0.01))


@_layer("Sigmoid")
def _sigmoid(call: _Call) -> nn.Module:
    return nn.Sigmoid()


@_layer("Tanh")
def _tanh(call: _Call) -> nn.Module:
    return nn.Tanh()


@_layer("Identity", "Dropout")
def _identity(call: _Call) -> nn.Module:
    return nn.Identity()


@_layer("Cast")
def _cast(call: _Call) -> nn.Module:
    types = call.reader.onnx.TensorProto
    if call.attribute("to", 0) != {torch.float32: types.FLOAT, torch.float64: types.DOUBLE}[call.reader.dtype]:
        raise call.refuse("a change of precision is not supported")
    return nn.Identity()


@_layer("Neg")
def _negate(call: _Call) -> nn.Module:
    return _Apply(operator.neg)


@_layer("Add", "Sub", "Mul", "Div")
def _arithmetic(call: _Call) -> nn.Module:
    function = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}[
        call.node.op_type
    ]
    if len(call.traced) == 2:
        return _Apply(function)
    on_left = call.node.input[0] not in call.reader.values
    return _WithConstant(function, call.tensor(0 if on_left else 1), on_left)


@_layer("Max", "Min")
def _extremum(call: _Call) -> nn.Module:
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
def _absolute(call: _Call) -> nn.Module:
    return _Apply(torch.abs)


@_layer("Clip")
def _clip_node(call: _Call) -> nn.Module:
    low, high = (
        call.attributes.get(name, None if call.constant(k) is None else call.tensor(k).item())
        for k, name in ((1, "min"), (2, "max"))
    )
    return _clip(low, high)


def _clip(low: float | None, high: float | None) -> nn.Module:
    return nn.Identity() if low is high is None else _Apply(lambda x: torch.clamp(x, low, high))


@_layer("Slice")
def _slice(call: _Call) -> nn.Module:
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
def _flatten(call: _Call) -> nn.Module:
    call.only(axis=1)
    return nn.Flatten()


@_layer("Reshape")
def _reshape(call: _Call) -> nn.Module:
    wanted = call.integers("shape", 1)
    if wanted is None:
        raise call.refuse("it lacks a shape")
    copies = not call.attribute("allowzero", 0)
    return _reshaped(call, [call.x.shape[axis] if size == 0 and copies else size for axis, size in enumerate(wanted)])


@_layer("Squeeze")
def _squeeze(call: _Call) -> nn.Module:
    axes = call.integers("axes", 1)
    if axes is None:
        raise call.refuse("it must name its axes")
    away = {axis % call.x.dim() for axis in axes}
    return _reshaped(call, [size for axis, size in enumerate(call.x.shape) if axis not in away])


@_layer("Unsqueeze")
def _unsqueeze(call: _Call) -> nn.Module:
    shape = list(call.x.shape)
    axes = call.integers("axes", 1) or []
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return _reshaped(call, shape)


@_layer("Transpose")
def _transpose(call: _Call) -> nn.Module:
    order = tuple(call.attribute("perm", range(call.x.dim())[::-1]))
    if order[0] != 0:
        raise call.refuse(f"perm={list(order)} moves the batch axis, which must stay in front")
    return _Apply(lambda x: x.permute(order))


@_layer("Concat")
def _concat(call: _Call) -> nn.Module:
    if len(call.traced) != len(call.node.input):
        raise call.refuse("concatenation with a constant is not supported")
    axis = call.attribute("axis", 1)
    return _Apply(lambda *values: torch.cat(values, axis))


@_layer("GlobalAveragePool")
def _global_average_pool(call: _Call) -> nn.Module:
    return _Apply(lambda x: x.mean((2, 3), keepdim=True))


@_layer("ReduceMean")
def _reduce_mean(call: _Call) -> nn.Module:
    axes = call.integers("axes", 1)
    if axes is None or 0 in {axis % call.x.dim() for axis in axes}:
        raise call.refuse("a mean over the batch axis is not supported; name other axes")
    keepdim = bool(call.attribute("keepdims", 1))
    return _Apply(lambda x: x.mean(tuple(axes), keepdim=keepdim))
