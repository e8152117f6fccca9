"""Projected gradient ascent on the dual bound of many domains: slopes, split multipliers, output multipliers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from certify.bab.dual import Dual, Slopes, backward, forward, minimiser
from certify.bab.unstable_core import Affine, Core

STEP, DECAY = 0.1, 0.98
"""Adam's step on slopes in [0, 1], and its factor per iteration (Xu et al. 2021)."""

FIRST, SECOND = 0.9, 0.999
"""Adam's factors."""

COMPACT_BELOW = 0.8
"""Share of columns still open below which the finished ones are dropped from the working set."""


@dataclass(frozen=True)
class Relaxation:
    """The lines on given boxes, all but the choice of the lower ones. Each `[N, D]`, or `[N, 1]` for all domains.

    Attributes:
        unstable: neurons that have a choice.
        lower: slope of the lower line of the others.
    """

    unstable: Tensor
    lower: Tensor
    lower_intercept: Tensor | None
    upper: Tensor
    upper_intercept: Tensor
    slope: Tensor

    @classmethod
    def on(cls, core: Core, lb: Tensor, ub: Tensor) -> Relaxation:
        """Relaxation of the boxes `[lb, ub]` `[N, D or 1]`."""
        a = core.slope
        unstable = (lb < 0) & (ub > 0)
        chord = (ub - a * lb) / torch.where(unstable, ub - lb, 1.0)
        # A box that is not a number must not pass for a stable neuron: nan makes every bound nan.
        lower = torch.where(lb >= 0, 1.0, torch.where(ub <= 0, a, torch.nan))
        upper = torch.where(unstable, chord, lower)
        intercept = torch.where(unstable, (a - chord) * lb, 0.0)
        if core.fixed is None:
            return cls(unstable, lower, None, upper, intercept, a)
        free, fixed = core.splittable, core.fixed
        assert fixed.lower_intercept is not None and fixed.upper_intercept is not None
        return cls(
            unstable & free,
            torch.where(free, lower, fixed.lower_slope),
            torch.where(free, 0.0, fixed.lower_intercept),
            torch.where(free, upper, fixed.upper_slope),
            torch.where(free, intercept, fixed.upper_intercept),
            a,
        )

    def default(self) -> Tensor:
        """The lower line that leaves the smaller area (Zhang et al. 2018), as `alpha`."""
        return (self.upper > (1 + self.slope) / 2).to(self.upper.dtype)

    def slopes(self, alpha: Tensor) -> Slopes:
        """Lines for a choice `alpha` in [0, 1], `[N, D]`."""
        chosen = torch.lerp(self.slope, torch.ones_like(self.slope), alpha)
        lower = torch.where(self.unstable, chosen, self.lower)
        return Slopes(lower, self.lower_intercept, self.upper, self.upper_intercept)

    def select(self, columns: Tensor) -> Relaxation:
        """Relaxation of some domains."""
        return _select(self, columns)


@dataclass(frozen=True)
class Task:
    """What is bounded, column by column: `unit . z + multiplier * output`, on domains with split constraints.

    Attributes:
        output: a function of the core.
        unit: coefficients of the values before activation, `[N, D]`; None for 0.
        sign: +1 where z >= 0 was split off, -1 where z <= 0, else 0; `[N, D]`. None without splits.
    """

    output: Affine
    unit: Tensor | None = None
    sign: Tensor | None = None

    def select(self, columns: Tensor) -> Task:
        """Some of the columns."""
        return _select(self, columns)


@dataclass(frozen=True)
class Point:
    """Dual variables: alpha `[N, D]`, beta `[N, D]` for split constraints, multiplier `[D]`.

    Without a multiplier it is 1: the output itself is bounded. With one, the output is known to be <= 0.
    """

    alpha: Tensor
    beta: Tensor | None = None
    multiplier: Tensor | None = None


@dataclass
class Outcome:
    """The best bounds of an ascent, and where it ended.

    Attributes:
        low: best bound, `[D]`.
        point: the last dual variables of each column.
        A: last coefficients after activation, `[N, D]`.
        z: last relaxed values before it, `[N, D]`; nan in finished columns, where nothing is left to be done with them.
        u: last minimisers of the columns that were not finished, `[M, at most D]`; fed: what the input adds to the
            values before activation there, `[n, at most D]`. None where all are finished, or none were asked for.
    """

    low: Tensor
    point: Point
    A: Tensor
    z: Tensor
    u: Tensor | None
    fed: Tensor | None


