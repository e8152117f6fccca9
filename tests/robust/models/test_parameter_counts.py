"""Parameter counts against published networks: a wrong kernel, stride, padding or batch norm shows here."""

import pytest
import torch

from robust.model import MODELS

MNIST, CIFAR, TINY, IMAGENET64 = ((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 64, 64), 200), ((3, 64, 64), 1000)
TINY_CROP = ((3, 56, 56), 200)
IMAGENET = ((3, 224, 224), 1000)


def count(text, problem):
    shape, classes = problem
    with torch.device("meta"):  # shapes without memory
        model = MODELS.parse(text)(shape, classes, (0.0,) * shape[0], (1.0,) * shape[0])
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "text, mnist, cifar",
    [
        ("cnn7", 13_259_338, 17_192_650),
        ("cnn7:batch_norm=false", 13_257_290, 17_190_602),
        ("cnn7:hidden_batch_norm=false", 13_258_314, 17_191_626),
        ("gowal_large", 13_257_290, 17_190_602),
        ("gowal_large:padding=valid", 3_623_498, 5_721_802),
        ("gowal_medium", 893_418, 1_188_906),
        ("gowal_small", 329_606, 470_918),
        ("gowal_tiny", 79_510, 308_310),
        ("cnn3", 24_330, 29_930),
        ("cnn3:batch_norm=true", 24_426, 30_026),
        ("cnn3:width=64", 195_594, 217_994),
        ("cnn4", 817_098, 1_063_658),
        ("cnn5", 820_954, 1_067_002),
        ("cnn5:batch_norm=true", 822_106, 1_068_154),
        ("cnn5:width=64", 3_414_346, 4_398_538),
        ("conv_med", 1_637_256, 2_118_856),
        ("conv_med_big", 1_653_160, 2_133_736),
        ("crown_ibp_2layer", 52_182, 67_670),
        ("mlp:hidden=100", 79_510, 308_310),
    ],
)
def test_small_image_networks_have_the_published_size(text, mnist, cifar):
    assert (count(text, MNIST), count(text, CIFAR)) == (mnist, cifar)


@pytest.mark.parametrize(
    "text, problem, parameters",
    [
        ("cnn7", TINY, 17_290_120),
        ("cnn7", IMAGENET64, 17_700_520),
        ("cnn7", TINY_CROP, 51_893_128),  # SABR
        ("cnn7:last_stride=2", TINY_CROP, 13_357_960),  # TAPS
        ("cnn7:width=32,hidden=216", CIFAR, 3_644_770),  # SABR narrow
        ("cnn7:width=96", CIFAR, 26_089_770),  # SABR wide
        ("cnn9", CIFAR, 17_192_650 + 2 * (128 * 128 * 9 + 3 * 128)),
        ("cnn11", CIFAR, 17_192_650 + 4 * (128 * 128 * 9 + 3 * 128)),
        ("cnn13", CIFAR, 17_192_650 + 6 * (128 * 128 * 9 + 3 * 128)),
        # 11,171,146 is the version without the last batch norm (1,024), 11,173,962 the post-activation ResNet-18.
        ("preactresnet18", CIFAR, 11_171_146 + 1_024),
        ("resnet18", CIFAR, 11_173_962),
        ("resnet50", IMAGENET, 25_557_032),
        ("wide_resnet", CIFAR, 46_160_474),
        ("wide_resnet:depth=28", CIFAR, 36_479_194),
    ],
)
def test_large_networks_have_the_published_size(text, problem, parameters):
    assert count(text, problem) == parameters
