"""A user's own images in class folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from robust.dataset import MissingData, parse_dataset


def save(path, value, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def fill(folder, values, size=(6, 6)):
    for class_name, value in values.items():
        save(folder / class_name / "1.png", value, size)
        save(folder / class_name / "deeper" / "2.PNG", value + 1, size)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_class_folders_are_read_in_alphabetical_order(tmp_path, test_name):
    fill(tmp_path / "train", {"dog": 20, "cat": 10})
    fill(tmp_path / test_name, {"dog": 40})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = parse_dataset(f"folder:{tmp_path}")()
    x, y = data.train.batch(torch.arange(4))
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 6, 6)
    assert y.tolist() == [0, 0, 1, 1]
    assert (x[:, 0, 0, 0] * 255).tolist() == [10, 11, 20, 21]
    assert data.test.labels.tolist() == [1, 1]


def test_class_folders_alone_are_test_images(tmp_path):
    fill(tmp_path, {"a": 1, "b": 2})
    data = parse_dataset(f"folder:{tmp_path},channels=1,mean=0.5")()
    assert len(data.train) == 0 and len(data.test) == 4
    assert data.input_shape == (1, 6, 6) and data.mean == (0.5,) and data.std == (1.0,)


def test_a_test_folder_alone_is_enough(tmp_path):
    fill(tmp_path / "test", {"a": 1})
    data = parse_dataset(f"folder:{tmp_path}")()
    assert len(data.train) == 0 and data.classes == ("a",)


def test_a_size_makes_images_alike(tmp_path):
    fill(tmp_path, {"wide": 1}, (6, 9))
    fill(tmp_path, {"high": 2}, (12, 6))
    data = parse_dataset(f"folder:{tmp_path},size=4")()
    assert data.input_shape == (3, 4, 4)
    assert data.test.batch(torch.arange(4))[0].shape == (4, 3, 4, 4)


@pytest.mark.parametrize(
    "names", [("training", "testing"), ("Train", "Test"), ("TRAIN", "valid"), ("cat", "Validation")]
)
def test_parts_under_other_names_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        fill(tmp_path / name, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="would be read as classes; expected train/CLASS/") as refusal:
        parse_dataset(f"folder:{tmp_path}")()
    assert "\n" not in str(refusal.value) and names[1] in str(refusal.value)


def test_folders_that_are_not_as_described_are_refused(tmp_path):
    with pytest.raises(MissingData, match="there is no folder"):
        parse_dataset(f"folder:{tmp_path}/none")()
    with pytest.raises(ValueError, match="no images in class folders"):
        parse_dataset(f"folder:{tmp_path}")()
    fill(tmp_path / "train", {"a": 1})
    with pytest.raises(ValueError, match="has train but neither test nor val"):
        parse_dataset(f"folder:{tmp_path}")()
    fill(tmp_path / "test", {"b": 1})
    with pytest.raises(ValueError, match="test: b: no such class in training"):
        parse_dataset(f"folder:{tmp_path}")()
    with pytest.raises(ValueError, match="folder: size=-4: expected pixels"):
        parse_dataset(f"folder:{tmp_path},size=-4")()
    with pytest.raises(ValueError, match="channels is 1"):
        parse_dataset(f"folder:{tmp_path},channels=4")
