"""ResNet-50 (He et al. 2016), the usual network of adversarial training on ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robust.layers import Shape, normalization
from robust.model import MODELS

EXPANSION = 4


class Bottleneck(nn.Module):
    """relu(shortcut(x) + residual), the residual being 1x1, 3x3 (with the stride) and 1x1 convolutions with batch norm.

    The shortcut is x, or a 1x1 convolution and batch norm where the shape changes.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = EXPANSION * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.relu3(self.bn3(self.conv3(active)) + self.shortcut(x))


@MODELS.register("resnet50")
@dataclass(frozen=True)
class ResNet50:
    """7x7 stem and 3x3 max pool, both with stride 2, stages of 3, 4, 6, 3 bottlenecks, mean over the image, logits.

    The stages are w, 2w, 4w, 8w wide inside their blocks and four times that between them; the stride is that of the
    3x3 convolution, as in torchvision.
    """

    width: int = 64

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        layers: list[nn.Module] = [
            normalization("resnet50", input_shape, mean, std),
            nn.Conv2d(input_shape[0], w, 7, 2, 3, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = w
        height, width = ((side - 1) // 4 + 1 for side in input_shape[1:])
        for blocks, inside, first_stride in [(3, w, 1), (4, 2 * w, 2), (6, 4 * w, 2), (3, 8 * w, 2)]:
            for stride in [first_stride] + [1] * (blocks - 1):
                layers.append(Bottleneck(channels, inside, stride))
                channels, height, width = EXPANSION * inside, (height - 1) // stride + 1, (width - 1) // stride + 1
        return nn.Sequential(*layers, nn.AvgPool2d((height, width)), nn.Flatten(), nn.Linear(channels, classes))
