"""The linear program of a domain: the triangle relaxation of its unstable neurons, exact where there are none.

It has the bound that the ascent on dual variables converges to, and sees empty domains at once, which ascent needs
unbounded multipliers for. A program takes some milliseconds with dozens of neurons and inputs, and grows quickly.

Every constraint is relaxed by the slack of its neuron, so that the program holds every point of the network's own
domain although the core's weights and boxes are rounded: what it proves, the emptiness of a domain included, is proven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from certify.bab.unstable_core import Affine, Core
from certify.leaf import relaxed
from certify.program import Program


@dataclass(frozen=True)
class Minimum:
    """Minimum of a property on the relaxation of a domain.

    Attributes:
        low: lower bound; inf where the domain is empty, -inf where the solver gave up.
        exact: what the bound would be without slack, to first order.
        u: a minimiser `[M, 1]`, if there is one.
        neuron: the unstable neuron whose relaxation costs most at the minimiser; -1 where none is unstable.
    """

    low: float
    exact: float
    u: Tensor | None = None
    neuron: int = -1


class Triangle:
    """The programs of all domains of a property on a core of (leaky) ReLUs."""

    def __init__(self, core: Core, output: Affine) -> None:
        """`output` is the property."""
        self.core, self.like = core, output.x
        self.inputs = core.input_weight.shape[1]
        self.input_weight, self.bias, self.slope, self.slack = (
            _array(t) for t in (core.input_weight.whole, core.bias, core.slope, core.slack)
        )
        self.layers = [(layer.part, layer.reads, _array(layer.weight.whole)) for layer in core.layers]
        self.x, self.a, self.constant = (_array(t) for t in (output.x, output.a, output.constant))

    def minimum(self, lb: np.ndarray, ub: np.ndarray, seconds: float = math.inf) -> Minimum:
        """Minimum of the property where every z lies in [lb, ub] `[N]`; the solver gives up after `seconds`."""
        unstable = np.flatnonzero((lb < 0) & (ub > 0))
        z, a = self._values(lb, unstable)
        program, slack = self._program(lb, ub, unstable, z, a)
        found = relaxed(program, 0, seconds)
        neuron = int(unstable[0]) if len(unstable) else -1
        if found.values is None or found.multipliers is None:
            return Minimum(found.low, found.low, None, neuron)
        if len(unstable):
            before = z[unstable] @ np.append(found.values, 1.0)
            gap = found.values[self.inputs :] - np.where(before > 0, before, self.slope[unstable, 0] * before)
            # The chord's multiplier says what the bound gains where the relaxed value comes down to the true one;
            # where several such gains are nothing, the widest gap decides.
            gain = (found.multipliers[: len(unstable)] + TINY) * gap
            neuron = int(unstable[gain.argmax()])
        u = torch.from_numpy(found.values[: self.inputs]).to(self.like).clamp(-1, 1).unsqueeze(1)
        return Minimum(found.low, found.low + float(found.multipliers @ slack), u, neuron)

    def _values(self, lb: np.ndarray, unstable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values before and after activation as affine functions of (u, a of the unstable, 1): `[N, V + 1]` each."""
        z = np.zeros((len(lb), self.inputs + len(unstable) + 1))
        z[: len(self.input_weight), : self.inputs] = self.input_weight
        z[:, -1:] = self.bias
        a = np.zeros_like(z)
        through = np.where(lb[:, None] >= 0, 1.0, self.slope)
        own = np.zeros_like(z)
        own[unstable, self.inputs + np.arange(len(unstable))] = 1.0
        through[unstable] = 0.0
        for part, reads, weight in self.layers:
            z[part] += weight @ a[reads]
            a[part] = through[part] * z[part] + own[part]
        return z, a

    def _program(
        self, lb: np.ndarray, ub: np.ndarray, unstable: np.ndarray, z: np.ndarray, a: np.ndarray
    ) -> tuple[Program, np.ndarray]:
        """(program, by how much each constraint is relaxed); the chords are its first constraints."""
        free, own, slope, slack = z[unstable], a[unstable], self.slope[unstable], self.slack[unstable]
        low, high = (lb - self.slack[:, 0])[unstable, None], (ub + self.slack[:, 0])[unstable, None]
        chord = (high - slope * low) / (high - low)
        above = own - chord * free
        above[:, -1:] -= (slope - chord) * low
        leaky = slope[:, 0] > 0
        stable = np.setdiff1d(np.arange(len(lb)), unstable)
        least, most = -z[stable], z[stable]
        least[:, -1] += lb[stable]
        most[:, -1] -= ub[stable]
        rows = np.concatenate([above, free - own, (slope * free - own)[leaky], least, most])
        room = np.concatenate([chord * slack, slack, (slope * slack)[leaky], self.slack[stable], self.slack[stable]])
        row = self.a.T @ a
        row[:, : self.inputs] += self.x.T
        program = Program(
            rows=sp.csr_array(row[:, :-1]),
            constants=row[0, -1:] + self.constant,
            matrix=sp.csr_array(rows[:, :-1]),
            limit=room[:, 0] - rows[:, -1],
            lb=np.concatenate([np.full(self.inputs, -1.0), (slope * low)[:, 0]]),
            ub=np.concatenate([np.ones(self.inputs), high[:, 0]]),
            binary=np.zeros(row.shape[1] - 1, dtype=bool),
        )
        return program, room[:, 0]


TINY = 1e-9


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
