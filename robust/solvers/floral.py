"""FLORAL: a kernel SVM against poisoned labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUPPORT = 1e-5
"""Multipliers above this make support vectors; the authors' value."""


@dataclass(frozen=True)
class KernelSVM:
    """sign(sum_i alpha_i y_i k(x_i, x) + bias) with k(a, b) = exp(-gamma |a - b|^2).

    Args:
        x: `[N, d]`. y: labels -1 or 1, `[N]`. alpha: multipliers, `[N]`.
    """

    x: Tensor
    y: Tensor
    alpha: Tensor
    bias: float
    gamma: float

    def __call__(self, x: Tensor) -> Tensor:
        """Scores `[B]`, positive for class 1."""
        return rbf(x, self.x, self.gamma) @ (self.alpha * self.y) + self.bias


@dataclass(frozen=True)
class FLORAL:
    """Training as a game with an attacker who flips labels (Bal et al. 2025).

    A round: the learner takes one projected gradient step on the dual, min 1/2 a' Q a - 1' a over 0 <= a <= C, y' a =
    0, with the labels that the attacker left; then the attacker flips, in the given labels, a random `budget` of the 2
    `budget` support vectors with the largest multipliers. The first round sees the given labels; before it the SVM is
    solved. The authors divide the learning rate by 10 in every hundredth round alone; here it stays.

    Args:
        budget: labels flipped a round (B); 0 leaves the SVM's solution.
        c, gamma: of the SVM. rounds: of the game. step_size: of the gradient.
        seed: of the attacker's choices.
    """

    budget: int
    c: float = 1.0
    gamma: float = 1.0
    rounds: int = 500
    step_size: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget < 0 or self.rounds < 0 or self.c <= 0 or self.gamma <= 0:
            raise ValueError(f"expected budget, rounds >= 0 and c, gamma > 0, got {self}")

    def __call__(self, x: Tensor, y: Tensor) -> KernelSVM:
        """Train on features `[N, d]` with labels -1 or 1, `[N]`.

        Raises:
            ValueError: other labels, or one class only.
        """
        if set(y.tolist()) != {-1, 1}:
            raise ValueError(f"expected labels -1 and 1, both of them, got {sorted(set(y.tolist()))}")
        generator = torch.Generator().manual_seed(self.seed)
        x, y = x.double(), y.double()
        kernel = rbf(x, x, self.gamma)
        alpha, labels = solve_dual(kernel, y, self.c), y
        # The labels that a step was taken with belong to its multipliers.
        held = y
        for _ in range(self.rounds):
            gradient = labels * (kernel @ (labels * alpha)) - 1
            alpha, held = project(alpha - self.step_size * gradient, labels, self.c), labels
            labels = self._flipped(y, alpha, generator)
        return KernelSVM(x, held, alpha, bias_of(kernel, held, alpha), self.gamma)

    def _flipped(self, y: Tensor, alpha: Tensor, generator: torch.Generator) -> Tensor:
        strongest = alpha.argsort(descending=True, stable=True)[: 2 * self.budget]
        strongest = strongest[alpha[strongest] > SUPPORT]
        chosen = strongest[torch.randperm(len(strongest), generator=generator)[: self.budget]]
        return y.index_put((chosen,), -y[chosen])


def rbf(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """exp(-gamma |a_i - b_j|^2), `[N, M]`."""
    # The faster way to distances is wrong by 1e-8 where they vanish, as on the diagonal.
    distance = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return (-gamma * distance.square()).exp()


def solve_dual(kernel: Tensor, y: Tensor, c: float) -> Tensor:
    """Multipliers `[N]` of the SVM with this kernel matrix."""
    from sklearn.svm import SVC

    solved = SVC(C=c, kernel="precomputed", tol=1e-6).fit(kernel.numpy(), y.numpy())
    alpha = torch.zeros_like(y)
    alpha[torch.from_numpy(solved.support_).long()] = torch.from_numpy(solved.dual_coef_[0]).abs()
    return alpha


def project(alpha: Tensor, y: Tensor, c: float) -> Tensor:
    """Nearest point of {0 <= a <= c, y' a = 0}: clamp(alpha - mu y, 0, c) for the mu, found by bisection, that fits."""
    reach = float(alpha.abs().max()) + c
    low, high = -reach, reach
    for _ in range(200):
        mu = (low + high) / 2
        # y' clamp(alpha - mu y) falls as mu grows.
        low, high = (mu, high) if float(y @ (alpha - mu * y).clamp(0, c)) > 0 else (low, mu)
    return (alpha - high * y).clamp(0, c)


def bias_of(kernel: Tensor, y: Tensor, alpha: Tensor) -> float:
    """Mean of y_n - sum_i alpha_i y_i k(x_i, x_n) over the support vectors; 0 without any."""
    support = alpha > SUPPORT
    return float((y - kernel @ (alpha * y))[support].mean()) if support.any() else 0.0
