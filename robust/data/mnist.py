"""MNIST handwritten digits and Fashion-MNIST: 60,000 + 10,000 grey images, 1x28x28."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust import torchvision_source
from robust.dataset import DATASETS, DataSet, data_root

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@DATASETS.register("mnist")
@dataclass(frozen=True)
class MNIST:
    """`root/MNIST/raw/*-ubyte`, as torchvision stores it.

    Shi, EXPR and SABR do not normalise: `mnist:mean=0,std=1`.
    """

    download: bool = False
    mean: tuple[float, ...] = (0.1307,)
    std: tuple[float, ...] = (0.3081,)

    def __call__(self, root: Path | None = None) -> DataSet:
        return _grey("mnist", "MNIST", root, self.download, tuple("0123456789"), self.mean, self.std)


@DATASETS.register("fashion_mnist")
@dataclass(frozen=True)
class FashionMNIST:
    """`root/FashionMNIST/raw/*-ubyte`, as torchvision stores it."""

    download: bool = False
    mean: tuple[float, ...] = (0.2860,)
    std: tuple[float, ...] = (0.3530,)

    def __call__(self, root: Path | None = None) -> DataSet:
        return _grey("fashion_mnist", "FashionMNIST", root, self.download, FASHION, self.mean, self.std)


def _grey(
    name: str,
    class_name: str,
    root: Path | None,
    download: bool,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DataSet:
    folder = f"{class_name}/raw"
    train, test = (
        torchvision_source.images(
            torchvision_source.read(name, class_name, data_root(root), download, folder, train=train), name
        )
        for train in (True, False)
    )
    return DataSet(name, train, test, classes, mean, std, augmentation=None, input_shape=(1, 28, 28))
