"""A ReLU network with one hidden layer, trained to the optimum by a convex program, robustly if asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvexFit:
    """What the solver found.

    Args:
        network: `[N, d] -> [N, 1]`, class 1 where positive; no biases, so a constant column may be wanted.
        value: its objective: mean worst hinge loss + decay / 2 (squared weights of both layers).
        lower: a bound of the convex program's optimum from below; value - lower is the gap that is left.
        hinge: worst hinge loss of each training example within eps, `[N]`.
    """

    network: nn.Sequential
    value: float
    lower: float
    hinge: Tensor


@dataclass(frozen=True)
class ConvexNet:
    """min mean_i max_{|d| <= eps} hinge(y_i f(x_i + d)) + decay sum_h (|v_h| + |w_h|), over vectors whose ReLU patterns
    hold on the whole ball, f(x) = sum_h D_h x (v_h - w_h) (Bai et al. 2023, after Pilanci & Ergen 2020); unreproduced,
    from memory.

    P patterns D_h = diag(1(X u_h >= 0)) are sampled. (2 D_h - 1) X v_h >= eps |v_h|_1, and the same for w_h, keep a
    neuron's pattern fixed within eps of every training point; the worst hinge loss is then 1 - y x' a + eps |a|_1 with
    a the example's slope. v_h becomes a hidden neuron v_h / sqrt|v_h| with outer weight sqrt|v_h|, w_h one with
    -sqrt|w_h|.

    Everything but the Euclidean norms is linear; these are cut off by tangent planes, one linear program at a time
    (HiGHS), until the gap between its optimum and the network's objective is small.

    Args:
        eps: radius in the maximum norm, without a pixel range. decay: weight of the norms.
        patterns: number of sampled u_h; equal patterns count once.
        tolerance: on the gap, relative. rounds: largest number of linear programs.
        seed: of the samples.
    """

    eps: float = 0.0
    decay: float = 1e-3
    patterns: int = 50
    tolerance: float = 1e-4
    rounds: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eps < 0 or self.decay <= 0 or self.patterns < 1 or self.tolerance <= 0:
            raise ValueError(f"expected eps >= 0, decay > 0, patterns >= 1 and tolerance > 0, got {self}")

    def __call__(self, x: Tensor, y: Tensor) -> ConvexFit:
        """Train on `[N, d]` with labels -1 or 1, `[N]`.

        Raises:
            ValueError: other labels.
            RuntimeError: the gap is still larger than the tolerance after all rounds.
        """
        if not set(y.tolist()) <= {-1, 1}:
            raise ValueError(f"expected labels -1 and 1, got {sorted(set(y.tolist()))}")
        program = _Program(x.double().numpy(), y.double().numpy(), self)
        for _ in range(self.rounds):
            vectors, hinge, lower = program.solve()
            norms = np.linalg.norm(vectors, axis=1)
            value = hinge.mean() + self.decay * norms.sum()
            if value - lower <= self.tolerance * max(value, 1e-12):
                return ConvexFit(_network(vectors), float(value), float(lower), torch.from_numpy(hinge))
            program.cut(vectors, norms)
        raise RuntimeError(
            f"after {self.rounds} linear programs the gap is {value - lower:.2g} of {value:.4g}; raise rounds or "
            "tolerance"
        )


class _Program:
    """The linear program and the tangent planes so far.

    Variables, all >= 0: positive and negative parts of the 2 P vectors (v first) [2 P d each], a bound of each norm
    [2 P], positive and negative parts of the slopes [N d each], hinge losses [N].
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, net: ConvexNet) -> None:
        (n, d), generator = x.shape, np.random.default_rng(net.seed)
        active = np.unique(x @ generator.standard_normal((d, net.patterns)) >= 0, axis=1).astype(float)  # [N, P]
        self.count, self.d, self.n = 2 * active.shape[1], d, n
        k, parts, slopes = self.count, self.count * d, n * d
        self.size = 2 * parts + k + 2 * slopes + n
        self.norm_at, self.hinge_at = 2 * parts, self.size - n
        self.cost = np.concatenate(
            [np.zeros(2 * parts), np.full(k, net.decay), np.zeros(2 * slopes), np.full(n, 1 / n)]
        )
        patterns = np.concatenate([active, active], 1)
        cones = np.zeros((k, n, self.size))  # eps |v|_1 - (2 D - 1) X v <= 0
        for h in range(k):
            side = (2 * patterns[:, h] - 1)[:, None] * x
            cones[h, :, h * d : (h + 1) * d] = net.eps - side
            cones[h, :, parts + h * d : parts + (h + 1) * d] = net.eps + side
        hinges = np.zeros((n, self.size))  # 1 - y x' a + eps |a|_1 - loss <= 0
        balance = np.zeros((n, d, self.size))  # a = sum_h D_h (v_h - w_h)
        sign = np.concatenate([np.ones(k // 2), -np.ones(k // 2)])
        first = 2 * parts + k
        for i in range(n):
            for j in range(d):
                plus, minus = first + i * d + j, first + slopes + i * d + j
                hinges[i, plus], hinges[i, minus] = net.eps - y[i] * x[i, j], net.eps + y[i] * x[i, j]
                balance[i, j, plus], balance[i, j, minus] = -1, 1
                balance[i, j, j:parts:d] = sign * patterns[i]
                balance[i, j, parts + j : 2 * parts : d] = -sign * patterns[i]
            hinges[i, self.hinge_at + i] = -1
        self.rows = [coo_array(cones.reshape(-1, self.size)), coo_array(hinges)]
        self.limits = [np.zeros(k * n), -np.ones(n)]
        self.balance = coo_array(balance.reshape(-1, self.size))
        # The planes that bound a norm from below by the absolute value of every coordinate.
        for axis in np.concatenate([np.eye(d), -np.eye(d)]):
            self._add(np.tile(axis, (k, 1)))

    def solve(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(vectors [2 P, d], hinge losses [N], optimum)."""
        found = linprog(
            self.cost,
            A_ub=vstack(self.rows).tocsr(),
            b_ub=np.concatenate(self.limits),
            A_eq=self.balance.tocsr(),
            b_eq=np.zeros(self.n * self.d),
            method="highs",
        )
        if found.status != 0:
            raise RuntimeError(f"linear program: {found.message}")
        parts = self.count * self.d
        vectors = (found.x[:parts] - found.x[parts : 2 * parts]).reshape(self.count, self.d)
        return vectors, found.x[self.hinge_at :], found.fun

    def cut(self, vectors: np.ndarray, norms: np.ndarray) -> None:
        """Demand norm_h >= u' v_h for the present directions u."""
        safe = np.where(norms > 0, norms, 1.0)[:, None]
        self._add(vectors / safe)

    def _add(self, directions: np.ndarray) -> None:
        k, d = directions.shape
        h, j = np.divmod(np.arange(k * d), d)
        values = directions.ravel()
        rows = np.concatenate([h, h, np.arange(k)])
        columns = np.concatenate([h * d + j, k * d + h * d + j, self.norm_at + np.arange(k)])
        entries = np.concatenate([values, -values, -np.ones(k)])
        self.rows.append(coo_array((entries, (rows, columns)), shape=(k, self.size)))
        self.limits.append(np.zeros(k))


def _network(vectors: np.ndarray) -> nn.Sequential:
    """The network whose neurons are the vectors, those of the second half with negative outer weights."""
    norms = np.linalg.norm(vectors, axis=1)
    sign = np.where(np.arange(len(vectors)) < len(vectors) // 2, 1.0, -1.0)
    used = norms > 0
    used[0] = True  # a layer needs a neuron, if only one that is 0
    scale = np.sqrt(norms[used])
    inner = nn.Linear(vectors.shape[1], len(scale), bias=False, dtype=torch.float64)
    outer = nn.Linear(len(scale), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        inner.weight.copy_(torch.from_numpy(vectors[used] / np.where(scale > 0, scale, 1.0)[:, None]))
        outer.weight.copy_(torch.from_numpy(sign[used] * scale)[None])
    return nn.Sequential(inner, nn.ReLU(), outer)
