"""Stored points of other networks: pairs in every mini-batch, and the way from a checkpoint to a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from robust.data.transferred import PairedImages
from robust.dataset import MissingData, parse_dataset
from robust.images import MemoryImages
from robust.run_setup import CHECKPOINT
from robust.trainer import train
from robust.transfer import stored_points
from tests.robust.runs import REPOSITORY, tiny


def numbered(count: int, start: int) -> torch.Tensor:
    """Images whose every pixel is their number."""
    return torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def paired(count: int = 10) -> PairedImages:
    own = MemoryImages(numbered(count, 0), torch.arange(count) % 3)
    return PairedImages(own, [numbered(count, 100), numbered(count, 200)])


def test_every_mini_batch_holds_images_and_one_stored_point_of_each():
    images = paired()
    order = images.epoch(4, torch.Generator().manual_seed(0))
    assert len(order) == images.epoch_size(4) == 20
    assert sorted(order[order < 10].tolist()) == list(range(10))
    kinds = set()
    for part in order.split(4):
        x, y = images.batch(part)
        first, second = (255 * x[:, 0, 0, 0]).round().int().view(2, -1)
        assert torch.equal(y[: len(first)], y[len(first) :])
        assert torch.equal(first % 100, second % 100) and (first < 100).all() and (second >= 100).all()
        kinds |= set((second // 100).tolist())
    assert kinds == {1, 2}
    with pytest.raises(ValueError, match="a mini-batch of 5 holds no pairs"):
        images.epoch(5, torch.Generator())


def test_held_out_images_take_their_points_along_and_are_judged_clean():
    kept, held_out = paired().split(0.3, 0)
    assert isinstance(kept, PairedImages) and isinstance(held_out, MemoryImages) and len(kept) == 7
    for number in range(len(kept)):
        x, _ = kept.batch(torch.tensor([number, number + 7, number + 14]))
        image, first, second = (255 * x[:, 0, 0, 0]).round().tolist()
        assert (first, second) == (image + 100, image + 200)
    assert kept.center_crop(2).batch(torch.tensor([8]))[0].shape == (1, 1, 2, 2)


def test_stored_points_stay_in_the_ball_differ_and_fool_their_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    pixels = torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(pixels / 255).argmax(1)
    images = MemoryImages(pixels, labels)
    points = stored_points(model, images, LinfBall(40 / 255), PGD(steps=3, step_size=0.4, keep="last"), 2, batch_size=7)
    assert points.shape == (2, *pixels.shape) and not torch.equal(*points)
    assert int((points.int() - pixels.int()).abs().max()) == 40
    with torch.no_grad():
        fooled = [(model(some / 255).argmax(1) != labels).double().mean() for some in points]
    assert min(fooled) > 0.2


def test_from_a_checkpoint_to_a_run_on_its_points(tmp_path: Path):
    train(tiny(epochs=1), tmp_path / "public", progress=False)
    file = tmp_path / "points.npz"
    script = [sys.executable, str(REPOSITORY / "scripts/transfer_points.py"), str(tmp_path / "public" / CHECKPOINT)]
    subprocess.run(
        [*script, "--out", str(file), "--copies", "1", "--attack", "fgsm"],
        check=True,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    data = f"transferred:points={file},data=(digits)"
    images = parse_dataset(data)(None).train
    x, _ = images.batch(torch.tensor([0, 1437]))
    assert float((x[0] - x[1]).abs().max()) == pytest.approx(25 / 255, abs=1 / 255)
    train(tiny(data=data, objective="natural", epochs=1), tmp_path / "run", progress=False)


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="transferred needs files of stored points"):
        parse_dataset("transferred:points=")
    with pytest.raises(MissingData, match=r"there is no file .*none\.npz"):
        parse_dataset("transferred:points=none.npz")(None)
    np.savez(tmp_path / "other.npz", points=np.zeros((1, 5, 1, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"points \[copies, 5, 1, 8, 8\] for the training images \[1437, 1, 8, 8\]"):
        parse_dataset(f"transferred:points={tmp_path / 'other.npz'}")(None)
    np.savez(tmp_path / "floats.npz", points=np.zeros((1, 5, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"points must be uint8 \[copies, N, C, H, W\], got float32"):
        parse_dataset(f"transferred:points={tmp_path / 'floats.npz'}")(None)
    np.savez(tmp_path / "no.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected an \.npz archive with an array `points`"):
        parse_dataset(f"transferred:points={tmp_path / 'no.npz'}")(None)
