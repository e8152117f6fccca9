"""Registry of data sets: `parse_dataset("mnist")(root)` reads one; `DataSet` is what it returns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.registry import Registry
from robust.augmentation import Augmentation
from robust.images import Images

DATASETS = Registry("data set", "robust.data")

PATHS = ("path", "points")
"""Fields of data sets that name the user's own files, one or several."""


class MissingData(FileNotFoundError):
    """A data set that is not where it was looked for; the message says where that was and how to get it."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training and test images with what a model and a trainer need to know about them.

    Args:
        classes: their names, in the order of the labels.
        mean, std: per channel, in pixel units; the constants of the model's first layer.
        augmentation: of training batches, None for none. It brings training images to `input_shape`.
        input_shape: (C, H, W) that the model sees.

    `train` is empty for a user's own data without a training part.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None
    input_shape: tuple[int, int, int]

    def split(self, fraction: float, seed: int) -> DataSet:
        """Copy whose test images are `fraction` of the training images, held out class by class.

        For choosing settings and checkpoints: the real test images are not in it.
        """
        train, validation = self.train.split(fraction, seed)
        crop = self.augmentation.crop_size if self.augmentation is not None else None
        test = validation if crop is None else validation.center_crop(crop)
        return dataclasses.replace(self, train=train, test=test)


def data_root(root: Path | str | None = None) -> Path:
    """`root` itself, else the folder that the environment variable ROBUST_DATA names, else ./data."""
    return Path(root or os.environ.get("ROBUST_DATA") or "data").expanduser()


def parse_dataset(text: str) -> Callable[..., DataSet]:
    """Registered data set that `text` spells; "npz:FILE" is short for "npz:path=FILE", and so is "folder:DIR".

    Raises:
        UnknownName: no such data set, or a field that it does not have.
    """
    name, _, rest = text.strip().partition(":")
    if name in DATASETS:
        fields = [field.name for field in dataclasses.fields(DATASETS[name])]
        first = rest.split(",")[0].partition("=")[0].strip()
        if "path" in fields and rest and first not in fields:
            rest = f"path={rest}"
    return DATASETS.parse(f"{name}:{rest}" if rest else name)


def from_anywhere(text: str) -> str:
    """The text with absolute paths of the user's own files, so that it means the same in another working directory.

    As it is where a path has signs, such as a comma, that no text can hold.
    """
    method = _with_absolute_paths(parse_dataset(text))
    try:
        return DATASETS.spell(method) if parse_dataset(DATASETS.spell(method)) == method else text
    except ValueError:
        return text


def _with_absolute_paths(method: Any) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_absolute_paths(value)
        elif field.name in PATHS:
            whole = [
                os.path.abspath(Path(path).expanduser()) for path in ((value,) if isinstance(value, str) else value)
            ]
            changes[field.name] = whole[0] if isinstance(value, str) else tuple(whole)
    return dataclasses.replace(method, **changes)


def constants(values: tuple[float, ...], channels: int, default: float) -> tuple[float, ...]:
    """`values` for each channel: none given means `default`, one is meant for every channel.

    Raises:
        ValueError: another number of values than of channels.
    """
    if len(values) in (0, 1):
        return (values or (default,)) * channels
    if len(values) != channels:
        raise ValueError(f"images have {channels} channels, but there are {len(values)} constants for normalisation")
    return values
