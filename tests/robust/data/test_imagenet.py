"""ImageNet and its small versions, on small copies of their layouts."""

import numpy as np
import pytest
import torch
from PIL import Image

from robust.augmentation import Augmentation
from robust.dataset import MissingData, parse_dataset

WNIDS = ("n01443537", "n01629819")


def save(path, value, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        save(folder / "train" / wnid / "images" / f"{wnid}_0.png", 10 * label, (64, 64))
    return folder


def annotated(folder):
    save(folder / "val" / "images" / "val_0.png", 3, (64, 64))
    save(folder / "val" / "images" / "val_1.png", 4, (64, 64))
    (folder / "val" / "val_annotations.txt").write_text(
        f"val_0.png\t{WNIDS[1]}\t0\t0\t62\t63\nval_1.png\t{WNIDS[0]}\t0\t0\t1\t1\n"
    )


def sorted_into_classes(folder):
    save(folder / "val" / WNIDS[0] / "val_1.png", 4, (64, 64))
    save(folder / "val" / WNIDS[1] / "val_0.png", 3, (64, 64))


@pytest.mark.parametrize("layout", [annotated, sorted_into_classes])
def test_tiny_imagenet_is_read_in_both_layouts_of_its_validation_part(tiny, layout):
    layout(tiny)
    data = parse_dataset("tiny_imagenet")(tiny.parent)
    x, y = data.test.batch(torch.arange(2))
    labels = {round(image[0, 0, 0].item() * 255): label for image, label in zip(x, y.tolist(), strict=True)}
    assert labels == {3: 1, 4: 0}
    assert data.classes == WNIDS and data.input_shape == (3, 64, 64)
    assert data.train.labels.tolist() == [0, 1]
    assert data.augmentation == Augmentation(flip=True, crop_padding=4, padding_mode="edge")


def test_tiny_imagenet_left_over_annotations_are_ignored_once_the_images_are_sorted(tiny):
    annotated(tiny)
    for file in (tiny / "val" / "images").iterdir():
        file.unlink()
    (tiny / "val" / "images").rmdir()
    sorted_into_classes(tiny)
    assert parse_dataset("tiny_imagenet")(tiny.parent).test.labels.tolist() == [0, 1]


def test_tiny_imagenet_crops_are_random_in_training_and_central_in_the_test(tiny):
    annotated(tiny)
    data = parse_dataset("tiny_imagenet:size=56,crop_padding=0")(tiny.parent)
    assert data.input_shape == (3, 56, 56)
    assert data.test.batch(torch.arange(2))[0].shape == (2, 3, 56, 56)
    x, _ = data.train.batch(torch.arange(2))
    assert data.augmentation(x, torch.Generator()).shape == (2, 3, 56, 56)


def test_imagenet64_batches_are_read_with_labels_from_zero(tmp_path):
    folder = tmp_path / "imagenet64"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3 * 64 * 64), dtype=np.uint8)
    for name in ("val_data", "train_data_batch_1", "train_data_batch_2"):
        np.savez(folder / f"{name}.npz", data=pixels, labels=np.array([1, 1000, 7]))
    data = parse_dataset("imagenet64")(tmp_path)
    x, y = data.test.batch(torch.arange(3))
    assert y.tolist() == [0, 999, 6] and len(data.classes) == 1000
    assert np.array_equal(x.flatten(1).numpy(), pixels.astype(np.float32) / np.float32(255))
    assert len(data.train) == 6

    np.savez(folder / "val_data.npz", data=pixels[:, :300], labels=np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"val_data.npz: data must be uint8 \[N, 12288\], got uint8 \[3, 300\]"):
        parse_dataset("imagenet64")(tmp_path)


def test_imagenet_is_scaled_and_cropped(tmp_path):
    for part in ("train", "val"):
        save(tmp_path / "imagenet" / part / WNIDS[0] / "a.JPEG", 5, (40, 60))
    data = parse_dataset("imagenet:size=24,resize=32")(tmp_path)
    assert data.test.batch(torch.tensor([0]))[0].shape == (1, 3, 24, 24)
    x, _ = data.train.batch(torch.tensor([0]))
    assert x.shape == (1, 3, 32, 32)
    assert data.augmentation(x, torch.Generator()).shape == (1, 3, 24, 24) and data.input_shape == (3, 24, 24)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet64", "imagenet"])
def test_missing_folders_are_answered_with_where(tmp_path, name):
    with pytest.raises(MissingData, match=f"{name}: there is no {tmp_path}.*ROBUST_DATA"):
        parse_dataset(name)(tmp_path)
