"""Products of a bounded number with a factor from a range: how an activation passes gradients on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.interval import Interval
from certify.op import Activation, AnyBox, Box, Lines


@dataclass(frozen=True)
class Gate(Activation):
    """`g * s` elementwise for factors s anywhere in [lower, upper], each on its own.

    Attributes:
        lower, upper: `[B, *shape]` or broadcastable to it.
        flat: whether lines of unknown sign are constants, as in RecurJac (Zhang et al. 2019), rather than chords.
    """

    lower: Tensor
    upper: Tensor
    flat: bool = False

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval.from_box(*products(box, self.lower, self.upper))

    def loose(self, box: AnyBox) -> Tensor:
        return (box.lb < 0) & (box.ub > 0) & (self.lower < self.upper)

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        lines = product_lines(box, self.lower, self.upper)
        if not self.flat:
            return lines
        low, high = products(box, self.lower, self.upper)
        loose = self.loose(box)
        return Lines(
            torch.where(loose, 0.0, lines.lower_slope),
            torch.where(loose, low, lines.lower_intercept),  # type: ignore[arg-type]
            torch.where(loose, 0.0, lines.upper_slope),
            torch.where(loose, high, lines.upper_intercept),  # type: ignore[arg-type]
        )

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        (box,) = boxes
        assert box is not None
        lines = self.lines(box)
        assert lines.lower_intercept is not None and lines.upper_intercept is not None
        # A+ * lower + A- * upper, with few passes over A: A * lower + A- * (upper - lower).
        negative = A.clamp(max=0)
        through = torch.addcmul(A * lines.lower_slope, negative, lines.upper_slope - lines.lower_slope)
        constant = _sums(A, lines.lower_intercept) + _sums(negative, lines.upper_intercept - lines.lower_intercept)
        return [through], constant

    def flattened(self) -> Gate:
        """The same gate with RecurJac's lines."""
        return replace(self, flat=True)


def _sums(A: Tensor, intercept: Tensor) -> Tensor:
    return torch.einsum("rbn,bn->rb", A.flatten(2), intercept.flatten(1))


def products(box: AnyBox, lower: Tensor, upper: Tensor) -> Box:
    """Range of `g * s` for g in the box and s in [lower, upper]."""
    corners = torch.stack(torch.broadcast_tensors(box.lb * lower, box.lb * upper, box.ub * lower, box.ub * upper))
    return Box(corners.amin(0), corners.amax(0))


def product_lines(box: AnyBox, lower: Tensor, upper: Tensor) -> Lines:
    """Lines in g that enclose `g * s` for s in [lower, upper]; the best ones that know only the box of g.

    For a fixed g the product ranges between lower * g and upper * g. The greater of the two is convex in g, so the
    chord between the ends of the box is the least line above it; the lesser is concave, likewise. Source: Shi et al.
    2022, section 3.3, where s is in [0, 1].
    """
    lb, ub = box.lb, box.ub
    mixed = (lb < 0) & (ub > 0) & (lower < upper)
    # where() differentiates both branches: unguarded, the untaken 0/0 would send nan into the weights.
    width = torch.where(mixed, ub - lb, 1.0)
    chord_above = (upper * ub - lower * lb) / width
    chord_below = (lower * ub - upper * lb) / width
    rising = lb >= 0
    return Lines(
        torch.where(mixed, chord_below, torch.where(rising, lower, upper)),
        torch.where(mixed, (upper - chord_below) * lb, 0.0),
        torch.where(mixed, chord_above, torch.where(rising, upper, lower)),
        torch.where(mixed, (lower - chord_above) * lb, 0.0),
    )
