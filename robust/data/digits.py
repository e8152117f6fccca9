"""Handwritten digits of 8x8 pixels that come with scikit-learn: the data set that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from robust.dataset import DATASETS, DataSet
from robust.images import images_from_arrays


@DATASETS.register("digits")
@dataclass(frozen=True)
class Digits:
    """1437 training and 360 test images, 1x8x8, 10 classes; grey levels 0..16 become round(v 255 / 16).

    The test images are every fifth one in (class, stored) order: a fifth of every class, with no random numbers.
    """

    def __call__(self, root: Path | None = None) -> DataSet:
        from sklearn.datasets import load_digits

        stored = load_digits()
        pixels = np.rint(stored.images * 255 / 16).astype(np.uint8)
        every = images_from_arrays(pixels, stored.target, "digits")
        by_class = torch.argsort(every.labels, stable=True)
        is_test = torch.arange(len(every)) % 5 == 0
        return DataSet(
            name="digits",
            train=every.subset(by_class[~is_test].sort().values),
            test=every.subset(by_class[is_test].sort().values),
            classes=tuple("0123456789"),
            mean=(0.3058,),
            std=(0.3761,),
            augmentation=None,
            input_shape=(1, 8, 8),
        )
