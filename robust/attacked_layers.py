"""A network's layers in the form that suits the attacks of a training step: many passes at the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.gradient import Precision
from attacks.winograd import Winograd, gains
from certify.graph import cast_tensors
from certify.op import Op
from certify.ops.affine import Conv2d, Linear

# The weights' sums take up to two fifths of what a pass and its gradient take, which then save a fifth to two fifths.
LEAST_PASSES = 4


@dataclass(frozen=True)
class AttackedConv2d(Op):
    """A convolution in fewer multiplications; it has no bounds, because its results are rougher than the library's."""

    convolution: Winograd

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.convolution(*inputs)


def layers_for(passes: int, precision: Precision, batch: int) -> Callable[[Op], Op]:
    """What to make of the ops of a network, with constant weights, that an attack passes through.

    Args:
        passes: gradients that the attack takes.
        precision: arithmetic of the attack: autocast would convert the weights anew at every pass.
        batch: examples of a pass.
    """

    def changed(op: Op) -> Op:
        if precision == "bfloat16":
            return cast_tensors(op, torch.bfloat16) if isinstance(op, Conv2d | Linear) else op
        if passes >= LEAST_PASSES and isinstance(op, Conv2d) and gains(op.weight, op.form, (batch, *op.in_shape)):
            return AttackedConv2d(Winograd.of(op.weight, op.bias))
        return op

    return changed
