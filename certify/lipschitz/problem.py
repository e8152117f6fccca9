"""The question behind a local Lipschitz constant, checked once and posed in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.jacobian import DUAL
from certify.graph import Graph, Snapshot
from certify.lipschitz.search import Search, attained_norms
from certify.region import Region
from certify.tracing import CaptureError, capture


@dataclass(frozen=True)
class Problem:
    """Greatest dual norms of rows . J over the region of each example.

    Attributes:
        snapshot, x, rows: in float64; rows `[B, R, K]`.
        norm: of the input, "linf", "l2" or "l1".
    """

    snapshot: Snapshot
    x: Tensor
    ball: Ball
    rows: Tensor
    norm: str
    search: Search

    @property
    def region(self) -> Region:
        return Region.around(self.x, self.ball)

    def examples(self, owner: Tensor) -> Tensor:
        """The example of each of `[N]` row numbers in 0 .. B * R - 1."""
        return owner // self.rows.shape[1]

    def network(self, owner: Tensor) -> Snapshot:
        """The network for a batch of N row numbers."""
        return self.snapshot.select(self.examples(owner))

    def attained(self) -> Tensor:
        """Lower bounds `[B, R]` by search."""
        return attained_norms(self.snapshot, self.x, self.rows, self.ball, self.norm, self.search)[0]


def posed(
    model: nn.Module | Graph | Snapshot, x: Tensor, ball: Ball, spec: Tensor | None, norm: str | None, search: Search
) -> Problem:
    """The problem, or a ValueError for one that makes no sense; arguments as in `local_lipschitz`."""
    norm = ball.norm if norm is None else norm
    if norm not in DUAL:
        raise ValueError(f"no Lipschitz constant for distances in {norm!r}; known norms: {', '.join(DUAL)}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be a batch [B, ...] of real numbers, got shape {tuple(x.shape)} of {x.dtype}")
    if not x.numel():
        raise ValueError(f"x holds no examples: its shape is {tuple(x.shape)}")
    low, high = ball.pixel_range or (-math.inf, math.inf)
    if len(x) and not (low <= float(x.min()) and float(x.max()) <= high):
        raise ValueError(
            f"x has values from {float(x.min()):g} to {float(x.max()):g}, outside the pixel range [{low:g}, {high:g}]; "
            "give pixels, or a ball with pixel_range=None"
        )
    snapshot, wide = in_float64(model, x), x.double()
    (classes,) = snapshot.nodes[-1].shape
    rows = torch.eye(classes, dtype=wide.dtype, device=x.device).expand(len(x), -1, -1) if spec is None else spec
    if rows.dim() != 3 or rows.shape[0] != len(x) or rows.shape[2] != classes:
        raise ValueError(f"spec must be [B, R, K] = [{len(x)}, R, {classes}], got {tuple(rows.shape)}")
    return Problem(snapshot, wide, ball, rows.to(wide), norm, search)


def in_float64(model: nn.Module | Graph | Snapshot, x: Tensor) -> Snapshot:
    """The model's ops with today's weights, widened."""
    if isinstance(model, nn.Module):
        model = _captured(model, x)
    snapshot = model.snapshot() if isinstance(model, Graph) else model
    return snapshot.without_gradient().to(torch.float64)


def _captured(model: nn.Module, x: Tensor) -> Graph:
    try:
        # From widened parameters: what capture folds in float32 differs from the model by float32's rounding.
        return capture(copy.deepcopy(model).double(), x[:1].double())
    except (CaptureError, RuntimeError):  # a forward that casts to float32 itself
        return capture(model, x[:1])
