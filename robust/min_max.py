"""MinMax, the activation of l2-certified networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.op import RULES, Call, Op
from certify.ops import min_max


class MinMax(nn.Module):
    """Pairs channel i with channel i + C/2 of `[B, C, ...]`: the maximum goes to the first, the minimum to the second.

    1-Lipschitz in l2 and gradient norm preserving: where ReLU deletes, it sorts. Source: Anil et al. 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


@RULES.module(MinMax)
def _min_max(layer: MinMax, call: Call) -> Op:
    if call.out_shape[0] % 2:
        raise call.refuse(f"MinMax pairs channels and needs an even number of them, got {call.out_shape[0]}")
    return min_max.MinMax()
