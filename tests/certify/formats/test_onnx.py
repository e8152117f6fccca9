"""ONNX files: every op against onnxruntime, and how files that are broken or not supported are refused."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from certify.formats.onnx import FormatError, load_onnx
from certify.formats.onnx_layers import LAYERS
from certify.tracing import capture
from tests.certify.formats.exports import export
from tests.certify.networks import INPUT, KINDS, network

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def saved(
    path: Path,
    nodes: list[tuple[str, list[str], dict[str, Any]]],
    constants: dict[str, np.ndarray],
    shape: list[int | str],
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """File of a chain of nodes (op, inputs, attributes); node k writes the value `v<k>`, the last one `y`.

    An op `Split:a,b` writes the values a and b.
    """
    names = [f"v{k}" for k in range(len(nodes) - 1)] + ["y"]
    made = [
        helper.make_node(op.partition(":")[0], inputs, (op.partition(":")[2] or name).split(","), **attrs)
        for (op, inputs, attrs), name in zip(nodes, names, strict=True)
    ]
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


PIXELS: list[int | str] = [1, 2, 6, 6]
CHAINS: dict[str, tuple[list[tuple[str, list[str], dict[str, Any]]], dict[str, np.ndarray], list[int | str]]] = {
    "conv": (
        [("Conv", ["x", "w", "b"], {"pads": [1, 1, 1, 1], "strides": [2, 1]})],
        {"w": random(3, 2, 3, 3), "b": random(3)},
        PIXELS,
    ),
    "conv_uneven": (
        [("Conv", ["x", "w"], {"pads": [0, 1, 2, 0], "dilations": [2, 1]})],
        {"w": random(3, 2, 2, 3)},
        PIXELS,
    ),
    "conv_same": (
        [("Conv", ["x", "w"], {"auto_pad": "SAME_UPPER", "strides": [2, 2]})],
        {"w": random(3, 2, 4, 3)},
        PIXELS,
    ),
    "conv_groups": ([("Conv", ["x", "w"], {"group": 2})], {"w": random(4, 1, 3, 3)}, PIXELS),
    "max_pool": ([("MaxPool", ["x"], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]})], {}, PIXELS),
    "max_pool_ceil": ([("MaxPool", ["x"], {"kernel_shape": [4, 4], "strides": [4, 4], "ceil_mode": 1})], {}, PIXELS),
    "average_pool": ([("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})], {}, PIXELS),
    "average_pool_pads": (
        [("AveragePool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1})],
        {},
        PIXELS,
    ),
    "global_average": ([("GlobalAveragePool", ["x"], {})], {}, PIXELS),
    "reduce_mean": ([("ReduceMean", ["x"], {"axes": [2, -1], "keepdims": 0})], {}, PIXELS),
    "batch_norm": (
        [("BatchNormalization", ["x", "s", "b", "m", "v"], {"epsilon": 0.1})],
        {"s": random(2), "b": random(2), "m": random(2), "v": np.abs(random(2))},
        PIXELS,
    ),
    "pad": ([("Pad", ["x", "p"], {})], {"p": np.array([0, 0, 1, 2, 0, 0, 0, 1])}, PIXELS),
    "gemm": (
        [("Gemm", ["x", "w", "b"], {"alpha": 0.5, "beta": 2.0})],
        {"w": random(5, 3), "b": random(1, 3)},
        ["N", 5],
    ),
    "gemm_transposed": ([("Gemm", ["x", "w"], {"transB": 1})], {"w": random(3, 5)}, [1, 5]),
    "matmul": ([("MatMul", ["x", "w"], {}), ("Add", ["v0", "b"], {})], {"w": random(5, 3), "b": random(3)}, [1, 5]),
    "acas": (
        [("Sub", ["x", "m"], {}), ("Flatten", ["v0"], {"axis": 1}), ("MatMul", ["v1", "w"], {}), ("Relu", ["v2"], {})],
        {"m": random(1, 1, 1, 5), "w": random(5, 4)},
        [1, 1, 1, 5],
    ),
    "activations": (
        [("Relu", ["x"], {}), ("LeakyRelu", ["v0"], {"alpha": 0.2}), ("Sigmoid", ["v1"], {}), ("Tanh", ["v2"], {})],
        {},
        PIXELS,
    ),
    "arithmetic": (
        [
            ("Sub", ["c", "x"], {}),
            ("Mul", ["v0", "d"], {}),
            ("Div", ["v1", "d"], {}),
            ("Neg", ["v2"], {}),
            ("Sub", ["v3", "x"], {}),
        ],
        {"c": random(2, 1, 1), "d": np.array(1.7, np.float32)},
        PIXELS,
    ),
    "branches": ([("Relu", ["x"], {}), ("Add", ["v0", "x"], {}), ("Concat", ["v1", "x"], {"axis": 1})], {}, PIXELS),
    "reshape_by_shape": (
        [
            ("Shape", ["x"], {}),
            ("Gather", ["v0", "i"], {}),
            ("Unsqueeze", ["v1", "a"], {}),
            ("Concat", ["v2", "rest"], {"axis": 0}),
            ("Reshape", ["x", "v3"], {}),
        ],
        {"i": np.array(0), "a": np.array([0]), "rest": np.array([-1])},
        PIXELS,
    ),
    "moves": (
        [
            ("Transpose", ["x"], {"perm": [0, 2, 3, 1]}),
            ("Reshape", ["v0", "s"], {}),
            ("Unsqueeze", ["v1", "a"], {}),
            ("Squeeze", ["v2", "a"], {}),
        ],
        {"s": np.array([0, -1, 4]), "a": np.array([1])},
        PIXELS,
    ),
    "split": (
        [
            ("Split:a,b", ["x"], {"axis": 1}),
            ("Max", ["a", "b"], {}),
            ("Min", ["v1", "a"], {}),
            ("Sub", ["v2", "b"], {}),
        ],
        {},
        PIXELS,
    ),
    "split_by_sizes": (
        [("Split:a,b", ["x", "s"], {"axis": -1}), ("Concat", ["b", "a"], {"axis": 3})],
        {"s": np.array([2, 4])},
        PIXELS,
    ),
    "slice": (
        [("Slice", ["x", "starts", "ends", "axes", "steps"], {})],
        {
            **{"starts": np.array([1, -4]), "ends": np.array([2**62, -1])},
            **{"axes": np.array([2, -1]), "steps": np.array([1, 2])},
        },
        PIXELS,
    ),
    "clip": (
        [
            ("Clip", ["x", "low", "high"], {}),
            ("Clip", ["v0", "", "mid"], {}),
            ("Max", ["low", "v1"], {}),
            ("Min", ["v2", "mid"], {}),
            ("Abs", ["v3"], {}),
        ],
        {"low": np.float32([-0.3])[0].reshape(()), "high": np.array(0.8, np.float32), "mid": np.array(0.2, np.float32)},
        PIXELS,
    ),
    "identity": (
        [("Identity", ["x"], {}), ("Dropout", ["v0"], {}), ("Cast", ["v1"], {"to": TensorProto.FLOAT})],
        {},
        PIXELS,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_op_computes_what_onnxruntime_computes_and_can_be_bounded(name: str, tmp_path: Path) -> None:
    nodes, constants, shape = CHAINS[name]
    model = load_onnx(saved(tmp_path / "m.onnx", nodes, constants, shape))
    assert model.input_shape == tuple(shape[1:])
    x = torch.from_numpy(random(4, *model.input_shape))
    expected = np.stack([model.evaluate(one) for one in x.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(model.network(x).numpy(), expected, rtol=1e-4, atol=1e-5)
        snapshot = capture(model.network, x[:1]).snapshot()
        np.testing.assert_allclose(snapshot(x).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_float64_and_gzipped_networks_are_read(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        [("MatMul", ["x", "w"], {})],
        {"w": random(5, 3).astype(np.float64)},
        [1, 5],
        kind=TensorProto.DOUBLE,
    )
    packed = tmp_path / "m.onnx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    model = load_onnx(packed)
    assert model.dtype is torch.float64
    x = random(1, 5).astype(np.float64)
    np.testing.assert_allclose(model.network(torch.from_numpy(x)).numpy()[0], model.evaluate(x[0]), rtol=1e-14)


def broken(name: str, path: Path) -> None:
    gemm = [("Gemm", ["x", "w"], {})]
    weights = {"w": random(5, 3)}
    match name:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("this is no network")
        case "truncated":
            saved(path, gemm, weights, [1, 5])
            path.write_bytes(path.read_bytes()[:-30])
        case "op":
            saved(path, [("Erf", ["x"], {})], {}, [1, 5])
        case "batch":
            saved(path, gemm, weights, [7, 5])
        case "open":
            saved(path, [("Relu", ["x"], {})], {}, [1, "n"])
        case "moved":
            saved(path, [("Transpose", ["x"], {"perm": [1, 0]})], {}, [1, 5])
        case "product":
            saved(path, [("Gemm", ["x", "x"], {"transB": 1})], weights, [1, 5])
        case "integers":
            saved(path, [("Identity", ["x"], {})], {}, [1, 5], kind=TensorProto.INT64)
        case "cut batch":
            saved(path, [("Split:y,z", ["x"], {"axis": 0})], {}, ["n", 5])
        case "one_dimensional":
            saved(path, [("Conv", ["x", "w"], {})], {"w": random(3, 2, 3)}, [1, 2, 6])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "expected one output|no valid ONNX model"),
        ("text", "no valid ONNX model"),
        ("truncated", "no valid ONNX model"),
        ("op", "Erf: no rule for this op; rules exist for Abs, Add, AveragePool"),
        ("batch", r"expected an input \[1, ...\] or \[batch, ...\] .*got \[7, 5\]"),
        ("open", r"got \[1, 'n'\]"),
        ("moved", r"Transpose: perm=\[1, 0\] moves the batch axis"),
        ("product", "Gemm: its input 'x' depends on the network's input"),
        ("integers", "expected float32 or float64 inputs, got INT64"),
        ("cut batch", "Split: the batch axis cannot be cut"),
        ("one_dimensional", "Conv: only 2-d convolutions"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    broken(name, path)
    with pytest.raises(FormatError, match=message) as error:
        load_onnx(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nothing\.onnx: no such file"):
        load_onnx(tmp_path / "nothing.onnx")


def test_a_network_that_was_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.onnx", [("Relu", ["x"], {}), ("Sub", ["v0", "c"], {})], {"c": random(5)}, [1, 5])
    monkeypatch.setitem(LAYERS, "Relu", lambda call: nn.Identity())
    with pytest.raises(FormatError, match="differs from onnxruntime's"):
        load_onnx(path)


def test_networks_exported_by_torch_are_read(tmp_path: Path) -> None:
    blocks = [KINDS[name] for name in ("batch_norm_2d", "leaky_relu", "skip", "max_pool", "avg_pool", "concat")]
    source = network(blocks, 0)
    model = load_onnx(export(source, torch.rand(1, *INPUT), tmp_path / "m.onnx"))
    x = torch.rand(5, *INPUT)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x), source(x), rtol=1e-4, atol=1e-5)
