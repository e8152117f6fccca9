"""alpha-CROWN: CROWN whose relaxation slopes are optimised by gradient ascent on the bound (Xu et al. 2021).

Every choice of the free parameters is sound, so the best bound of all iterations counts, row by row. Slopes are
separate for every start node and every row of it. With `optimise_intermediate` the bounds of hidden neurons are
optimised too, for the sum of the final bounds; otherwise they stay at CROWN's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from certify.bounds.crown import (
    Alphas,
    Boxes,
    Rows,
    backward,
    bound_rows,
    intermediate_boxes,
    loose_mask,
    output_rows,
)
from certify.graph import Snapshot
from certify.op import Activation, AnyBox, Box
from certify.region import Region


def alpha_crown(
    snapshot: Snapshot,
    region: Region,
    boxes: Boxes | None = None,
    *,
    iterations: int = 20,
    lr: float = 0.1,
    decay: float = 0.98,
    optimise_intermediate: bool = True,
    wanted: Tensor | None = None,
    enough: Callable[[Tensor, Tensor], bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower bounds of all outputs `[B, R]` of a network that ends in its specification, and their scale of rounding.

    Args:
        boxes: CROWN's intermediate bounds, if they are known.
        iterations: ascent steps; 0 is CROWN.
        lr: Adam's step on slopes in [0, 1]; it decays by the factor `decay` per iteration.
        optimise_intermediate: optimise hidden bounds too (dearer, tighter on deep nets).
        wanted: outputs that the objective sums over, bool `[B, R]`; all where None.
        enough: called with the best bounds so far and their scale, each `[B, R]`; True ends the ascent.
    """
    if iterations and torch.is_inference_mode_enabled():
        raise RuntimeError("alpha_crown needs gradients: call it outside torch.inference_mode (torch.no_grad is fine)")
    snapshot = snapshot.without_gradient()
    start = len(snapshot.nodes) - 1
    base = intermediate_boxes(snapshot, region) if boxes is None else boxes
    rows = _rows_to_optimise(snapshot, base) if optimise_intermediate else {}
    alphas = {place: _default_alphas(snapshot, base, place, 2 * len(rows[place])) for place in rows}
    alphas[start] = _default_alphas(snapshot, base, start, snapshot.nodes[start].shape[0])
    free = [alpha for group in alphas.values() for alpha in group.values()]
    best, best_scale = _final(snapshot, region, base, None)
    if not free or iterations == 0:
        return best.T, best_scale.T
    optimiser = torch.optim.Adam(free, lr=lr)
    tight = base
    for iteration in range(iterations + 1):
        if enough is not None and enough(best.T, best_scale.T):
            break
        with torch.enable_grad():
            current, tight = _tightened(snapshot, region, tight, rows, alphas)
            low, scale = _final(snapshot, region, current, alphas[start])
            better = low.detach() > best
            best_scale = torch.where(better, scale, best_scale)
            best = torch.where(better, low.detach(), best)
            if iteration == iterations:
                break
            objective = low.sum() if wanted is None else torch.where(wanted.T, low, 0.0).sum()
            gradients = torch.autograd.grad(-objective, free, allow_unused=True)
        _ascend(optimiser, free, gradients, decay)
    return best.T, best_scale.T


def tightened_boxes(
    snapshot: Snapshot, region: Region, *, iterations: int = 20, lr: float = 0.1, decay: float = 0.98
) -> Boxes:
    """Intermediate bounds whose slopes are optimised for these bounds themselves, not for those of the outputs.

    The objective is the sum of their widths as shares of CROWN's; arguments as in `alpha_crown`.
    """
    snapshot = snapshot.without_gradient()
    tight = intermediate_boxes(snapshot, region)
    rows = _rows_to_optimise(snapshot, tight)
    alphas = {place: _default_alphas(snapshot, tight, place, 2 * len(rows[place])) for place in rows}
    free = [alpha for group in alphas.values() for alpha in group.values()]
    if not free or iterations == 0:
        return tight
    before = {place: (tight[place].ub - tight[place].lb).clamp(min=torch.finfo(region.x.dtype).tiny) for place in rows}
    optimiser = torch.optim.Adam(free, lr=lr)
    for _ in range(iterations):
        with torch.enable_grad():
            current, tight = _tightened(snapshot, region, tight, rows, alphas)
            shares = [((current[place].ub - current[place].lb) / before[place]).sum() for place in rows]
            gradients = torch.autograd.grad(torch.stack(shares).sum(), free, allow_unused=True)
        _ascend(optimiser, free, gradients, decay)
    return _tightened(snapshot, region, tight, rows, alphas)[1]


