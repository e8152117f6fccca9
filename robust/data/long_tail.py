"""A long-tailed subset of a data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.registry import method_field
from robust.data.digits import Digits
from robust.dataset import DATASETS, DataSet
from robust.images import Images


@DATASETS.register("long_tail")
@dataclass(frozen=True)
class LongTail:
    """The training images of `data` with class sizes that fall from class to class: n ratio^(-k / (K - 1)) of class k
    of K, n the size of the smallest class before (Cui et al. 2019); test images stay as they are.

    Args:
        data: such as `data=(cifar10)`.
        ratio: size of the largest class over that of the smallest.
        balanced: draw the images of an epoch with replacement so that all classes are equally likely, as many as there
            are; otherwise every image is seen once.
        seed: chooses the images that stay.
    """

    data: Any = method_field(DATASETS, Digits())
    ratio: float = 100.0
    balanced: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"long_tail: ratio={self.ratio}: expected the largest class over the smallest, at least 1")

    def __call__(self, root: Path | None = None) -> DataSet:
        data = self.data(root)
        train = data.train.subset(tail(data.train.labels, len(data.classes), self.ratio, self.seed))
        return dataclasses.replace(data, train=BalancedImages(train) if self.balanced else train)


def tail(labels: Tensor, classes: int, ratio: float, seed: int) -> Tensor:
    """Indices of the images that stay, ascending; every class keeps at least one."""
    sizes = torch.bincount(labels, minlength=classes)
    most = int(sizes.min())
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = []
    for k in range(classes):
        count = max(1, int(most * ratio ** (-k / max(classes - 1, 1))))
        kept.append(shuffled[labels[shuffled] == k][:count])
    return torch.cat(kept).sort().values


class BalancedImages(Images):
    """Images whose epochs draw every class equally often on average, with replacement."""

    def __init__(self, images: Images) -> None:
        self.images, self.labels = images, images.labels

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        return self.images.batch(index, device)

    def subset(self, index: Tensor) -> Images:
        return BalancedImages(self.images.subset(index))

    def center_crop(self, size: int) -> Images:
        return BalancedImages(self.images.center_crop(size))

    def to(self, device: torch.device | str) -> Images:
        return BalancedImages(self.images.to(device))

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        kept, held_out = self.images.split(fraction, seed)
        return BalancedImages(kept), held_out

    def epoch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        weight = 1 / torch.bincount(self.labels).double()[self.labels]
        return torch.multinomial(weight, len(self), replacement=True, generator=generator)
