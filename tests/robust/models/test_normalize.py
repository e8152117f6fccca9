"""Normalisation layer."""

import pytest
import torch

from robust.normalize import Normalize


def test_each_channel_is_shifted_and_scaled_by_its_own_constants():
    layer = Normalize((0.5, 0.25), (0.5, 0.125))
    x = torch.tensor([[[[1.0]], [[0.5]]]])
    assert layer(x).flatten().tolist() == [1.0, 2.0]


def test_a_single_image_without_batch_dimension_is_normalised_alike():
    layer = Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x[1]), layer(x)[1])


def test_constants_are_stored_but_not_trained():
    layer = Normalize((0.1307,), (0.3081,))
    assert set(layer.state_dict()) == {"mean", "std"}
    assert not list(layer.parameters())
    assert repr(layer) == "Normalize(mean=[0.1307], std=[0.3081])"


@pytest.mark.parametrize(
    "mean, std, message",
    [((0.0,), (1.0, 1.0), "got 1 and 2"), ((0.0,), (0.0,), "positive"), ((0.0,), (float("nan"),), "positive")],
)
def test_constants_that_can_not_normalise_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)
