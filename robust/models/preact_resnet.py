"""Pre-activation ResNet-18 for small images (He et al. 2016), the usual network of fast adversarial training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robust.layers import Shape, normalization
from robust.model import MODELS


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), 3x3 convolutions without bias.

    Where the shape changes, the shortcut is a 1x1 convolution of relu(bn(x)) instead of x.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu1 = activation()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu2 = activation()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.keeps_shape = stride == 1 and channels_in == channels_out
        if not self.keeps_shape:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        # keeps_shape is fixed at construction, so a tracer sees one straight path.
        return residual + (x if self.keeps_shape else self.shortcut(active))


def preactivation_network(
    name: str,
    stem: int,
    stages: Sequence[tuple[int, int, int]],
    input_shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Normalize, stem convolution, pre-activation blocks, BN, activation, mean over the image, logits.

    Args:
        stem: channels of the 3x3 stem.
        stages: (blocks, channels, stride of the first block) of each stage.
    """
    layers: list[nn.Module] = [
        normalization(name, input_shape, mean, std),
        nn.Conv2d(input_shape[0], stem, 3, 1, 1, bias=False),
    ]
    channels, (height, width) = stem, input_shape[1:]
    for blocks, channels_out, first_stride in stages:
        for stride in [first_stride] + [1] * (blocks - 1):
            layers.append(PreActBlock(channels, channels_out, stride, activation))
            channels, height, width = channels_out, (height - 1) // stride + 1, (width - 1) // stride + 1
    # A pool of the known size rather than an adaptive one: it is an ordinary linear layer to every bound method.
    layers += [nn.BatchNorm2d(channels), activation(), nn.AvgPool2d((height, width)), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, classes))


@MODELS.register("preactresnet18")
@dataclass(frozen=True)
class PreActResNet18:
    """Four stages of two blocks with w, 2w, 4w, 8w channels and strides 1, 2, 2, 2."""

    width: int = 64

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        stages = [(2, w, 1), (2, 2 * w, 2), (2, 4 * w, 2), (2, 8 * w, 2)]
        return preactivation_network("preactresnet18", w, stages, input_shape, classes, mean, std)
