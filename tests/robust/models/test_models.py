"""Contract of every registered architecture, and what single ones promise."""

import pytest
import torch
from torch import nn

from certify.tracing import capture
from robust.model import MODELS
from robust.models.ensemble import Ensemble
from robust.normalize import Normalize

SMALL = {  # the same structure at a size that a test can afford
    "cnn7": "cnn7:width=4,hidden=16",
    "cnn9": "cnn9:width=4,hidden=16",
    "cnn11": "cnn11:width=4,hidden=16",
    "cnn13": "cnn13:width=4,hidden=16",
    "cnn6": "cnn6:width=4,hidden=16",
    "preactresnet18": "preactresnet18:width=4",
    "resnet18": "resnet18:width=4",
    "resnet50": "resnet50:width=4",
    "wide_resnet": "wide_resnet:depth=10,widen=1",
    "liresnet": "liresnet:depth=2,width=8,hidden=16",
    "gloro_cnn": "gloro_cnn:channels=4+6,strides=2+2,hidden=16",
    "lipschitz_cnn": "lipschitz_cnn:width=4,stages=2,blocks=1,hidden=16",
}


def build(text, shape=(3, 32, 32), classes=10):
    torch.manual_seed(0)
    return MODELS.parse(text)(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0])


@pytest.fixture(params=MODELS.names())
def text(request):
    return SMALL.get(request.param, request.param)


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 10), ((3, 32, 32), 7)])
def test_pixels_become_logits(text, shape, classes):
    model = build(text, shape, classes).eval()
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, classes) and logits.isfinite().all()


def test_first_layer_normalises_and_logits_follow_a_linear_layer(text):
    whole = build(text)
    for model in whole.members if isinstance(whole, Ensemble) else [whole]:
        assert isinstance(model, nn.Sequential)
        assert isinstance(model[0], Normalize)
        assert model[0].mean.flatten().tolist() == [0.5, 0.5, 0.5]
        assert isinstance(model[-1], nn.Linear)


def test_a_traced_network_computes_the_same_logits(text):
    model = build(text).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_every_parameter_takes_part_in_training(text):
    model = build(text).train()
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_examples_do_not_mix_in_evaluation(text):
    model = build(text).eval().double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(model(x)[1:], model(x[1:]), atol=1e-12)


def test_a_channel_count_that_differs_from_the_constants_is_refused(text):
    with pytest.raises(ValueError, match=r"images have 1 channels, but mean has 3 values"):
        MODELS.parse(text)((1, 28, 28), 10, (0.5,) * 3, (0.25,) * 3)


def test_the_text_of_a_model_survives_a_round_trip(text):
    assert MODELS.spell(MODELS.parse(text)) == text


@pytest.mark.parametrize(
    "name",
    ["cnn3", "cnn4", "cnn5", "cnn6", "cnn7", "gowal_large", "gowal_tiny", "conv_med", "conv_med_big", "mlp"]
    + ["crown_ibp_2layer", "crown_ibp_3layer_fixed", "crown_ibp_4layer", "preactresnet18", "wide_resnet", "resnet18"],
)
def test_digits_fit(name):
    assert build(SMALL.get(name, name), (1, 8, 8)).eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_images_too_small_for_a_network_are_refused_with_the_layer_that_fails():
    message = r"gowal_small does not fit images of 8x8: convolution 2 of 2 \(4x4, padding 0\) would see 3x3"
    with pytest.raises(ValueError, match=message):
        build("gowal_small", (1, 8, 8))


@pytest.mark.parametrize("text", ["cnn3:width=0", "cnn5:hidden=0", "mlp:hidden=10+0"])
def test_layers_without_units_are_refused(text):
    with pytest.raises(ValueError, match=r"Conv|Dense"):
        build(text)


def test_cnn7_has_the_21_layers_that_block_sizes_count():
    names = [type(layer).__name__ for layer in build("cnn7:width=4,hidden=8")]
    conv, dense = ["Conv2d", "BatchNorm2d", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"]
    assert names == ["Normalize"] + 5 * conv + ["Flatten"] + dense + ["Linear"]


def test_cnn7_strides_twice_on_images_of_64_pixels_alone():
    strides = [
        [layer.stride[0] for layer in build("cnn7:width=2,hidden=4", (3, size, size)) if isinstance(layer, nn.Conv2d)]
        for size in (32, 56, 64)
    ]
    assert strides == [[1, 1, 2, 1, 1], [1, 1, 2, 1, 1], [1, 1, 2, 1, 2]]


def test_rectangular_images_are_taken():
    assert build("cnn5", (2, 16, 24)).eval()(torch.rand(1, 2, 16, 24)).shape == (1, 10)


def test_a_preactivation_block_without_residual_branch_is_its_shortcut():
    model = build("preactresnet18:width=4").eval()
    keeps, changes = model[3], model[4]
    nn.init.zeros_(keeps.conv2.weight)
    nn.init.zeros_(changes.conv2.weight)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(keeps(x), x)
    assert torch.equal(changes(x), changes.shortcut(torch.relu(changes.bn1(x))))


def test_a_wide_resnet_of_impossible_depth_is_refused():
    with pytest.raises(ValueError, match="depth must be 6n"):
        MODELS.parse("wide_resnet:depth=30")


def test_the_swish_wide_resnet_has_silu_everywhere_and_its_own_momentum():
    net = MODELS.parse("wide_resnet:depth=10,widen=1,activation=silu,bn_momentum=0.01")(
        (3, 8, 8), 10, (0.5,) * 3, (1.0,) * 3
    )
    kinds = [type(module) for module in net.modules()]
    assert kinds.count(nn.SiLU) == 7 and nn.ReLU not in kinds
    assert {module.momentum for module in net.modules() if isinstance(module, nn.BatchNorm2d)} == {0.01}
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(capture(net, x).snapshot()(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_an_ensemble_answers_with_the_mean_of_different_members():
    model = build("ensemble:model=(cnn3:width=2),members=3").eval()
    x = torch.rand(2, 3, 32, 32)
    each = [member(x) for member in model.members]
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(model(x), torch.stack(each).mean(0))
    with pytest.raises(ValueError, match="ensemble: members=0: expected at least 1"):
        build("ensemble:members=0")
