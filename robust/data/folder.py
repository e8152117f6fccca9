"""A user's own images in folders, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robust.augmentation import Padding, crops_and_flips
from robust.dataset import DATASETS, DataSet, MissingData, constants
from robust.images import Decoder, FileImages

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

PART_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""What people call the parts of a data set; hardly a class."""


@DATASETS.register("folder")
@dataclass(frozen=True)
class Folder:
    """`folder:DIR` with DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val), or DIR/CLASS/* alone: test images.

    Classes are the folder names in alphabetical order. Images are decoded when they are needed.

    Fields:
        size: scale the shorter side to `size` pixels and cut the central square; 0 takes the images as they are, and
            then all of them must have one size.
        channels: 1 for grey, 3 for RGB; images are converted.
        mean, std: pixels are not normalised without them; one value serves every channel.

    Raises:
        MissingData: there is no such folder.
        ValueError: there are no class folders with images, test classes that training does not have, or parts under
            other names, such as Train/ or testing/.
    """

    path: str
    size: int = 0
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    crop_padding: int = 0
    padding_mode: Padding = "edge"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"folder: channels is 1 (grey) or 3 (RGB), got {self.channels}")
        if self.size < 0:
            raise ValueError(f"folder: size={self.size}: expected pixels, or 0 for images that have one size")

    def __call__(self, root: Path | None = None) -> DataSet:
        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise MissingData(f"folder: there is no folder {path} (looked for {path.resolve()})")
        decoder = Decoder(self.channels, resize=self.size or None, crop=self.size or None)
        train, test, classes = _parts(path, decoder)
        channels, height, width = decoder(test.files[0]).shape
        return DataSet(
            name=path.name,
            train=train,
            test=test,
            classes=classes,
            mean=constants(self.mean, channels, default=0.0),
            std=constants(self.std, channels, default=1.0),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(channels, height, width),
        )


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, in alphabetical order."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def read_classes(folder: Path, classes: Sequence[str], decoder: Decoder) -> FileImages:
    """Images under folder/CLASS for each class, at any depth, labelled by the position of the class in `classes`.

    Raises:
        ValueError: there is no image, or a class that `classes` does not have.
    """
    unknown = sorted(set(class_names(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder}: {', '.join(unknown[:5])}: no such class in training")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{folder}: no images in class folders; expected files such as {folder}/CLASS/name.png")
    return FileImages(files, torch.tensor(labels), decoder)


def _parts(path: Path, decoder: Decoder) -> tuple[FileImages, FileImages, tuple[str, ...]]:
    test_folder = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    if test_folder is None:
        if (path / "train").is_dir():
            raise ValueError(f"{path}: has train but neither test nor val")
        classes = class_names(path)
        parts = [name for name in classes if name.casefold() in PART_NAMES]
        if parts:
            raise ValueError(
                f"{path}: {' and '.join(parts)} would be read as classes; expected train/CLASS/... and test/CLASS/... "
                "(or val/CLASS/...), named exactly so"
            )
        test = read_classes(path, classes, decoder)
        return test.subset(torch.empty(0, dtype=torch.int64)), test, classes
    if not (path / "train").is_dir():
        classes = class_names(test_folder)
        test = read_classes(test_folder, classes, decoder)
        return test.subset(torch.empty(0, dtype=torch.int64)), test, classes
    classes = class_names(path / "train")
    return read_classes(path / "train", classes, decoder), read_classes(test_folder, classes, decoder), classes
