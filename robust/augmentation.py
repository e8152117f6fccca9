"""Random crops and flips of a whole batch at once, on the device that holds it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.noise import draw

Padding = Literal["edge", "constant"]


@dataclass(frozen=True)
class Augmentation:
    """Pads, crops and mirrors every image of a batch independently.

    Args:
        flip: mirror left and right with probability 1/2.
        crop_padding: pixels added on each of the four sides before the crop.
        padding_mode: "edge" repeats the border pixel, "constant" adds black ones (pixel value 0).
        crop_size: side of the square that is cut out; None keeps the size of the image.
    """

    flip: bool = False
    crop_padding: int = 0
    padding_mode: Padding = "edge"
    crop_size: int | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or (self.crop_size is not None and self.crop_size < 1):
            raise ValueError(f"padding can not be negative and a crop not empty, got {self}")
        if self.padding_mode not in ("edge", "constant"):
            raise ValueError(f"padding_mode is 'edge' or 'constant', got {self.padding_mode!r}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented copy of x `[B, C, H, W]`, or x itself where there is nothing to do.

        All randomness comes from `generator`. It may live on another device than x: with a CPU generator every device
        gets the same crops.

        Raises:
            ValueError: the crop is larger than the padded image.
        """
        height, width = x.shape[-2:]
        crop_height, crop_width = (self.crop_size or height), (self.crop_size or width)
        rows, inside_rows = self._positions(len(x), height, crop_height, generator)
        columns, inside_columns = self._positions(len(x), width, crop_width, generator)
        if self.flip:
            mirrored = draw(torch.rand, (len(x), 1), generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            inside_columns = torch.where(mirrored, inside_columns.flip(1), inside_columns)
        if not self.flip and self.crop_padding == 0 and (crop_height, crop_width) == (height, width):
            return x
        # Two gathers, rows first, need B (H' + W') indices where one would need B H' W' of them.
        row_index = rows.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, width)
        column_index = columns.to(x.device)[:, None, None, :].expand(-1, x.shape[1], crop_height, -1)
        out = x.gather(2, row_index).gather(3, column_index)
        if self.padding_mode == "constant" and self.crop_padding:
            inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
            out = out.where(inside.to(x.device), out.new_zeros(()))
        return out

    def _positions(self, batch: int, size: int, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Coordinates `[B, crop]` of each crop's pixels along an axis, clamped into the image; which were inside."""
        room = size + 2 * self.crop_padding - crop
        if room < 0:
            raise ValueError(f"can not crop {crop} pixels from {size} padded by {self.crop_padding} on each side")
        choose = functools.partial(torch.randint, room + 1)
        start = draw(choose, (batch, 1), generator, torch.int64) - self.crop_padding
        position = start + torch.arange(crop, device=generator.device)
        return position.clamp(0, size - 1), (position >= 0) & (position < size)


def crops_and_flips(
    flip: bool, crop_padding: int, padding_mode: Padding, crop_size: int | None = None
) -> Augmentation | None:
    """The augmentation that these fields of a data set describe; None where they ask for nothing."""
    if not flip and crop_padding == 0 and crop_size is None:
        return None
    return Augmentation(flip, crop_padding, padding_mode, crop_size)
