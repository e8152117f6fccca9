"""ImageNet and its small versions: TinyImageNet (64x64, 200 classes) and ImageNet64 (64x64, 1000 classes)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robust.augmentation import Padding, crops_and_flips
from robust.data.folder import class_names, read_classes
from robust.dataset import DATASETS, DataSet, MissingData, data_root
from robust.images import Decoder, DeferredImages, FileImages, MemoryImages


@DATASETS.register("tiny_imagenet")
@dataclass(frozen=True)
class TinyImageNet:
    """`root/tiny-imagenet-200/train/CLASS/**` and `.../val/CLASS/**`, or val as the archive has it.

    The archive keeps all validation images in val/images and their classes in val/val_annotations.txt; both layouts
    are read. The validation images serve as test images, as in every paper.

    `tiny_imagenet:size=56,crop_padding=0` is SABR's and TAPS': random crops of 56x56, central ones for the test.
    """

    size: int = 64
    flip: bool = True
    crop_padding: int = 4
    padding_mode: Padding = "edge"

    def __call__(self, root: Path | None = None) -> DataSet:
        folder = data_root(root) / "tiny-imagenet-200"
        _require("tiny_imagenet", folder / "train", folder / "val")
        classes = class_names(folder / "train")
        crop = self.size if self.size != 64 else None
        return DataSet(
            name="tiny_imagenet",
            train=read_classes(folder / "train", classes, Decoder()),
            test=_tiny_validation(folder / "val", classes, Decoder(crop=crop)),
            classes=classes,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2302, 0.2265, 0.2262),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode, crop),
            input_shape=(3, self.size, self.size),
        )


@DATASETS.register("imagenet64")
@dataclass(frozen=True)
class ImageNet64:
    """Downsampled ImageNet: `root/imagenet64/train_data_batch_1.npz` to `_10.npz` and `val_data.npz`.

    Arrays `data` `[N, 12288]` uint8, channel by channel, and `labels`, which count from 1. The training images take
    16 GB of memory and are read when they are first used; the validation images serve as test images.
    """

    flip: bool = True
    crop_padding: int = 4
    padding_mode: Padding = "edge"

    def __call__(self, root: Path | None = None) -> DataSet:
        folder = data_root(root) / "imagenet64"
        _require("imagenet64", folder / "val_data.npz", folder / "train_data_batch_1.npz")
        batches = sorted(folder.glob("train_data_batch_*.npz"))
        return DataSet(
            name="imagenet64",
            train=DeferredImages(lambda: _read_batches(batches)),
            test=_read_batches([folder / "val_data.npz"]),
            classes=tuple(map(str, range(1000))),
            mean=(0.4815, 0.4578, 0.4082),
            std=(0.2153, 0.2111, 0.2121),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(3, 64, 64),
        )


@DATASETS.register("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """`root/imagenet/train/CLASS/*` and `root/imagenet/val/CLASS/*`; the validation images serve as test images.

    The shorter side is scaled to `resize`; the test takes the central size x size pixels, training a random crop of
    that size from the central resize x resize ones (no change of scale or aspect).
    """

    size: int = 224
    resize: int = 256
    flip: bool = True

    def __call__(self, root: Path | None = None) -> DataSet:
        folder = data_root(root) / "imagenet"
        _require("imagenet", folder / "train", folder / "val")
        classes = class_names(folder / "train")
        return DataSet(
            name="imagenet",
            train=read_classes(folder / "train", classes, Decoder(resize=self.resize, crop=self.resize)),
            test=read_classes(folder / "val", classes, Decoder(resize=self.resize, crop=self.size)),
            classes=classes,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            augmentation=crops_and_flips(self.flip, 0, "edge", self.size),
            input_shape=(3, self.size, self.size),
        )


def _require(name: str, *paths: Path) -> None:
    """Raises MissingData unless all of `paths` exist."""
    for path in paths:
        if not path.exists():
            raise MissingData(
                f"{name}: there is no {path}; get the archive from its owners, unpack it there, "
                f"or set ROBUST_DATA to the folder that has {path.parent.name}"
            )


def _tiny_validation(folder: Path, classes: tuple[str, ...], decoder: Decoder) -> FileImages:
    annotations = folder / "val_annotations.txt"
    if not annotations.exists():
        return read_classes(folder, classes, decoder)
    label_of = {name: label for label, name in enumerate(classes)}
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
    # Scripts that sort the images into class folders often leave the annotations behind.
    files = [folder / "images" / name for name, _ in rows]
    if files and not files[0].exists():
        return read_classes(folder, classes, decoder)
    return FileImages(files, torch.tensor([label_of[class_name] for _, class_name in rows]), decoder)


def _read_batches(files: list[Path]) -> MemoryImages:
    pixels, labels = [], []
    for file in files:
        with np.load(file, allow_pickle=False) as batch:
            data = batch["data"]
            if data.dtype != np.uint8 or data.shape[1:] != (3 * 64 * 64,):
                raise ValueError(f"{file}: data must be uint8 [N, 12288], got {data.dtype} {list(data.shape)}")
            pixels.append(torch.from_numpy(data).view(-1, 3, 64, 64))
            labels.append(torch.from_numpy(batch["labels"].astype(np.int64)) - 1)
    return MemoryImages(torch.cat(pixels), torch.cat(labels))
