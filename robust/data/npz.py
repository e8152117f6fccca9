"""A user's own images in one numpy archive."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from robust.augmentation import Padding, crops_and_flips
from robust.dataset import DATASETS, DataSet, MissingData, constants
from robust.images import MemoryImages, images_from_arrays

PARTS = (("x_train", "y_train"), ("x_test", "y_test"), ("x", "y"))


@DATASETS.register("npz")
@dataclass(frozen=True)
class Npz:
    """`npz:FILE` with arrays x_train, y_train, x_test, y_test, or x, y alone, which are test images.

    Images are `[N, H, W, C]`, `[N, C, H, W]` or `[N, H, W]`, uint8 or floats in [0, 1]; labels count from 0. An array
    `classes` may name them. Without `mean` and `std` the pixels are not normalised; one value serves every channel.

    Raises:
        MissingData: there is no such file.
        ValueError: the arrays are not as described; the message names the array.
    """

    path: str
    layout: Literal["auto", "nhwc", "nchw"] = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    flip: bool = False
    crop_padding: int = 0
    padding_mode: Padding = "edge"

    def __call__(self, root: Path | None = None) -> DataSet:
        path = Path(self.path).expanduser()
        train, test, classes = read_npz(path, self.layout)
        if not len(test) and len(train):
            raise ValueError(f"{path}: has x_train but no x_test; name the arrays x and y if these are test images")
        channels, height, width = test.pixels.shape[1:]
        return DataSet(
            name=path.stem,
            train=train,
            test=test,
            classes=classes,
            mean=constants(self.mean, channels, default=0.0),
            std=constants(self.std, channels, default=1.0),
            augmentation=crops_and_flips(self.flip, self.crop_padding, self.padding_mode),
            input_shape=(channels, height, width),
        )

    def training_images(self) -> MemoryImages:
        """x_train and y_train of an archive that need not have more, where the label -1 means that there is none."""
        return read_npz(Path(self.path).expanduser(), self.layout, unlabelled=True)[0]


def read_npz(
    path: Path, layout: str = "auto", unlabelled: bool = False
) -> tuple[MemoryImages, MemoryImages, tuple[str, ...]]:
    """(train, test, class names) of an archive as `Npz` describes it; either is empty where it is not in there."""
    if not path.is_file():
        raise MissingData(f"npz: there is no file {path} (looked for {path.resolve()})")
    with _opened(path) as archive:
        found = [names for names in PARTS if names[0] in archive]
        if not found or (len(found) > 1 and ("x", "y") in found):
            raise ValueError(
                f"{path}: expected x_train, y_train, x_test, y_test, or x, y alone; it has {', '.join(archive.files)}"
            )
        for names in found:
            if names[1] not in archive:
                raise ValueError(f"{path}: has {names[0]} but no {names[1]}")
        arrays = {name: _array(archive, name, path) for names in found for name in names}
        named = tuple(str(name) for name in _array(archive, "classes", path)) if "classes" in archive else None
    parts = [images_from_arrays(arrays[x], arrays[y], str(path), layout, (x, y), unlabelled) for x, y in found]
    if len(parts) == 2 and parts[0].pixels.shape[1:] != parts[1].pixels.shape[1:]:
        sizes = " and ".join(str(list(part.pixels.shape[1:])) for part in parts)
        raise ValueError(f"{path}: training and test images differ in shape [C, H, W]: {sizes}")
    highest = max((int(part.labels.max()) for part in parts if len(part)), default=-1)
    if named is not None and highest >= len(named):
        raise ValueError(f"{path}: label {highest}, but `classes` has {len(named)} names")
    classes = named or tuple(map(str, range(highest + 1)))
    nothing = parts[0].subset(torch.empty(0, dtype=torch.int64))
    if len(parts) == 2:
        return parts[0], parts[1], classes
    return (parts[0], nothing, classes) if found == [("x_train", "y_train")] else (nothing, parts[0], classes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    # A file that numpy opened itself stays open where it is no archive.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            # Not in numpy's words: it takes any other bytes for a pickle, and says how to run it.
            raise ValueError(f"{path}: not a numpy .npz archive, or cut off; numpy.savez writes one") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: a single array; expected an .npz archive with arrays x and y")
        with archive:
            yield archive


def _array(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    try:
        array: np.ndarray = archive[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {name} cannot be read, is damaged or holds objects ({error})") from error
    return array
