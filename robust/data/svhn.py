"""Street View House Numbers: 73,257 + 26,032 colour images, 3x32x32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust import torchvision_source
from robust.augmentation import Padding, crops_and_flips
from robust.dataset import DATASETS, DataSet, data_root


@DATASETS.register("svhn")
@dataclass(frozen=True)
class SVHN:
    """`root/train_32x32.mat` and `root/test_32x32.mat`, as torchvision stores them; no augmentation by default."""

    download: bool = False
    flip: bool = False
    crop_padding: int = 0
    padding_mode: Padding = "edge"

    def __call__(self, root: Path | None = None) -> DataSet:
        train, test = (
            torchvision_source.images(
                torchvision_source.read(
                    "svhn", "SVHN", data_root(root), self.download, f"{part}_32x32.mat", split=part
                ),
                "svhn",
                layout="nchw",
            )
            for part in ("train", "test")
        )
        return DataSet(
            name="svhn",
            train=train,
            test=test,
            classes=tuple("0123456789"),
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(3, 32, 32),
        )
