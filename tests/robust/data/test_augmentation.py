"""Batched crops and flips against one image at a time."""

import numpy as np
import pytest
import torch

from robust.augmentation import Augmentation, crops_and_flips


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def every_outcome(image, augmentation):
    """All crops that `augmentation` can make of one image, by numpy's own padding, as bytes."""
    pad, size = augmentation.crop_padding, augmentation.crop_size
    mode = {"edge": "edge", "constant": "constant"}[augmentation.padding_mode]
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode=mode)
    height, width = (size, size) if size else image.shape[1:]
    outcomes = set()
    for top in range(padded.shape[1] - height + 1):
        for left in range(padded.shape[2] - width + 1):
            crop = padded[:, top : top + height, left : left + width]
            outcomes.add(crop.tobytes())
            if augmentation.flip:
                outcomes.add(crop[:, :, ::-1].tobytes())
    return outcomes


@pytest.mark.parametrize("mode", ["edge", "constant"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding, size", [(1, None), (2, None), (0, 3), (1, 3), (0, None)])
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 5, 4)])
def test_the_crops_of_many_copies_are_exactly_those_of_the_slow_way(mode, flip, padding, size, shape):
    augmentation = Augmentation(flip, padding, mode, size)
    image = torch.rand(shape, generator=generator(1))
    batch = augmentation(image.expand(2000, *shape).contiguous(), generator())
    seen = {crop.numpy().tobytes() for crop in batch}
    assert seen == every_outcome(image, augmentation)


def test_images_of_a_batch_are_not_mixed():
    x = torch.arange(64.0).view(64, 1, 1, 1).expand(64, 2, 6, 6).contiguous()
    out = Augmentation(flip=True, crop_padding=2)(x, generator())
    assert torch.equal(out, x)


def test_channels_of_an_image_move_together():
    plane = torch.rand(50, 1, 6, 6, generator=generator(1))
    out = Augmentation(flip=True, crop_padding=2)(plane.expand(-1, 3, -1, -1).contiguous(), generator())
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])


def test_offsets_are_uniform_and_half_of_the_images_are_mirrored():
    ramp = torch.arange(1.0, 9.0).view(1, 1, 1, 8).expand(20_000, 1, 8, 8).contiguous()
    out = Augmentation(flip=True, crop_padding=2, padding_mode="constant")(ramp, generator())
    mirrored = out[:, 0, 4, 3] > out[:, 0, 4, 4]
    left_edge = torch.where(mirrored, out[:, 0, 4, 7], out[:, 0, 4, 0])
    # Out of five offsets two put padding at the left edge; rows are black in the middle of the image never.
    counts = torch.bincount(left_edge.long(), minlength=4)[:4] / len(out)
    assert abs(mirrored.float().mean() - 0.5) < 0.02
    assert torch.allclose(counts, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.02)


def test_the_generator_alone_decides():
    x = torch.rand(16, 3, 8, 8, generator=generator(1))
    augmentation = Augmentation(flip=True, crop_padding=2)
    torch.manual_seed(1)
    first = augmentation(x, generator(5))
    torch.manual_seed(2)
    assert torch.equal(augmentation(x, generator(5)), first)
    assert not torch.equal(augmentation(x, generator(6)), first)


def test_nothing_to_do_returns_the_images_themselves():
    x = torch.rand(2, 3, 8, 8)
    assert Augmentation()(x, generator()) is x
    assert crops_and_flips(False, 0, "edge") is None


def test_a_crop_larger_than_the_padded_image_is_refused():
    with pytest.raises(ValueError, match="can not crop 13 pixels from 8 padded by 2"):
        Augmentation(crop_padding=2, crop_size=13)(torch.rand(1, 1, 8, 8), generator())


@pytest.mark.parametrize("fields", [{"crop_padding": -1}, {"crop_size": 0}, {"padding_mode": "reflect"}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValueError):
        Augmentation(**fields)
