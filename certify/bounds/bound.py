"""`bound`: one call for every bound method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.alpha_crown import alpha_crown
from certify.bounds.crown import crown
from certify.bounds.crown_ibp import crown_ibp
from certify.bounds.global_l2 import global_l2
from certify.bounds.interval import ibp
from certify.graph import Graph, Snapshot
from certify.region import Region, check_pixels
from certify.tracing import capture


class Bounds(NamedTuple):
    """Lower and upper bounds, each `[B, R]`."""

    lb: Tensor
    ub: Tensor


BOUNDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "ibp": ibp,
    "crown_ibp": crown_ibp,
    "crown": crown,
    "alpha_crown": alpha_crown,
    "global_l2": global_l2,
}
"""Bound methods: (snapshot that ends in its specification, region, **options) -> (lower bounds, scale of rounding)."""


def bound(
    model: nn.Module | Graph | Snapshot,
    x: Tensor,
    ball: Ball,
    spec: Tensor | None = None,
    method: str = "crown",
    **options: Any,
) -> Bounds:
    """Bounds of `spec . model(x')` for every x' in the ball around x.

    Args:
        model: a module (captured in evaluation mode), its Graph, or a Snapshot.
        x: examples `[B, *shape]` in the pixel range of the ball.
        ball: threat model.
        spec: rows `[B, R, K]`; the logits themselves where None.
        method: "ibp", "crown_ibp", "crown", "alpha_crown" or "global_l2" (l2 balls only).
        options: of the method, such as `iterations=100` of alpha_crown.

    Returns:
        Bounds with `[B, R]` each, differentiable with respect to the model's parameters (but for alpha_crown and
        global_l2).

    Raises:
        ValueError: examples outside the pixel range, or a spec of another shape or type.
    """
    if method not in BOUNDS:
        raise ValueError(f"no bound method {method!r}; known: {', '.join(BOUNDS)}")
    check_pixels(x, ball)
    snapshot = snapshot_of(model, x)
    (classes,) = snapshot.nodes[-1].shape
    if spec is None:
        spec = torch.eye(classes, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    if spec.dim() != 3 or spec.shape[0] not in (1, len(x)) or spec.shape[2] != classes or spec.dtype != x.dtype:
        raise ValueError(
            f"spec must be [B, R, K] = [{len(x)}, R, {classes}] of {x.dtype}, got {tuple(spec.shape)} of {spec.dtype}"
        )
    region = Region.around(x, ball)
    rows = torch.cat([spec, -spec], 1)
    low, _ = BOUNDS[method](snapshot.with_spec(rows), region, **options)
    return Bounds(low[:, : spec.shape[1]], -low[:, spec.shape[1] :])


def snapshot_of(model: nn.Module | Graph | Snapshot, x: Tensor) -> Snapshot:
    """The model's ops with today's weights, in the precision of `x`."""
    if isinstance(model, Snapshot):
        return model
    graph = model if isinstance(model, Graph) else capture(model, x[:1])
    return graph.snapshot()
