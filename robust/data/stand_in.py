"""Images in the shape of a data set that is not at hand, to try out everything but the accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.registry import method_field
from robust.augmentation import crops_and_flips
from robust.data.cifar import CIFAR10
from robust.data.digits import Digits
from robust.data.subset import some_of
from robust.dataset import DATASETS, DataSet, constants
from robust.images import Images, MemoryImages

SHAPES = {
    "digits": (1, 8),
    "mnist": (1, 28),
    "fashion_mnist": (1, 28),
    "cifar10": (3, 32),
    "cifar100": (3, 32),
    "svhn": (3, 32),
    "tiny_imagenet": (3, 64),
    "imagenet64": (3, 64),
    "imagenet": (3, 224),
}
"""Channels and side of the images of a data set."""


@DATASETS.register("stand_in")
@dataclass(frozen=True)
class StandIn:
    """The digits of scikit-learn, scaled to the images of `data`, whose name, constants and augmentation they take.

    Never the data set itself: the name of the data set that this returns says so, and with it every checkpoint and
    report. Nothing of `data` is read.

    Args:
        data: such as `data=(tiny_imagenet:size=56)`, a data set with images of a known size.
        train, test: how many, at most 1437 and 360; 0 for all.
        classes: the digits of more than 10 classes are dealt out in turn; there is nothing to tell these apart by.

    Raises:
        ValueError: the size of the images of `data` is not known.
    """

    data: Any = method_field(DATASETS, CIFAR10())
    train: int = 0
    test: int = 0
    classes: int = 10

    def __post_init__(self) -> None:
        name = DATASETS.name_of(self.data)
        if name not in SHAPES:
            raise ValueError(f"stand_in: no stand-in for {name!r}; there is one for {', '.join(SHAPES)}")
        if min(self.train, self.test) < 0 or self.classes < 10:
            raise ValueError(
                f"stand_in: train={self.train}, test={self.test}, classes={self.classes}: expected counts of images "
                "from 0 and of classes from 10"
            )

    def __call__(self, root: Path | None = None) -> DataSet:
        name = DATASETS.name_of(self.data)
        channels, side = SHAPES[name]
        side = getattr(self.data, "size", side)
        digits = Digits()(root)
        train, test = (
            self._resized(some_of(images, count, seed=0), channels, side)
            for images, count in ((digits.train, self.train), (digits.test, self.test))
        )
        padding = getattr(self.data, "crop_padding", 0)
        return DataSet(
            name=f"stand-in for {name} (resized digits)",
            train=train,
            test=test,
            classes=tuple(map(str, range(self.classes))),
            mean=constants(getattr(self.data, "mean", ()), channels, 0.0),
            std=constants(getattr(self.data, "std", ()), channels, 1.0),
            augmentation=crops_and_flips(
                getattr(self.data, "flip", False), padding, getattr(self.data, "padding_mode", "edge")
            ),
            input_shape=(channels, side, side),
        )

    def _resized(self, images: Images, channels: int, side: int) -> MemoryImages:
        x, y = images.batch(torch.arange(len(images)))
        scaled = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        pixels = (255 * scaled).round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
        return MemoryImages(pixels, self._dealt(y))

    def _dealt(self, y: Tensor) -> Tensor:
        return (y + 10 * torch.arange(len(y))) % self.classes if self.classes > 10 else y
