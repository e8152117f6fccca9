"""Data sets that torchvision reads and downloads; the only file that imports it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from robust.dataset import MissingData
from robust.images import MemoryImages, images_from_arrays


def read(name: str, class_name: str, root: Path, download: bool, folder: str, **options: Any) -> Any:
    """Instance of the torchvision data set `class_name` under `root`.

    Args:
        name: registered name of ours, for messages.
        folder: what torchvision expects under `root`, for messages.
        options: what selects the part, `train=True` or `split="train"`.

    Raises:
        MissingData: the files are not there, or incomplete.
        RuntimeError: torchvision can not be imported.
    """
    data_set = getattr(_datasets(), class_name)
    try:
        return data_set(str(root), download=download, **options)
    except RuntimeError as error:
        if download:
            raise
        raise MissingData(
            f"{name}: {root / folder} is missing or incomplete; set ROBUST_DATA to the folder that has it, "
            f"or fetch it with {name}:download=true"
        ) from error


def images(data_set: Any, name: str, layout: str = "auto") -> MemoryImages:
    """Pixels and labels of a torchvision data set that holds them in `data` and `targets` (or `labels`)."""
    labels = data_set.targets if hasattr(data_set, "targets") else data_set.labels
    return images_from_arrays(np.asarray(data_set.data), np.asarray(labels), name, layout)


def _datasets() -> ModuleType:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError, OSError) as error:
        import torch

        build = torch.__version__.partition("+")[2]  # "cpu", "cu126"; wheels from PyPI have none
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        raise RuntimeError(
            f"torchvision can not be imported beside torch {torch.__version__} ({error}); install its matching build: "
            f"pip install --force-reinstall --no-deps torchvision{index}"
        ) from error
    return datasets
