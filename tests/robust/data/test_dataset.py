"""Text, roots and constants of data sets."""

from pathlib import Path

import pytest
import torch

from attacks.registry import UnknownName
from robust.augmentation import Augmentation
from robust.dataset import DATASETS, DataSet, constants, data_root, from_anywhere, parse_dataset
from robust.images import MemoryImages


@pytest.mark.parametrize(
    "text, spelled",
    [
        ("npz:/some/file.npz", "npz:path=/some/file.npz"),
        ("npz:path=/some/file.npz", "npz:path=/some/file.npz"),
        ("npz:odd=name.npz,flip=true", "npz:path=odd=name.npz,flip=true"),
        ("folder:../pictures,size=32", "folder:path=../pictures,size=32"),
        ("digits", "digits"),
        (" mnist ", "mnist"),
        ("mnist:download=true", "mnist:download=true"),
        ("mnist:mean=0,std=1", "mnist:mean=0.0,std=1.0"),
        ("cifar10:crop_padding=4,padding_mode=constant", "cifar10:crop_padding=4,padding_mode=constant"),
    ],
)
def test_a_path_needs_no_field_name(text, spelled):
    entry = parse_dataset(text)
    assert DATASETS.spell(entry) == spelled
    assert parse_dataset(spelled) == entry


def test_a_text_for_anywhere_has_absolute_paths_where_a_text_can_hold_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_anywhere("npz:a.npz,flip=true") == f"npz:path={tmp_path}/a.npz,flip=true"
    assert from_anywhere("subset:data=(folder:path=my images)") == f"subset:data=(folder:path={tmp_path}/my images)"
    points = f"{tmp_path}/a.npz+/b.npz"
    assert from_anywhere("transferred:points=a.npz+/b.npz") == f"transferred:points={points}"
    assert from_anywhere("cifar10") == "cifar10"
    (tmp_path / "one, two").mkdir()
    monkeypatch.chdir(tmp_path / "one, two")
    assert from_anywhere("npz:a.npz") == "npz:a.npz"


@pytest.mark.parametrize(
    "text, message",
    [
        ("mnits", "did you mean 'mnist'"),
        ("digits:size=3", "has no field 'size'"),
        ("mnist:/some/where", "expected field=value"),
        ("cifar10:padding_mode=reflect", "expected one of edge, constant"),
    ],
)
def test_mistyped_data_sets_are_answered_with_what_there_is(text, message):
    with pytest.raises(UnknownName, match=message):
        parse_dataset(text)


def test_the_root_is_the_argument_then_the_environment_then_data(monkeypatch):
    monkeypatch.setenv("ROBUST_DATA", "/from/environment")
    assert data_root("/given") == Path("/given")
    assert data_root() == Path("/from/environment")
    monkeypatch.delenv("ROBUST_DATA")
    assert data_root() == Path("data")


def test_constants_spread_over_channels():
    assert constants((), 3, default=1.0) == (1.0, 1.0, 1.0)
    assert constants((0.5,), 2, default=1.0) == (0.5, 0.5)
    assert constants((0.1, 0.2), 2, default=1.0) == (0.1, 0.2)
    with pytest.raises(ValueError, match="3 channels, but there are 2 constants"):
        constants((0.1, 0.2), 3, default=1.0)


def test_held_out_images_are_cropped_as_test_images_are():
    pixels = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, 1:7, 1:7] = 255
    images = MemoryImages(pixels, torch.arange(20) % 2)
    data = DataSet("squares", images, images, ("a", "b"), (0.0,) * 3, (1.0,) * 3, Augmentation(crop_size=6), (3, 6, 6))
    part = data.split(0.2, seed=0)
    x, _ = part.test.batch(torch.arange(4))
    assert x.shape == (4, 3, 6, 6) and (x == 1).all()
    assert part.train.batch(torch.arange(16))[0].shape == (16, 3, 8, 8)
