"""Starting weights: published deviations, the property behind them, and independence of the global generator."""

import math

import pytest
import torch
from torch import nn

from robust.initialization import default_init_, ibp_init_, ibp_std, initialize_, kaiming_normal_init_
from robust.model import MODELS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(text, shape=(3, 32, 32)):
    return MODELS.parse(text)(shape, 10, (0.0,) * shape[0], (1.0,) * shape[0])


def layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    "fan_in, std",
    [(9, 0.278514), (27, 0.092838), (576, 0.00435179), (1152, 0.00217589), (32768, 7.6496e-5), (25088, 9.9913e-5)],
)
def test_ibp_deviations_are_the_published_ones(fan_in, std):
    assert ibp_std(fan_in) == pytest.approx(std, rel=1e-5)


def test_ibp_weights_have_their_deviation_in_every_layer_but_the_last():
    model = build("cnn7:width=16,hidden=64")
    ibp_init_(model, generator())
    *inner, last = layers(model)
    for layer in inner:
        noise = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors of an estimated deviation
        assert layer.weight.std().item() * layer.weight[0].numel() == pytest.approx(math.sqrt(2 * math.pi), rel=noise)
        assert abs(layer.weight.mean()) < 5 * layer.weight.std() / math.sqrt(layer.weight.numel())
    assert last.weight.abs().max() <= 1 / math.sqrt(64)
    assert last.weight.std().item() == pytest.approx(1 / math.sqrt(64 * 3), rel=0.1)


@torch.no_grad()
def test_ibp_weights_keep_the_mean_radius_of_a_box_through_layers_and_relus():
    model = build("mlp:hidden=600+600+600+600")
    ibp_init_(model, generator())
    center = torch.rand(8, 3 * 32 * 32, generator=generator(1))
    radius = torch.full_like(center, 0.01)
    start = radius.mean()
    for layer in layers(model)[:-1]:
        center, radius = center @ layer.weight.T + layer.bias, radius @ layer.weight.T.abs()
        assert radius.mean() / start == pytest.approx(2, rel=0.3)
        lower, upper = (center - radius).relu(), (center + radius).relu()
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        assert radius.mean() / start == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("name", ["default", "ibp", "kaiming_normal"])
@pytest.mark.parametrize("text", ["cnn7:width=4,hidden=8", "resnet18:width=4"])
def test_the_generator_alone_decides_every_parameter(name, text):
    states = []
    for seed in (0, 0, 1):
        model = build(text)  # its own start comes from the global generator and differs each time
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        initialize_(model, name, generator(seed))
        states.append(model.state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(layers(model)[0].weight, first["1.weight"]) and first.keys() == other.keys()


def test_default_weights_are_distributed_as_pytorchs():
    ours, theirs = build("cnn5"), build("cnn5")
    default_init_(ours, generator())
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.abs().max() <= its.abs().max() * 1.5
        if mine.numel() > 500:
            assert mine.std().item() == pytest.approx(its.std().item(), rel=0.1)
            assert mine.abs().max().item() == pytest.approx(its.abs().max().item(), rel=0.05)


def test_kaiming_weights_follow_the_fan_out_of_convolutions():
    model = build("wide_resnet:depth=10,widen=2")
    kaiming_normal_init_(model, generator())
    for layer in layers(model)[:-1]:
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        noise = 5 / math.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=noise)
    assert (layers(model)[-1].bias == 0).all()


def test_batch_norms_start_neutral():
    model = build("cnn7:width=4,hidden=8")
    model(torch.rand(8, 3, 32, 32))
    ibp_init_(model, generator())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.running_mean == 0).all() and (module.running_var == 1).all()


def test_layers_that_read_a_residual_sum_are_halved():
    halved, plain = build("resnet18:width=4"), build("resnet18:width=4")
    ibp_init_(halved, generator())
    ibp_init_(plain, generator(), halve_after_sum=False)
    other = dict(plain.named_parameters())
    changed = {name for name, value in halved.named_parameters() if not torch.equal(value, other[name])}
    # Blocks are layers 4 to 11. The first reads the stem; every later one reads its predecessor's sum.
    expected = {f"{block}.conv1.weight" for block in range(5, 12)}
    expected |= {f"{block}.shortcut.0.weight" for block in (6, 8, 10)}
    assert changed == expected
    for name in expected:
        assert torch.equal(dict(halved.named_parameters())[name] * 2, other[name])


def test_batch_norm_behind_a_sum_undoes_the_doubling_so_nothing_is_halved():
    halved, plain = build("preactresnet18:width=4"), build("preactresnet18:width=4")
    ibp_init_(halved, generator())
    ibp_init_(plain, generator(), halve_after_sum=False)
    assert all(torch.equal(a, b) for a, b in zip(halved.parameters(), plain.parameters(), strict=True))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no initialization named 'xavier'; known: default, ibp, kaiming_normal"):
        initialize_(build("cnn3"), "xavier", generator())
