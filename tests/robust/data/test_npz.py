"""A user's own archive."""

import numpy as np
import pytest
import torch

from robust.dataset import MissingData, parse_dataset

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def load(tmp_path, text="", **arrays):
    np.savez(tmp_path / "mine.npz", **arrays)
    return parse_dataset(f"npz:{tmp_path}/mine.npz{text}")()


def everything(images):
    return images.batch(torch.arange(len(images)))


def test_training_and_test_arrays_are_read(tmp_path):
    data = load(tmp_path, x_train=COLOUR, y_train=LABELS, x_test=COLOUR[:2], y_test=LABELS[:2], classes=["a", "b", "c"])
    x, y = everything(data.train)
    assert np.array_equal(x.numpy(), COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert y.tolist() == LABELS.tolist()
    assert len(data.test) == 2
    assert data.name == "mine" and data.classes == ("a", "b", "c") and data.input_shape == (3, 5, 4)
    assert data.mean == (0.0,) * 3 and data.std == (1.0,) * 3 and data.augmentation is None


def test_x_and_y_alone_are_test_images(tmp_path):
    data = load(tmp_path, x=GREY, y=LABELS)
    assert len(data.train) == 0 and len(data.test) == 6
    assert data.input_shape == (1, 5, 4) and data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    "x, text",
    [
        (COLOUR, ""),
        (COLOUR.transpose(0, 3, 1, 2), ""),
        (COLOUR / 255, ""),
        ((COLOUR / np.float32(255)).astype(np.float32), ""),
        (COLOUR, ",layout=nhwc"),
        (COLOUR.transpose(0, 3, 1, 2), ",layout=nchw"),
    ],
)
def test_every_layout_and_type_gives_the_same_images(tmp_path, x, text):
    images, _ = everything(load(tmp_path, text, x=x, y=LABELS[:, None]).test)
    assert np.array_equal(images.numpy(), COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def test_fields_choose_constants_and_augmentation(tmp_path):
    data = load(tmp_path, ",mean=0.5,std=0.25,flip=true,crop_padding=1", x=COLOUR, y=LABELS)
    assert data.mean == (0.5,) * 3 and data.std == (0.25,) * 3
    assert data.augmentation.flip and data.augmentation.crop_padding == 1


WRONG = {
    "floats above 1": ({"x": GREY.astype(np.float32), "y": LABELS}, r"mine.npz: x: floats must lie in \[0, 1\], got"),
    "negative floats": ({"x": GREY / 255 - 0.5, "y": LABELS}, r"floats must lie in \[0, 1\], got \[-0.5, "),
    "nan": ({"x": np.full((6, 5, 4), np.nan), "y": LABELS}, r"floats must lie in \[0, 1\], got \[nan"),
    "whole numbers": ({"x": GREY.astype(np.int64), "y": LABELS}, "x must be uint8, or floats in .0, 1., got int64"),
    "fewer labels": ({"x": GREY, "y": LABELS[:4]}, "x has 6 images, but y has 4 labels"),
    "flat images": ({"x": GREY.reshape(6, 20), "y": LABELS}, r"x must have 3 or 4 axes .*, got \[6, 20\]"),
    "video": ({"x": COLOUR[..., None], "y": LABELS}, r"x must have 3 or 4 axes"),
    "no channel axis": ({"x": COLOUR.repeat(2, 3), "y": LABELS}, "which axis has the channels"),
    "two channel axes": ({"x": COLOUR.repeat(3, 3)[:, :3, :, :3], "y": LABELS}, "which axis has the channels"),
    "real labels": ({"x": GREY, "y": LABELS / 2}, "y must be whole numbers"),
    "one-hot labels": ({"x": GREY, "y": np.eye(6, dtype=int)}, "y must be whole numbers"),
    "negative labels": ({"x": GREY, "y": LABELS - 1}, "labels count from 0, got -1"),
    "too few names": ({"x": GREY, "y": LABELS, "classes": ["a", "b"]}, "label 2, but `classes` has 2 names"),
    "no labels": ({"x_test": GREY}, "has x_test but no y_test"),
    "no test": ({"x_train": GREY, "y_train": LABELS}, "has x_train but no x_test"),
    "other names": ({"images": GREY, "y": LABELS}, "expected x_train, .* it has images, y"),
    "both": ({"x": GREY, "y": LABELS, "x_test": GREY, "y_test": LABELS}, "or x, y alone"),
    "shapes": ({"x_train": GREY, "y_train": LABELS, "x_test": COLOUR, "y_test": LABELS}, "differ in shape"),
}


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04cut off", b"\x93NUMPY"])
def test_a_file_that_is_no_archive_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.npz: not a numpy \.npz archive") as caught:
        parse_dataset(f"npz:{tmp_path}/mine.npz")()
    assert "\n" not in str(caught.value) and "unsafely" not in str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused_in_one_line(tmp_path, case):
    arrays, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, **arrays)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingData, match=r"there is no file .*/none.npz"):
        parse_dataset(f"npz:{tmp_path}/none.npz")()


def test_files_that_are_no_archive_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", GREY)
    with pytest.raises(ValueError, match="a single array"):
        parse_dataset(f"npz:{tmp_path}/one.npy")()
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="not a numpy"):
        parse_dataset(f"npz:{tmp_path}/text.npz")()


def test_a_pickle_is_never_opened(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        load(tmp_path, x=np.array([GREY, None], dtype=object), y=LABELS)


def test_arrays_that_are_damaged_or_hold_objects_are_named_with_their_file(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x=COLOUR, y=np.array([str(label) for label in LABELS], dtype=object))
    with pytest.raises(ValueError, match=r"images\.npz: y cannot be read"):
        parse_dataset(f"npz:{path}")()
    for save in (np.savez, np.savez_compressed):
        save(path, x=COLOUR, y=LABELS)
        content = bytearray(path.read_bytes())
        content[len(content) // 4] ^= 255
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.npz: x cannot be read"):
            parse_dataset(f"npz:{path}")()
