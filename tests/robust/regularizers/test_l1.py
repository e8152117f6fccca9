"""Scope and value of the L1 penalty."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust.regularizer import REGULARIZERS
from robust.regularizers.l1 import L1
from tests.robust.objectives import oracle


@pytest.mark.parametrize("batch_norm", [False, True])
def test_sum_of_absolute_convolutional_and_dense_weights_and_nothing_else(batch_norm):
    model = oracle.small_net(batch_norm, hidden=4)
    x, y = oracle.images()
    for ramp in (0.0, 1.0):
        terms = L1(weight=2e-3)(oracle.views_of(model, x, y, 0.1, ramp=ramp))
        assert terms.keys() == {"l1"} and terms["l1"].shape == ()
        layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
        total = sum(weight.item() for layer in layers for weight in layer.weight.abs().flatten())
        assert terms["l1"].item() == pytest.approx(2e-3 * total)
        terms["l1"].backward()
        for name, parameter in model.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("weight") and isinstance(layer, nn.Conv2d | nn.Linear):
                torch.testing.assert_close(parameter.grad, 2e-3 * parameter.sign())
            else:
                assert parameter.grad is None
        model.zero_grad()


def test_needs_no_pass_through_the_network():
    model = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, 0.1, note_boxes=True)
    L1()(views)
    assert views.bounded == [] and "_clean_pass" not in vars(views)
    assert not L1.needs_boxes and REGULARIZERS.parse("l1:weight=1e-6") == L1(1e-6)
