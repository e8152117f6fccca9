"""MinMax: pairs of channels, sorted. The activation of networks whose l2 Lipschitz constant is kept small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.interval import Interval
from certify.op import AnyBox, Box, Op
from certify.ops.gate import Gate
from certify.ops.relu import ReLU


@dataclass(frozen=True)
class MinMax(Op):
    """Channel i of the first half and channel i of the second: their maximum goes to the first, their minimum to the
    second. An example has an even number of channels, its first axis.

    With a, b the two halves and d = a - b: max(a, b) = b + relu(d) and min(a, b) = a - relu(d), so that a row
    (p, q) . (max, min) = q . a + p . b + (p - q) . relu(d), and the lines of ReLU on the box of d bound it.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        a, b = inputs[0].chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval.from_box(self.forward(box.lb), self.forward(box.ub))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        box = boxes[0]
        assert box is not None
        p, q = A.chunk(2, 2)
        (through,), constant = ReLU().backward(p - q, [_difference(box)])
        return [torch.cat([q + through, p - through], 2)], constant

    def loose(self, box: AnyBox) -> Tensor:
        unstable = ReLU().loose(_difference(box))
        return torch.cat([unstable, unstable], 1)

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        (box,) = boxes
        assert box is not None
        return [Sorted(ReLU().gate(_difference(box)))]

    def lipschitz(self, norm: str) -> float:
        return 1.0

    def carried(self, *sizes: Tensor) -> Tensor:
        a, b = sizes[0].chunk(2, 1)
        either = torch.maximum(a, b)
        return torch.cat([either, either], 1)


@dataclass(frozen=True)
class Sorted(Op):
    """The gradient of MinMax: (p, q) in maximum and minimum go back to (a, b) as (q + s (p - q), p - s (p - q)).

    `gate` maps p - q to s (p - q), s being the slope of relu(a - b).
    """

    gate: Gate

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval.from_box(torch.minimum(*self._mixtures(box.lb)), torch.maximum(*self._mixtures(box.ub)))

    def loose(self, box: AnyBox) -> Tensor:
        mixed = self.gate.loose(_difference(box))
        return torch.cat([mixed, mixed], 1)

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        box = boxes[0]
        assert box is not None
        u, v = A.chunk(2, 2)
        (through,), constant = self.gate.backward(u - v, [_difference(box)])
        return [torch.cat([v + through, u - through], 2)], constant

    def _mixtures(self, ends: Tensor) -> list[Tensor]:
        """(s p + (1 - s) q, s q + (1 - s) p) for both ends of s: in this form neither p nor q counts twice."""
        p, q = ends.chunk(2, 1)
        slopes = (torch.cat([s, s], 1) for s in (self.gate.lower, self.gate.upper))
        return [torch.lerp(torch.cat([q, p], 1), ends, s) for s in slopes]


def _difference(box: AnyBox) -> Box:
    """Box of first half minus second half."""
    (la, lb), (ua, ub) = box.lb.chunk(2, 1), box.ub.chunk(2, 1)
    return Box(la - ub, ua - lb)
