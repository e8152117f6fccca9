"""Networks as ONNX files, and properties as VNN-LIB texts."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from robust.plain import plain


def export(model: nn.Module, x: Tensor, path: Path) -> Path:
    """`model` with fixed weights exported by torch for inputs like `x` `[1, ...]`."""
    with warnings.catch_warnings():  # the exporter warns of itself
        warnings.simplefilter("ignore")
        torch.onnx.export(plain(model), (x,), str(path), external_data=False, verbose=False)
    return path


def robustness(x: Tensor, label: int, eps: float, classes: int) -> str:
    """The property that no pixel change of at most `eps` makes another class win, as the competition writes it."""
    low, high = ((x.double() + shift).clamp(0, 1).flatten().tolist() for shift in (-eps, eps))
    lines = [f"; radius {eps}", *(f"(declare-const X_{i} Real)" for i in range(len(low)))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (lb, ub) in enumerate(zip(low, high, strict=True)):
        lines += [f"(assert (>= X_{i} {lb!r}))", f"(assert (<= X_{i} {ub!r}))"]
    others = " ".join(f"(and (>= Y_{t} Y_{label}))" for t in range(classes) if t != label)
    return "\n".join([*lines, f"(assert (or {others}))"])