def _ascend(
    optimiser: torch.optim.Optimizer, free: list[Tensor], gradients: Sequence[Tensor | None], decay: float
) -> None:
    """One step, and the next one's size; the slopes stay feasible."""
    for alpha, gradient in zip(free, gradients, strict=True):
        alpha.grad = gradient
    optimiser.step()
    for group in optimiser.param_groups:
        group["lr"] *= decay
    # Clamped after the step and before the next bound: only bounds of feasible slopes are kept.
    with torch.no_grad():
        for alpha in free:
            alpha.clamp_(0, 1)


def _final(snapshot: Snapshot, region: Region, boxes: Boxes, alphas: Alphas | None) -> tuple[Tensor, Tensor]:
    linear = backward(snapshot, len(snapshot.nodes) - 1, output_rows(snapshot, region), boxes, alphas)
    return region.minimum(linear.A, linear.constant), region.magnitude(linear.A.detach()) + linear.scale


def _rows_to_optimise(snapshot: Snapshot, boxes: Boxes) -> dict[int, Rows]:
    """Rows of hidden nodes whose bounds depend on free parameters and are loose."""
    found = {}
    for place, box in boxes.items():
        mask = loose_mask(snapshot, place, box)
        if mask.any() and _free_before(snapshot, place, boxes):
            found[place] = Rows.of(mask)
    return found


def _free_before(snapshot: Snapshot, start: int, boxes: Boxes) -> list[int]:
    """Activations between the input and `start` that have free parameters and neurons that use them."""
    reached = {start}
    found = []
    for place in range(start, 0, -1):
        if place in reached:
            node = snapshot.nodes[place]
            reached.update(node.inputs)
            if isinstance(node.op, Activation) and node.op.free and node.op.loose(boxes[node.inputs[0]]).any():
                found.append(place)
    return found


def _default_alphas(snapshot: Snapshot, boxes: Boxes, start: int, rows: int) -> dict[int, Tensor]:
    alphas = {}
    for place in _free_before(snapshot, start, boxes):
        node = snapshot.nodes[place]
        assert isinstance(node.op, Activation)
        default = node.op.default_alpha(boxes[node.inputs[0]]).unsqueeze(1)
        alphas[place] = default.expand(-1, rows, *default.shape[2:]).clone().requires_grad_()
    return alphas


def _tightened(
    snapshot: Snapshot, region: Region, tight: Boxes, rows: dict[int, Rows], alphas: dict[int, dict[int, Tensor]]
) -> tuple[Boxes, Boxes]:
    """(boxes to bound with, best boxes so far without gradient).

    The value of a box is the best found so far, its gradient that of this iteration's bound: a maximum would cut the
    gradient wherever an earlier iterate was better.
    """
    current, best = dict(tight), dict(tight)
    for place, which in rows.items():
        low = bound_rows(snapshot, place, which, current, region, alphas[place])
        fresh = which.write(_hollow(tight[place]), low)
        found = Box(
            torch.maximum(fresh.lb.detach(), tight[place].lb), torch.minimum(fresh.ub.detach(), tight[place].ub)
        )
        written = torch.isfinite(fresh.lb)
        current[place] = Box(_through(fresh.lb, found.lb, written), _through(fresh.ub, found.ub, written))
        best[place] = found
    return current, best


def _hollow(box: AnyBox) -> Box:
    return Box(torch.full_like(box.lb, -torch.inf), torch.full_like(box.ub, torch.inf))


def _through(fresh: Tensor, value: Tensor, written: Tensor) -> Tensor:
    """`value`, with the gradient of `fresh` where it was written."""
    safe = torch.where(written, fresh, 0.0)
    return value + (safe - safe.detach())
