"""The model comes out of an attack as it went in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks.mode import attack_mode


def network() -> nn.Sequential:
    """Trainable network in training mode, with one frozen normalisation layer and one frozen weight."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3))
    net.append(nn.InstanceNorm2d(3, track_running_stats=True)).train()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    net.append(nn.BatchNorm2d(3, momentum=None))
    return net


def state(net: nn.Module) -> list:
    norms = [(m.track_running_stats, m.momentum) for m in net.modules() if hasattr(m, "track_running_stats")]
    return [[m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], norms]


def buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen", "keep"])
def test_flags_of_every_module_and_parameter_are_restored(mode):
    net = network()
    before = state(net)
    with attack_mode(net, mode):
        assert not any(p.requires_grad for p in net.parameters())
        assert net[2].training == (mode in ("train", "train_frozen"))
        assert net[1].training == (mode != "eval")
    assert state(net) == before
    with pytest.raises(ZeroDivisionError), attack_mode(net, mode):
        _ = 1 / 0
    assert state(net) == before


@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
def test_running_statistics_stay_untouched(mode):
    net = network()
    before = buffers(net)
    with attack_mode(net, mode):
        net(torch.rand(4, 2, 5, 5))
    assert all(torch.equal(before[name], value) for name, value in net.named_buffers())


def test_frozen_training_mode_uses_the_statistics_of_the_batch():
    net = nn.BatchNorm1d(3)
    x = 5 + torch.randn(64, 3)
    expected = net(x)
    net.reset_running_stats()
    with attack_mode(net.eval(), "train_frozen"):
        torch.testing.assert_close(net(x), expected)


def test_training_mode_moves_the_running_statistics():
    net = nn.BatchNorm1d(3)
    with attack_mode(net, "train"):
        net(5 + torch.randn(64, 3))
    assert (net.running_mean > 0.2).all()


def test_a_plain_function_needs_no_mode():
    with attack_mode(lambda x: x, "train"):
        pass


def test_inference_mode_and_unknown_modes_are_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside"), attack_mode(len):
        pass
    net = network()
    before = state(net)
    with pytest.raises(ValueError, match="expected mode eval"), attack_mode(net, "evil"):  # type: ignore[arg-type]
        pass
    assert state(net) == before
