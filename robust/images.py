"""Labelled images, in memory or decoded when a batch asks for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DECODER_THREADS = 8  # Pillow releases the interpreter lock while it decodes and resizes


class Images(ABC):
    """N images and their labels.

    `labels` is int64 `[N]` on the CPU. Indices are int64 tensors; order and repetitions are kept.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(x, y) on `device`: x float32 `[B, C, H, W]` in [0, 1], y int64 `[B]`."""

    @abstractmethod
    def subset(self, index: Tensor) -> Images:
        """The images at `index`, in that order."""

    @abstractmethod
    def center_crop(self, size: int) -> Images:
        """The central size x size pixels of every image."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Images:
        """The same images kept on `device`, where that spares copies; images on disk stay there."""

    def split(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """(train, validation): `fraction` of every class, chosen by `seed`, is held out; both keep the stored order."""
        kept, held_out = stratified_split(self.labels, fraction, seed)
        return self.subset(kept), self.subset(held_out)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of an epoch's images in the order of training, `batch_size` of them a step; each of them once."""
        return torch.randperm(len(self), generator=generator)

    def epoch_size(self, batch_size: int) -> int:
        """How many indices `epoch` gives."""
        return len(self)


class MemoryImages(Images):
    """Images held as one tensor.

    Args:
        pixels: `[N, C, H, W]`, uint8, or float32 in [0, 1].
        labels: `[N]`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        if pixels.ndim != 4 or len(pixels) != len(labels):
            raise ValueError(f"expected N images [N, C, H, W] and N labels, got {list(pixels.shape)} and {len(labels)}")
        self.pixels = pixels
        self.labels = labels.to("cpu", torch.int64)
        self._labels_beside_pixels = self.labels.to(pixels.device)  # a batch on a device never waits for the host

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        index = index.to(self.pixels.device)
        return to_unit_range(self.pixels[index].to(device)), self._labels_beside_pixels[index].to(device)

    def subset(self, index: Tensor) -> MemoryImages:
        return MemoryImages(self.pixels[index.to(self.pixels.device)], self.labels[index.to("cpu")])

    def center_crop(self, size: int) -> MemoryImages:
        top, left = _centre(self.pixels.shape[2], size), _centre(self.pixels.shape[3], size)
        return MemoryImages(self.pixels[:, :, top : top + size, left : left + size].contiguous(), self.labels)

    def to(self, device: torch.device | str) -> MemoryImages:
        return MemoryImages(self.pixels.to(device), self.labels)


@dataclass(frozen=True)
class Decoder:
    """Reads one image file as uint8 `[C, H, W]`.

    Args:
        channels: 1 for grey, 3 for RGB.
        resize: length that the shorter side is scaled to (bilinear); None leaves it.
        crop: side of the central square that is kept, after scaling; None keeps the whole image.
    """

    channels: int = 3
    resize: int | None = None
    crop: int | None = None

    def __call__(self, path: Path) -> Tensor:
        """Pixels of `path`; ValueError if it cannot be read, has over 8 bits a channel or is smaller than the crop."""
        from PIL import Image

        try:
            with Image.open(path) as file:
                if file.mode[0] in "IF":
                    raise ValueError(f"{path}: pixels have more than 8 bits (mode {file.mode}); convert it to 8 bits")
                image = file.convert("RGB" if self.channels == 3 else "L")
        except (OSError, SyntaxError) as error:  # PIL: unknown and truncated files; PNG files with damaged blocks
            raise ValueError(f"{path}: no image that can be read ({error}); remove or replace it") from None
        if self.resize is not None:
            scale = self.resize / min(image.size)
            wide, high = (max(self.resize, round(side * scale)) for side in image.size)
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
        if self.crop is not None:
            if min(image.size) < self.crop:
                raise ValueError(f"{path}: {image.size[0]}x{image.size[1]} is smaller than the crop of {self.crop}")
            left, top = _centre(image.size[0], self.crop), _centre(image.size[1], self.crop)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class FileImages(Images):
    """Images in files, decoded by a few threads whenever a batch asks for them."""

    def __init__(self, files: Sequence[Path], labels: Tensor, decoder: Decoder) -> None:
        if len(files) != len(labels):
            raise ValueError(f"{len(files)} files, but {len(labels)} labels")
        self.files = list(files)
        self.labels = labels.to("cpu", torch.int64)
        self.decoder = decoder

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        files = [self.files[i] for i in index.tolist()]
        with ThreadPoolExecutor(DECODER_THREADS) as pool:
            images = list(pool.map(self.decoder, files))
        for file, image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                sizes = " and ".join("x".join(map(str, i.shape[1:])) for i in (images[0], image))
                raise ValueError(
                    f"images differ in size ({sizes}): {files[0]}, {file}; give a common size (folder:path=DIR,size=32)"
                )
        return to_unit_range(torch.stack(images).to(device)), self.labels[index.to("cpu")].to(device)

    def subset(self, index: Tensor) -> FileImages:
        return FileImages([self.files[i] for i in index.tolist()], self.labels[index.to("cpu")], self.decoder)

    def center_crop(self, size: int) -> FileImages:
        return FileImages(self.files, self.labels, replace(self.decoder, crop=size))

    def to(self, device: torch.device | str) -> FileImages:
        return self


class DeferredImages(Images):
    """Images that `load` brings into memory at the first use of anything but their existence."""

    def __init__(self, load: Callable[[], Images]) -> None:
        self._load = load

    @cached_property
    def loaded(self) -> Images:
        """The images, loaded now if they were not yet."""
        return self._load()

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.loaded.labels

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        return self.loaded.batch(index, device)

    def subset(self, index: Tensor) -> Images:
        return self.loaded.subset(index)

    def center_crop(self, size: int) -> Images:
        return DeferredImages(lambda: self.loaded.center_crop(size))

    def to(self, device: torch.device | str) -> Images:
        return DeferredImages(lambda: self.loaded.to(device))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 becomes the float32 nearest to value / 255, floats stay as they are."""
    if pixels.dtype != torch.uint8:
        return pixels.to(torch.float32)
    # Divided by a tensor: on CUDA a Python number is turned into a multiplication by its rounded reciprocal, which
    # differs in the last bit for some values, and then the same image would have two certificates.
    return pixels.to(torch.float32) / torch.full((), 255.0, device=pixels.device)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each ascending; round(fraction * N) are held out, spread evenly over the classes.

    Raises:
        ValueError: fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to hold out lies in [0, 1), got {fraction}")
    total = len(labels)
    held_count = round(fraction * total)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    # Every (1 / fraction)-th of the images in class order: each class gets its share to within one image, and the
    # total is exact. Whole numbers, because k * fraction in floats can land on the wrong side of an integer.
    position = torch.arange(total)
    held = (position + 1) * held_count // max(total, 1) > position * held_count // max(total, 1)
    return by_class[~held].sort().values, by_class[held].sort().values


def images_from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    source: str,
    layout: str = "auto",
    names: tuple[str, str] = ("x", "y"),
    unlabelled: bool = False,
) -> MemoryImages:
    """Images and labels as users store them, checked once and turned into `[N, C, H, W]`.

    Args:
        x: `[N, H, W, C]`, `[N, C, H, W]` or, grey, `[N, H, W]`; uint8, or floats in [0, 1].
        y: `[N]` (or `[N, 1]`) whole numbers from 0.
        source: file that the arrays come from, for messages.
        layout: "nhwc", "nchw", or "auto", which takes the axis that has 1 or 3 entries for the channels.
        names: what the arrays are called in the file, for messages.
        unlabelled: the label -1 is allowed, of images that have none.

    Raises:
        ValueError: wrong rank, dtype, range or length, or a layout that can not be told.
    """
    x_name, y_name = (f"{source}: {name}" for name in names)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{y_name} must be whole numbers [N], got {y.dtype} {list(y.shape)}")
    if len(x) != len(y):
        raise ValueError(f"{x_name} has {len(x)} images, but {names[1]} has {len(y)} labels")
    if len(y) and y.min() < -int(unlabelled):
        raise ValueError(f"{y_name}: labels count from 0, got {y.min()}")
    pixels = torch.from_numpy(np.ascontiguousarray(_channels_first(_checked_pixels(x, x_name), x_name, layout)))
    return MemoryImages(pixels, torch.from_numpy(y.astype(np.int64)))


def _checked_pixels(x: np.ndarray, name: str) -> np.ndarray[Any, Any]:
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} must be uint8, or floats in [0, 1], got {x.dtype}")
    if x.size and not (x.min() >= 0 and x.max() <= 1):  # also false for nan
        found = f"[{x.min():g}, {x.max():g}]"
        raise ValueError(f"{name}: floats must lie in [0, 1], got {found}; divide by 255 or store uint8")
    return x.astype(np.float32)


def _channels_first(x: np.ndarray, name: str, layout: str) -> np.ndarray[Any, Any]:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise ValueError(f"{name} must have 3 or 4 axes (N, H, W and perhaps C), got {list(x.shape)}")
    if layout == "auto":
        first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
        if first == last:
            raise ValueError(f"{name} {list(x.shape)}: which axis has the channels? set layout=nhwc or layout=nchw")
        layout = "nchw" if first else "nhwc"
    return x if layout == "nchw" else x.transpose(0, 3, 1, 2)


def _centre(size: int, crop: int) -> int:
    """First coordinate of the central `crop` of `size` pixels."""
    if crop > size:
        raise ValueError(f"can not crop {crop} pixels from {size}")
    return (size - crop) // 2
