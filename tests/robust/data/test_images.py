"""Images in memory, in files, and deferred: batches, subsets, splits and crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from robust.images import Decoder, DeferredImages, FileImages, MemoryImages, stratified_split, to_unit_range


def pixels_of(n=12, channels=3, height=6, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["memory", "files", "deferred"])
def images(request, tmp_path):
    pixels, labels = pixels_of(), torch.arange(12) % 3
    if request.param == "memory":
        return MemoryImages(pixels, labels)
    if request.param == "deferred":
        return DeferredImages(lambda: MemoryImages(pixels, labels))
    files = [tmp_path / f"{i:02}.png" for i in range(12)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return FileImages(files, labels, Decoder())


def test_a_batch_has_the_asked_images_in_the_asked_order(images):
    index = torch.tensor([7, 0, 7])
    x, y = images.batch(index)
    assert torch.equal(x, pixels_of()[index].float() / 255)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and y.tolist() == [1, 0, 1]


def test_a_subset_counts_from_zero_again(images):
    part = images.subset(torch.tensor([5, 3, 1]))
    assert len(images) == 12 and len(part) == 3
    assert part.labels.tolist() == [2, 0, 1]
    assert torch.equal(part.batch(torch.tensor([1]))[0], images.batch(torch.tensor([3]))[0])


def test_a_central_crop_drops_the_same_margin_everywhere(images):
    x, y = images.center_crop(4).batch(torch.arange(12))
    assert torch.equal(x, pixels_of()[:, :, 1:5, 1:5].float() / 255)
    assert torch.equal(y, images.labels)


def test_keeping_images_on_a_device_changes_nothing_else(images):
    kept = images.to("cpu")
    index = torch.tensor([4, 2])
    assert torch.equal(kept.batch(index)[0], images.batch(index)[0])
    assert torch.equal(kept.labels, images.labels)


def test_a_split_keeps_every_image_once(images):
    train, validation = images.split(0.25, seed=1)
    both = torch.cat([train.batch(torch.arange(9))[0], validation.batch(torch.arange(3))[0]])
    assert len(train) == 9 and len(validation) == 3
    assert {image.numpy().tobytes() for image in both} == {
        image.numpy().tobytes() for image in images.batch(torch.arange(12))[0]
    }
    assert validation.labels.sort().values.tolist() == [0, 1, 2]


def test_deferred_images_are_loaded_once_and_late():
    calls = []

    def load():
        calls.append(1)
        return MemoryImages(pixels_of(), torch.arange(12))

    images = DeferredImages(load)
    cropped = images.center_crop(2)
    assert not calls
    assert len(images) == 12 and cropped.batch(torch.tensor([0]))[0].shape == (1, 3, 2, 2)
    assert calls == [1]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.29, 1 / 3, 0.7])
def test_a_split_is_exact_in_total_and_fair_to_every_class(fraction):
    labels = torch.tensor([0] * 100 + [1] * 57 + [2] * 3 + [5] * 40)[torch.randperm(200, generator=torch.Generator())]
    kept, held = stratified_split(labels, fraction, seed=3)
    assert len(held) == round(fraction * 200)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(200))
    assert torch.equal(kept, kept.sort().values) and torch.equal(held, held.sort().values)
    for label in (0, 1, 2, 5):
        share = fraction * (labels == label).sum()
        assert abs((labels[held] == label).sum() - share) <= 1


def test_the_seed_decides_which_images_are_held_out():
    labels = torch.zeros(1000, dtype=torch.int64)
    first, again, other = (stratified_split(labels, 0.1, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.float().mean() == pytest.approx(500, abs=100)  # from everywhere, not from one end


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(torch.zeros(10, dtype=torch.int64), fraction, seed=0)


def test_bytes_become_the_nearest_floats_of_their_fractions():
    values = torch.arange(256, dtype=torch.uint8)
    exact = np.arange(256, dtype=np.float64) / 255
    assert np.array_equal(to_unit_range(values).numpy(), exact.astype(np.float32))


def test_floats_are_left_alone():
    values = torch.rand(5)
    assert torch.equal(to_unit_range(values), values)


def test_counts_that_differ_are_refused():
    with pytest.raises(ValueError, match="and 3"):
        MemoryImages(pixels_of(), torch.arange(3))
    with pytest.raises(ValueError, match="0 files, but 3 labels"):
        FileImages([], torch.arange(3), Decoder())


def save(path, array):
    Image.fromarray(array).save(path)
    return path


def test_decoding_converts_between_grey_and_colour(tmp_path):
    grey = save(tmp_path / "grey.png", np.full((2, 3), 7, np.uint8))
    assert torch.equal(Decoder(channels=3)(grey), torch.full((3, 2, 3), 7, dtype=torch.uint8))
    assert torch.equal(Decoder(channels=1)(grey), torch.full((1, 2, 3), 7, dtype=torch.uint8))


def test_the_shorter_side_is_scaled_before_the_crop(tmp_path):
    left_dark = np.repeat(np.array([0, 200, 200, 0], np.uint8), 10)[None].repeat(20, 0)
    file = save(tmp_path / "wide.png", left_dark)
    assert Decoder(channels=1, resize=10)(file).shape == (1, 10, 20)
    assert torch.equal(Decoder(channels=1, crop=20)(file), torch.full((1, 20, 20), 200, dtype=torch.uint8))


def test_pixels_of_more_than_eight_bits_are_refused(tmp_path):
    file = save(tmp_path / "deep.png", np.full((2, 2), 300, np.uint16))
    with pytest.raises(ValueError, match=r"deep.png: pixels have more than 8 bits"):
        Decoder(channels=1)(file)


def test_an_image_smaller_than_the_crop_is_refused(tmp_path):
    file = save(tmp_path / "small.png", np.zeros((4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"small.png: 3x4 is smaller than the crop of 4"):
        Decoder(crop=4)(file)
    with pytest.raises(ValueError, match="can not crop 7 pixels from 6"):
        MemoryImages(pixels_of(), torch.arange(12)).center_crop(7)


def test_files_of_different_sizes_are_refused_by_name(tmp_path):
    files = [save(tmp_path / f"{side}.png", np.zeros((side, side), np.uint8)) for side in (3, 4)]
    images = FileImages(files, torch.zeros(2, dtype=torch.int64), Decoder())
    with pytest.raises(ValueError, match=r"images differ in size \(3x3 and 4x4\): .*3.png, .*4.png"):
        images.batch(torch.arange(2))
