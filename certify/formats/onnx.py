"""ONNX networks as `nn.Module`s of the layers that have bound rules, and onnxruntime, which says what they compute.

Needs the extra `[onnx]`: onnx and onnxruntime.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.formats.onnx_layers import LAYERS, Call, narrow


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
        build = LAYERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if build is None:
            known = ", ".join(sorted({*LAYERS, "Shape", "Split"}))
            raise self.refuse(node, f"no rule for this op; rules exist for {known}")
        call = Call(self, node)
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
        call = Call(self, node)
        axis = call.axis(call.attribute("axis", 0))
        sizes = call.integers("split", 1)
        if sizes is None:
            size, most = call.x.shape[axis], -(-call.x.shape[axis] // len(node.output))
            sizes = [min(most, size - k * most) for k in range(len(node.output))]
        for k, output in enumerate(node.output):
            self._append(narrow(axis, sum(sizes[:k]), sizes[k]), call.traced_names, output)

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


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _needed(graph: Any, target: str) -> set[str]:
    """Names of the values that the output depends on."""
    needed = {target}
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
    return needed
