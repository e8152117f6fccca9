"""Transfer between models: the matrix, and the sign of masking in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks import FGSM, LinfBall
from attacks.methods.pgd import PGD
from robust.transfer import transfer


def linear(seed: int, factor: float = 1.0) -> nn.Module:
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))

    class Linear(nn.Module):
        def forward(self, x):
            return ((x - 0.5).flatten(1) @ weight) * factor

    return Linear()


def test_points_hurt_their_own_model_most_and_a_masked_copy_gives_itself_away():
    x = torch.rand(120, 12, generator=torch.Generator().manual_seed(5))
    models = {"plain": linear(0), "other": linear(1), "masked": linear(0, 1e6)}
    y = models["plain"](x).argmax(1)
    result = transfer(models, x, y, LinfBall(0.1), PGD(steps=10, start="clean"))
    assert result.models == ("plain", "other", "masked") and result.examples == 120
    assert result.clean[0] == result.clean[2] == 1.0 and result.clean[1] < 0.7
    assert result.accuracy[0][0] == result.accuracy[0][2] < 0.8 < result.accuracy[1][0]
    assert result.accuracy[2][2] == 1.0
    # The plain model's points fool its masked copy, which its own gradients do not.
    assert ("plain", "masked") in result.masked() and ("masked", "plain") not in result.masked()


def test_models_are_left_in_their_mode():
    net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = net[1].running_mean.clone()
    transfer({"a": net}, torch.rand(9, 12), torch.zeros(9, dtype=torch.long), LinfBall(0.1), FGSM())
    assert net.training and torch.equal(net[1].running_mean, before)


def test_no_examples_give_no_accuracy():
    with pytest.raises(ValueError, match="transfer needs examples"):
        transfer({"a": linear(0)}, torch.rand(0, 12), torch.zeros(0, dtype=torch.long), LinfBall(0.1), FGSM())
