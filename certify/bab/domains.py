"""Subproblems of branch and bound, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from certify.bab.ascent import Outcome, Point, Relaxation, Task, ascend
from certify.bab.dual import Dual
from certify.bab.unstable_core import Affine, Core


@dataclass(frozen=True)
class Domains:
    """D domains of one property and what their bounds were computed with.

    Attributes:
        lb, ub: boxes of the unstable neurons, `[N, D]`.
        sign: +1 where z >= 0 was split off, -1 where z <= 0, else 0; `[N, D]`.
        low: bound of the property, `[D]`.
        alpha, beta: dual variables of that bound, `[N, D]`.
        A, z: its coefficients after activation, and its relaxed values before; `[N, D]`.
    """

    lb: Tensor
    ub: Tensor
    sign: Tensor
    low: Tensor
    alpha: Tensor
    beta: Tensor
    A: Tensor
    z: Tensor

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, columns: Tensor | slice) -> Domains:
        values = (getattr(self, f.name) for f in fields(self))
        if isinstance(columns, slice):
            return Domains(*(value[..., columns] for value in values))
        # Eight times faster than value[..., columns].
        return Domains(*(value.index_select(-1, columns) for value in values))

    @staticmethod
    def join(parts: Sequence[Domains]) -> Domains:
        """All columns side by side."""
        if len(parts) == 1:
            return parts[0]
        return Domains(*(torch.cat([getattr(p, f.name) for p in parts], -1) for f in fields(Domains)))

    def relaxation(self, core: Core) -> Relaxation:
        """Lines on their boxes."""
        return Relaxation.on(core, self.lb, self.ub)

    def halves(self, neurons: Tensor) -> Domains:
        """Both children of every domain, z >= 0 first: `[N, 2 D]`. Bounds and dual variables are the parents'."""
        count = len(self)
        twice = Domains(*(torch.cat([getattr(self, f.name)] * 2, -1) for f in fields(self)))
        column = torch.arange(count, device=neurons.device)
        for side, some in ((1.0, column), (-1.0, column + count)):
            twice.sign[neurons, some] = side
            ends = twice.lb if side > 0 else twice.ub
            ends[neurons, some] = 0.0
        return twice


def bounded(
    core: Core, domains: Domains, output: Affine, iterations: int, enough: float, first: Dual | None = None
) -> tuple[Domains, Outcome]:
    """The domains with their bounds raised by an ascent that starts at their dual variables.

    Args:
        output: the property.
        enough: a domain whose bound exceeds this is finished.
        first: the bounds at their dual variables, where they are known.
    """
    task = Task(output, sign=domains.sign)
    start = Point(domains.alpha, domains.beta)
    found = ascend(core, domains.relaxation(core), task, start, iterations, enough=enough, first=first)
    assert found.point.beta is not None
    result = Domains(
        domains.lb,
        domains.ub,
        domains.sign,
        torch.where(found.low >= domains.low, found.low, domains.low),
        found.point.alpha,
        found.point.beta,
        found.A,
        found.z,
    )
    return result, found
