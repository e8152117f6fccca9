"""A data set with stored points of other networks beside its images."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.registry import method_field
from robust.data.digits import Digits
from robust.dataset import DATASETS, DataSet, MissingData
from robust.images import Images, MemoryImages, to_unit_range


@DATASETS.register("transferred")
@dataclass(frozen=True)
class Transferred:
    """The data set `data` whose mini-batches hold every image twice: clean, and as a stored point that fools another
    network, drawn from all copies of all files. The objective `natural` on it is PubDef (Sitawarin et al. 2024), with
    one clean and one transferred point of equal weight.

    `scripts/transfer_points.py` makes the files: `points`, uint8 `[copies, N, C, H, W]`, in the order of the training
    images. Both of a pair are augmented, each by itself. Batch sizes count both, and so are even.

    Raises:
        MissingData: no such file.
        ValueError: a file that is no such archive, or of another number or size of images.
    """

    points: tuple[str, ...]
    data: Any = method_field(DATASETS, Digits())

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("transferred needs files of stored points: transferred:points=A.npz+B.npz,data=(cifar10)")

    def __call__(self, root: Path | None = None) -> DataSet:
        data = self.data(root)
        stored = torch.cat([read_points(Path(path).expanduser()) for path in self.points])
        wanted = (len(data.train), *data.train.batch(torch.tensor([0]))[0].shape[1:])
        if stored.shape[1:] != wanted:
            raise ValueError(
                f"transferred: points [copies, {', '.join(map(str, stored.shape[1:]))}] for the training images "
                f"{list(wanted)} of {data.name}; make them for this data set (scripts/transfer_points.py)"
            )
        return dataclasses.replace(data, train=PairedImages(data.train, stored.unbind()))


def read_points(path: Path) -> Tensor:
    """Points of one file, uint8 `[copies, N, C, H, W]`."""
    if not path.is_file():
        raise MissingData(f"transferred: there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            points = archive["points"]
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz archive with an array `points` ({error})") from error
    if points.dtype != np.uint8 or points.ndim != 5:
        raise ValueError(f"{path}: points must be uint8 [copies, N, C, H, W], got {points.dtype} {list(points.shape)}")
    return torch.from_numpy(points)


class PairedImages(Images):
    """N images and stored points of each; number i + k N is the k-th of image i.

    Args:
        own: the images.
        points: each uint8 `[N, C, H, W]`.
    """

    def __init__(self, own: Images, points: Sequence[Tensor]) -> None:
        self.own, self.points, self.labels = own, points, own.labels

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        which, image = index.cpu() // len(self), index.cpu() % len(self)
        x, y = self.own.batch(image, device)
        for number, stored in enumerate(self.points, 1):
            rows = which == number
            if rows.any():
                x[rows.to(x.device)] = to_unit_range(stored[image[rows].to(stored.device)].to(device))
        return x, y

    def subset(self, index: Tensor) -> Images:
        return PairedImages(self.own.subset(index), [stored[index.to(stored.device)] for stored in self.points])

    def center_crop(self, size: int) -> Images:
        cropped = [MemoryImages(stored, self.labels).center_crop(size).pixels for stored in self.points]
        return PairedImages(self.own.center_crop(size), cropped)

    def to(self, device: torch.device | str) -> Images:
        return PairedImages(self.own.to(device), [stored.to(device) for stored in self.points])

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        kept, held_out = super().split(fraction, seed)
        assert isinstance(held_out, PairedImages)
        return kept, held_out.own

    def epoch_size(self, batch_size: int) -> int:
        return 2 * len(self)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        if batch_size % 2:
            raise ValueError(f"transferred: a mini-batch of {batch_size} holds no pairs; set an even batch_size")
        pairs = []
        for part in torch.randperm(len(self), generator=generator).split(batch_size // 2):
            drawn = torch.randint(len(self.points), part.shape, generator=generator)
            pairs.append(torch.cat([part, part + (1 + drawn) * len(self)]))
        return torch.cat(pairs)