@dataclass
class Adam:
    """Adam's ascent on one variable, with the moments kept column by column."""

    value: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def step(self, gradient: Tensor, size: float, number: int) -> None:
        """The `number`-th step (from 1), without projection."""
        self.first.lerp_(gradient, 1 - FIRST)
        self.second.mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
        root = math.sqrt(1 - SECOND**number)
        # first / sqrt(second) of unit size whatever the scale: 1e-12 only guards zeros.
        self.value.addcdiv_(self.first, self.second.sqrt().add_(1e-12), value=size * root / (1 - FIRST**number))

    def select(self, columns: Tensor) -> None:
        self.value, self.first, self.second = (
            t.index_select(-1, columns) for t in (self.value, self.first, self.second)
        )


def bound(core: Core, relaxation: Relaxation, task: Task, point: Point) -> Dual:
    """The dual bounds of all columns at a point."""
    pre = task.unit
    if point.beta is not None:
        assert task.sign is not None
        held = task.sign * point.beta
        pre = -held if pre is None else pre - held
    factor = point.alpha.new_ones(point.alpha.shape[1]) if point.multiplier is None else point.multiplier
    return backward(core, relaxation.slopes(point.alpha), task.output, factor, pre)


def ascend(
    core: Core,
    relaxation: Relaxation,
    task: Task,
    start: Point,
    iterations: int,
    *,
    step: float = STEP,
    enough: float = math.inf,
    minimisers: bool = True,
    first: Dual | None = None,
) -> Outcome:
    """Raise the bounds of all columns, each on its own.

    Args:
        start: dual variables to begin with; they are not changed.
        iterations: steps; 0 only evaluates.
        step: of alpha and of the multipliers.
        enough: a column whose bound exceeds this is finished.
        minimisers: whether z and u of the last bounds are wanted; they cost as much as the bounds.
        first: the bounds at `start`, where they are known.
    """
    count = start.alpha.shape[1]
    low = start.alpha.new_full((count,), -math.inf)
    live = torch.arange(count, device=low.device)
    alpha = Adam(start.alpha.clone())
    beta = None if start.beta is None else Adam(start.beta.clone())
    multiplier = None if start.multiplier is None else Adam(start.multiplier.clone())
    left: list[tuple[Tensor, Tensor, Tensor, Point]] = []
    u = fed = None

    def now() -> Point:
        return Point(alpha.value, *(None if v is None else v.value for v in (beta, multiplier)))

    def leave(columns: Tensor, z: Tensor | None) -> None:
        A = dual.A.index_select(1, columns)
        left.append((live[columns], A, A.new_full(A.shape, math.nan) if z is None else z, _select(now(), columns)))

    for number in range(1, iterations + 2):
        if number > 1 or first is None:
            dual = bound(core, relaxation, task, now())
        else:
            dual = first
        low[live] = torch.where(dual.low > low[live], dual.low, low[live])
        kept = (low[live] <= enough).nonzero().flatten()
        last = number > iterations
        if not len(kept) or (last and not minimisers):
            leave(torch.arange(len(live), device=live.device), None)
            u = fed = None
            break
        if len(kept) < COMPACT_BELOW * len(live):
            leave((low[live] > enough).nonzero().flatten(), None)
            live, relaxation, task, dual = live[kept], relaxation.select(kept), task.select(kept), dual.select(kept)
            for variable in (alpha, beta, multiplier):
                if variable is not None:
                    variable.select(kept)
        u = minimiser(core, dual.x)
        fed = core.input_weight.times(u)
        z, values = forward(core, relaxation.slopes(alpha.value), dual.A, fed)
        if last:
            leave(torch.arange(len(live), device=live.device), z)
            break
        size = step * DECAY ** (number - 1)
        alpha.step(torch.where(relaxation.unstable, dual.A.clamp(min=0) * z, 0.0), size, number)
        alpha.value.clamp_(0, 1)
        if beta is not None:
            assert task.sign is not None
            beta.step(-(task.sign * z), size, number)
            beta.value.clamp_(min=0).mul_(task.sign.abs())
        if multiplier is not None:
            multiplier.step(task.output(u, values), size, number)
            multiplier.value.clamp_(min=0)
    order = torch.cat([columns for columns, *_ in left]).argsort()
    A, z = (_joined([part[i] for part in left], order) for i in (1, 2))  # type: ignore[misc]
    points = [vars(part[3]) for part in left]
    present = [name for name, value in points[0].items() if value is not None]
    point = Point(**{name: _joined([some[name] for some in points], order) for name in present})
    return Outcome(low, point, A, z, u, fed)


def _joined(parts: list[Tensor], order: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1).index_select(-1, order)


def _select(record, columns: Tensor):  # type: ignore[no-untyped-def]
    chosen = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if isinstance(value, Tensor) and value.shape[-1] > 1:
            chosen[f.name] = value.index_select(-1, columns)
    return replace(record, **chosen)
