"""Data sets read through torchvision, on small files in its formats, and on the real ones where they are."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robust.augmentation import Augmentation
from robust.dataset import MissingData, parse_dataset

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1], dtype=np.uint8)


def write_idx(path, array):
    """The format of the MNIST files: type and rank, sizes as big-endian words, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(params=[("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")], ids=lambda names: names[0])
def grey(request, tmp_path):
    name, folder = request.param
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 3)):
        write_idx(raw / f"{part}-images-idx3-ubyte", IMAGES[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", LABELS[:count])
    return name, tmp_path


def test_idx_files_are_read(grey):
    name, root = grey
    data = parse_dataset(name)(root)
    x, y = data.train.batch(torch.arange(4))
    assert np.array_equal(x[:, 0].numpy(), IMAGES.astype(np.float32) / np.float32(255))
    assert y.tolist() == LABELS.tolist() and len(data.test) == 3
    assert data.name == name and data.input_shape == (1, 28, 28) and len(data.classes) == 10
    assert data.augmentation is None


def test_the_environment_names_the_root(grey, monkeypatch):
    name, root = grey
    monkeypatch.setenv("ROBUST_DATA", str(root))
    assert len(parse_dataset(name)().train) == 4


def test_mnist_without_normalisation_is_a_matter_of_two_fields(grey):
    name, root = grey
    data = parse_dataset(f"{name}:mean=0,std=1")(root)
    assert (data.mean, data.std) == ((0.0,), (1.0,))


def test_svhn_matrices_are_read_with_zero_as_zero(tmp_path):
    from scipy.io import savemat

    pixels = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [9], [2], [10]], np.uint8)})
    # The files are checked by MD5, so the loader gets ones that pass and this test looks at the arrays alone.
    import torchvision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
        data = parse_dataset("svhn")(tmp_path)
    x, y = data.train.batch(torch.arange(5))
    assert y.tolist() == [0, 1, 9, 2, 0]
    assert np.array_equal(x.numpy(), pixels.transpose(3, 2, 0, 1).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    "name, looked_for",
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
    ],
)
def test_missing_files_are_answered_with_where_and_how(tmp_path, name, looked_for):
    with pytest.raises(MissingData) as caught:
        parse_dataset(name)(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / looked_for) in message
    assert "ROBUST_DATA" in message and f"{name}:download=true" in message and "\n" not in message


def test_cifar10_prefers_an_archive_of_arrays(tmp_path):
    x = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=[5, 0, 9], x_test=x[:2], y_test=[5, 0])
    data = parse_dataset("cifar10:crop_padding=4,padding_mode=constant")(tmp_path)
    images, labels = data.train.batch(torch.arange(3))
    assert np.array_equal(images.numpy(), x.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert labels.tolist() == [5, 0, 9] and len(data.test) == 2
    assert data.classes[5] == "dog" and data.name == "cifar10"
    assert data.augmentation == Augmentation(flip=True, crop_padding=4, padding_mode="constant")


def test_a_torchvision_of_another_build_is_answered_with_what_to_install(tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"nms does not exist\); install its matching build: pip install") as caught:
        parse_dataset("mnist")(tmp_path)
    assert "\n" not in str(caught.value)


def real(name, marker):
    root = os.environ.get("ROBUST_DATA")
    if not root or not (Path(root) / marker).exists():
        pytest.skip(f"real {name} is not there: set ROBUST_DATA to the folder that has {marker}")
    return parse_dataset(name)(Path(root))


def test_real_mnist_has_its_known_mean_and_deviation():
    data = real("mnist", "MNIST/raw/train-images-idx3-ubyte")
    x, y = data.train.batch(torch.arange(60_000))
    assert len(data.test) == 10_000 and y[:5].tolist() == [5, 0, 4, 1, 9]
    assert x.mean().item() == pytest.approx(0.1307, abs=1e-4) and x.std().item() == pytest.approx(0.3081, abs=1e-4)


def test_real_cifar10_has_its_known_means_and_balance():
    data = real("cifar10", "cifar10.npz")
    x, y = data.train.batch(torch.arange(50_000))
    assert torch.bincount(y).tolist() == [5000] * 10 and data.test.labels.bincount().tolist() == [1000] * 10
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(list(data.mean), abs=1e-4)
