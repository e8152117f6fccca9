"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images, 3x32x32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust import torchvision_source
from robust.augmentation import Padding, crops_and_flips
from robust.data.npz import read_npz
from robust.dataset import DATASETS, DataSet, MissingData, constants, data_root
from robust.images import Images

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@DATASETS.register("cifar10")
@dataclass(frozen=True)
class CIFAR10:
    """`root/cifar10.npz` (fields as for `npz`) where it exists, else torchvision's `root/cifar-10-batches-py`.

    The default augmentation is certified training's; adversarial training's is
    `cifar10:crop_padding=4,padding_mode=constant`, and some of it does not normalise: `mean=0,std=1`.
    """

    download: bool = False
    flip: bool = True
    crop_padding: int = 2
    padding_mode: Padding = "edge"
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)

    def __call__(self, root: Path | None = None) -> DataSet:
        root = data_root(root)
        archive = root / "cifar10.npz"
        train: Images
        test: Images
        if archive.exists():
            train, test, _ = read_npz(archive)
        else:
            try:
                train, test, _ = _torchvision("cifar10", "CIFAR10", root, self.download, "cifar-10-batches-py")
            except MissingData as error:
                raise MissingData(f"{error} (there is no {archive} either)") from error
        return DataSet(
            name="cifar10",
            train=train,
            test=test,
            classes=CIFAR10_CLASSES,
            mean=constants(self.mean, 3, 0.0),
            std=constants(self.std, 3, 1.0),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(3, 32, 32),
        )


@DATASETS.register("cifar100")
@dataclass(frozen=True)
class CIFAR100:
    """torchvision's `root/cifar-100-python`, with the 100 fine labels."""

    download: bool = False
    flip: bool = True
    crop_padding: int = 2
    padding_mode: Padding = "edge"
    mean: tuple[float, ...] = (0.5071, 0.4865, 0.4409)
    std: tuple[float, ...] = (0.2673, 0.2564, 0.2762)

    def __call__(self, root: Path | None = None) -> DataSet:
        train, test, classes = _torchvision("cifar100", "CIFAR100", data_root(root), self.download, "cifar-100-python")
        return DataSet(
            name="cifar100",
            train=train,
            test=test,
            classes=classes,
            mean=constants(self.mean, 3, 0.0),
            std=constants(self.std, 3, 1.0),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(3, 32, 32),
        )


def _torchvision(
    name: str, class_name: str, root: Path, download: bool, folder: str
) -> tuple[Images, Images, tuple[str, ...]]:
    train, test = (
        torchvision_source.read(name, class_name, root, download, folder, train=train) for train in (True, False)
    )
    return torchvision_source.images(train, name), torchvision_source.images(test, name), tuple(train.classes)
