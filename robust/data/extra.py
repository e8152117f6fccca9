"""Extra or generated images beside a data set's own, at a fixed share of every mini-batch."""

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


@DATASETS.register("extra")
@dataclass(frozen=True)
class Extra:
    """The data set `own` with the training images of `extra` beside its own: every mini-batch holds `fraction` of them,
    drawn with replacement, and an epoch is one pass over `own` (Carmon et al. 2019; Gowal et al. 2021; Wang et al.
    2023).

    Validation images are held out of `own` alone; test images, classes, normalisation and augmentation are `own`'s. The
    labels of `extra` are whatever its file says: conditions of a generator, or another model's predictions. An archive
    needs x_train and y_train alone, where -1 means an image without a label, for objectives that take them (awr).

    Args:
        own, extra: such as `own=(cifar10),extra=(npz:path=generated.npz)`.
        fraction: 0.7 for a million generated images, 0.5 for 500,000 extra ones.

    Raises:
        ValueError: a fraction outside (0, 1), images of another size, or labels that `own` does not have.
    """

    own: Any = method_field(DATASETS, Digits())
    extra: Any = method_field(DATASETS, Digits())
    fraction: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"extra: fraction={self.fraction}: expected a share of the mini-batch between 0 and 1")

    def __call__(self, root: Path | None = None) -> DataSet:
        # An archive of more images needs none to test on.
        alone = getattr(self.extra, "training_images", None)
        data, more = self.own(root), self.extra(root).train if alone is None else alone()
        if not len(more):
            raise ValueError(f"extra: {DATASETS.spell(self.extra)} has no training images (an archive needs x_train)")
        shapes = [tuple(images.batch(torch.tensor([0]))[0].shape[1:]) for images in (data.train, more)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"extra: images are {shapes[1]}, but those of {data.name} are {shapes[0]}")
        if int(more.labels.max()) >= len(data.classes):
            raise ValueError(
                f"extra: label {int(more.labels.max())}, but {data.name} has {len(data.classes)} classes, from 0"
            )
        return dataclasses.replace(data, train=MixedImages(data.train, more, self.fraction))


class MixedImages(Images):
    """Images of two sources, numbered one behind the other.

    Args:
        own: an epoch passes over these once.
        extra: fill `fraction` of every mini-batch.
    """

    def __init__(self, own: Images, extra: Images, fraction: float) -> None:
        self.own, self.extra, self.fraction = own, extra, fraction
        self.labels = torch.cat([own.labels, extra.labels])

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        index = index.cpu()
        first = index < len(self.own)
        own_x, own_y = self.own.batch(index[first], device)
        extra_x, extra_y = self.extra.batch(index[~first] - len(self.own), device)
        # Behind each other, then in the order that was asked for.
        place = torch.cat([first.nonzero(), (~first).nonzero()]).squeeze(1).argsort().to(own_x.device)
        return torch.cat([own_x, extra_x])[place], torch.cat([own_y, extra_y])[place]

    def subset(self, index: Tensor) -> Images:
        first = index < len(self.own)
        return MixedImages(
            self.own.subset(index[first]), self.extra.subset(index[~first] - len(self.own)), self.fraction
        )

    def center_crop(self, size: int) -> Images:
        return MixedImages(self.own.center_crop(size), self.extra.center_crop(size), self.fraction)

    def to(self, device: torch.device | str) -> Images:
        return MixedImages(self.own.to(device), self.extra.to(device), self.fraction)

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        kept, held_out = self.own.split(fraction, seed)
        return MixedImages(kept, self.extra, self.fraction), held_out

    def epoch_size(self, batch_size: int) -> int:
        own = self._own_of(batch_size)
        return len(self.own) + -(-len(self.own) // own) * (batch_size - own)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        own = self._own_of(batch_size)
        order = torch.randperm(len(self.own), generator=generator)
        mixed = []
        for part in order.split(own):
            drawn = torch.randint(len(self.extra), (batch_size - own,), generator=generator)
            mixed.append(torch.cat([part, len(self.own) + drawn]))
        return torch.cat(mixed)

    def _own_of(self, batch_size: int) -> int:
        """Images of `own` in a whole mini-batch; ValueError where there would be none."""
        own = batch_size - round(self.fraction * batch_size)
        if not 0 < own < batch_size:
            raise ValueError(f"extra: a mini-batch of {batch_size} can not hold {self.fraction:g} of extra images")
        return own
