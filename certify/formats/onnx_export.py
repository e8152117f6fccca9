"""Networks as ONNX files, which a runtime confirms before they are kept."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from certify.formats.onnx import FormatError

INPUT, OUTPUT = "pixels", "logits"

TOLERANCE = 1e-4
"""Largest difference between the file's logits and the model's, as a share of the largest logit or of 1."""


def export_onnx(model: nn.Module, input_shape: tuple[int, ...], path: Path) -> float:
    """Write `model` to `path` as an ONNX file of pixels `[N, *input_shape]` to logits `[N, K]`, N free.

    Args:
        model: in evaluation mode, of plain layers with fixed weights (`robust.plain`).

    Returns:
        The largest difference between logits of the model and those that onnxruntime computes from the file, on random
        pixels and for several N.

    Raises:
        FormatError: the extra [onnx] is not installed, torch cannot export the model, or the file computes something
            else; `path` is then as it was before.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise FormatError(f"{package} is not installed; pip install 'robust-suite[onnx]'") from None
    example = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("N")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.onnx"
        try:
            with _quiet():
                torch.onnx.export(
                    model,
                    (example,),
                    str(made),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    dynamic_shapes=({0: batch},),
                    external_data=False,
                    verbose=False,
                )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise FormatError(f"{type(model).__name__} cannot be written as ONNX: {reason}") from None
        content = made.read_bytes()
    difference = _difference(model, content, input_shape, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return difference


def _difference(model: nn.Module, content: bytes, input_shape: tuple[int, ...], path: Path) -> float:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    noise, largest = torch.Generator().manual_seed(1), 0.0
    for count in (1, 3, 5):
        x = torch.rand(count, *input_shape, generator=noise)
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(None, {INPUT: x.numpy()})
        if found.shape != expected.shape:
            raise FormatError(f"{path}: {count} images give outputs {found.shape}, the model's are {expected.shape}")
        difference = float((torch.from_numpy(found) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise FormatError(f"{path}: the file's logits differ from the model's by {difference:.3g}; not written")
        largest = max(largest, difference)
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its steps on every channel; what matters of it are its errors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
