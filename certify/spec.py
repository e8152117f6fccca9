"""Properties of logits: rows C of `C z > 0`."""

from __future__ import annotations

import torch
from torch import Tensor


def margin_spec(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows e_y - e_t for every other class t, ascending: `[B, K - 1, K]`.

    Args:
        y: labels `[B]` in 0 .. K - 1.
        classes: K, at least 2.

    Raises:
        ValueError: labels that are not of an integer type that indexes (bytes and booleans would be taken for masks).
    """
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y is {y.dtype}; labels are numbers of classes in int64, y.long()")
    if classes < 2:
        raise ValueError(f"a margin needs at least 2 classes, got {classes}")
    identity = torch.eye(classes, dtype=dtype, device=y.device)
    return identity.index_select(0, y).unsqueeze(1) - identity[other_classes(y, classes)]


def other_classes(y: Tensor, classes: int) -> Tensor:
    """Classes t != y, ascending: `[B, K - 1]`."""
    places = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return places + (places >= y.unsqueeze(1))
