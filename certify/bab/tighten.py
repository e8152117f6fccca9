"""Bound tightening: boxes of unstable neurons on the part of a domain that could hold a counterexample.

A domain is done when no point of it has margin <= 0. So a neuron's box may be computed on the points with margin <= 0
alone: its row is bounded together with a multiple of the margin (Kotha et al. 2023). The closer the margin's own bound
is to 0, the more this cuts, and every cut raises that bound: repeated, it often empties a domain that splitting would
need thousands of children for. Boxes found here hold on that part only, never on the whole domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bab.ascent import Outcome, Point, Relaxation, Task, ascend
from certify.bab.domains import Domains
from certify.bab.dual import backward
from certify.bab.unstable_core import Affine, Core, Layer


def loose_neurons(core: Core, node: Domains) -> Tensor:
    """Neurons worth tightening in a domain, bool `[N]`: all that are unstable but those of the first layer.

    The boxes of the first layer are exact on the whole domain, and hardly shrink on the part that matters.
    """
    unstable = ((node.lb < 0) & (node.ub > 0) & core.splittable)[:, 0]
    if core.layers:
        unstable[core.layers[0].part] = False
    return unstable


Memory = dict[int, Point]
"""Dual variables of the last tightening, by number of the layer: alpha `[N before it + n, 2 n]`, multiplier `[2 n]`."""


@dataclass(frozen=True)
class Tightened:
    """Boxes `[N, 1]` on the part of a domain that matters, and what the next tightening starts from."""

    lb: Tensor
    ub: Tensor
    memory: Memory


def tighten(
    core: Core,
    node: Domains,
    output: Affine,
    iterations: int,
    memory: Memory,
    late: Callable[[], bool] = lambda: False,
    rows: int = 256,
) -> Tightened | None:
    """Tighten the boxes of a domain on its points with `output <= 0`, layer by layer; None if there is no such point.

    Args:
        node: one domain, with the dual variables of its bound; the layers above a neuron use them.
        output: the property.
        iterations: ascent steps per neuron.
        memory: of the domain's last tightening or of its parent's; empty at first.
        late: whether to leave the rest as it is.
        rows: bounds computed at a time.
    """
    lb, ub, chosen = node.lb.clone(), node.ub.clone(), loose_neurons(core, node)
    remembered: Memory = {}
    for number, layer in enumerate(core.layers):
        part = layer.part
        neurons = chosen[part].nonzero().flatten()
        if not len(neurons) or late():
            continue
        above = _above(core, Relaxation.on(core, lb, ub), node, output, number)
        lower = core.prefixes[number]
        relaxation = Relaxation.on(lower, lb[: len(lower)], ub[: len(lower)])
        start = memory.get(number) or _first_guess(layer, relaxation)
        assert start.multiplier is not None
        last = Point(start.alpha.clone(), None, start.multiplier.clone())
        for some in neurons.split(max(1, rows // 2)):
            if late():
                break
            columns = torch.cat([some, some + len(layer.index)])
            found = _bound(lower, relaxation, layer, columns, above, start, iterations)
            which = part.start + some
            lb[which, 0] = torch.maximum(lb[which, 0], found.low[: len(some)])
            ub[which, 0] = torch.minimum(ub[which, 0], -found.low[len(some) :])
            assert last.multiplier is not None and found.point.multiplier is not None
            last.alpha[:, columns], last.multiplier[columns] = found.point.alpha, found.point.multiplier
        # The end that was not tightened is CROWN's, which carries no allowance: crossed ends prove nothing by less.
        if bool((lb[part] - ub[part] > core.slack[part]).any()):
            return None
        crossed = lb[part] > ub[part]
        lb[part], ub[part] = (torch.where(crossed, old[part], new[part]) for old, new in ((node.lb, lb), (node.ub, ub)))
        remembered[number] = last
    return Tightened(lb, ub, remembered)


def _first_guess(layer: Layer, relaxation: Relaxation) -> Point:
    count = 2 * len(layer.index)
    alpha = relaxation.default().expand(-1, count)
    return Point(alpha, None, alpha.new_full((count,), 0.1))


def _above(core: Core, relaxation: Relaxation, node: Domains, output: Affine, number: int) -> Affine:
    """A lower bound of `output` that reads only the layers before `number`; for the core of the first `number + 1`."""
    one = node.low.new_ones(1)
    dual = backward(core, relaxation.slopes(node.alpha), output, one, -(node.sign * node.beta), stop=number)
    a = dual.A[: core.layers[number].part.stop].clone()
    a[core.layers[number].part] = 0.0
    return Affine(dual.x, a, dual.constant)


def _bound(
    core: Core,
    relaxation: Relaxation,
    layer: Layer,
    columns: Tensor,
    output: Affine,
    start: Point,
    iterations: int,
) -> Outcome:
    """Lower bounds of neurons of the core's last layer; columns from n on are their negatives."""
    count = len(layer.index)
    unit = core.lb.new_zeros((len(core), len(columns)))
    side = torch.where(columns < count, 1.0, -1.0).to(unit.dtype)
    unit[layer.part.start + columns % count, torch.arange(len(columns), device=columns.device)] = side
    assert start.multiplier is not None
    begin = Point(start.alpha[:, columns], None, start.multiplier[columns])
    return ascend(core, relaxation, Task(output, unit), begin, iterations, enough=0.0, minimisers=False)
