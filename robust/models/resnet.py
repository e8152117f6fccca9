"""ResNet-18 with the small-image stem (He et al. 2016), the ResNet of TRADES, MART and DAFA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from robust.layers import Shape, normalization
from robust.model import MODELS


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), 3x3 convolutions without bias.

    The shortcut is x, or a 1x1 convolution and batch norm where the shape changes.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


@MODELS.register("resnet18")
@dataclass(frozen=True)
class ResNet18:
    """3x3 stem, four stages of two post-activation blocks with w, 2w, 4w, 8w channels, mean over the image, logits."""

    width: int = 64

    def __call__(self, input_shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
        w = self.width
        layers: list[nn.Module] = [
            normalization("resnet18", input_shape, mean, std),
            nn.Conv2d(input_shape[0], w, 3, 1, 1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),
        ]
        channels, (height, width) = w, input_shape[1:]
        for channels_out, first_stride in [(w, 1), (2 * w, 2), (4 * w, 2), (8 * w, 2)]:
            for stride in (first_stride, 1):
                layers.append(BasicBlock(channels, channels_out, stride))
                channels, height, width = channels_out, (height - 1) // stride + 1, (width - 1) // stride + 1
        layers += [nn.AvgPool2d((height, width)), nn.Flatten(), nn.Linear(channels, classes)]
        return nn.Sequential(*layers)
