"""CondLR: low-rank training with bounded condition numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS
from robust.models.low_rank import Factorised


@HOOKS.register("condlr")
@dataclass(frozen=True)
class CondLR:
    """Behind each step, the factors of W = U S V' return to orthonormal U and V and an S of small condition number
    (Savostianova et al. 2023).

    U and V become the orthogonal factors of their QR decompositions, with signs that leave orthonormal ones alone. No
    attack takes part: a small condition number bounds how far small changes of the input grow. Needs a model low_rank.

    Args:
        condition: tau, bound of S's condition number.
        rule: clamp moves the singular values into [m - e, m + e], m their mean, e = m (tau - 1) / (tau + 1). mean makes
            S orthogonal times its root mean square singular value, the limit of condition 1.
    """

    condition: float = 1.5
    rule: Literal["clamp", "mean"] = "clamp"

    def __post_init__(self) -> None:
        if self.condition < 1:
            raise ValueError(f"condition={self.condition}: a condition number is at least 1")

    def start(self, run: RunFacts) -> Active:
        active = _Active(self, [layer for layer in run.model.modules() if isinstance(layer, Factorised)])
        active.retract()
        return active


class _Active(Active):
    def __init__(self, condlr: CondLR, layers: list[Factorised]) -> None:
        if not layers:
            raise ValueError("condlr needs factorised layers: --model 'low_rank:model=(cnn7)'")
        self.condlr, self.layers = condlr, layers

    def after_step(self, moment: Moment) -> None:
        self.retract()

    @torch.no_grad()
    def retract(self) -> None:
        """Bring all factors back to their sets, in place."""
        for layer in self.layers:
            inner, middle, outer = layer.weights()
            inner.copy_(orthonormal(inner.flatten(1).T).T.reshape(inner.shape))
            outer.copy_(orthonormal(outer.flatten(1)).reshape(outer.shape))
            u, s, v = torch.linalg.svd(middle.flatten(1))
            middle.copy_((u * self._tamed(s) @ v).reshape(middle.shape))

    def _tamed(self, s: Tensor) -> Tensor:
        if self.condlr.rule == "mean":
            return s.square().mean().sqrt().expand_as(s)
        mean = s.mean()
        slack = mean * (self.condlr.condition - 1) / (self.condlr.condition + 1)
        return s.clamp(mean - slack, mean + slack)


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal; columns that are orthonormal already stay."""
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
