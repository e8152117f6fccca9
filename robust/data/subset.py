"""A small part of a data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.registry import method_field
from robust.data.digits import Digits
from robust.dataset import DATASETS, DataSet
from robust.images import Images, stratified_split


@DATASETS.register("subset")
@dataclass(frozen=True)
class Subset:
    """Some training and test images of `data`, spread evenly over the classes; everything else is its own.

    Args:
        data: such as `data=(cifar10)`.
        train, test: how many; 0, or more than there are, for all of them.
        seed: chooses the images that stay.
    """

    data: Any = method_field(DATASETS, Digits())
    train: int = 0
    test: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.test) < 0:
            raise ValueError(f"subset: train={self.train}, test={self.test}: expected counts of images from 0")

    def __call__(self, root: Path | None = None) -> DataSet:
        data = self.data(root)
        train, test = some_of(data.train, self.train, self.seed), some_of(data.test, self.test, self.seed)
        return dataclasses.replace(data, name=f"{data.name} (a part)", train=train, test=test)


def some_of(images: Images, count: int, seed: int) -> Images:
    """`count` of the images in the stored order, every class with its share; all of them for 0 or too large a count."""
    if not 0 < count < len(images):
        return images
    return images.subset(stratified_split(images.labels, count / len(images), seed)[1])
