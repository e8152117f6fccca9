"""Extra images at a fixed share of every mini-batch, and long-tailed subsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robust.data.extra import MixedImages
from robust.data.long_tail import BalancedImages, tail
from robust.dataset import DATASETS, parse_dataset
from robust.images import MemoryImages
from robust.run_setup import CHECKPOINT
from robust.trainer import train
from tests.robust.runs import records, tiny


def numbered(count: int, start: int) -> MemoryImages:
    """Images whose every pixel is their number / 255."""
    pixels = torch.arange(start, start + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return MemoryImages(pixels, torch.arange(count) % 3)


@pytest.mark.parametrize("count, batch, fraction, own", [(10, 5, 0.4, 3), (9, 10, 0.7, 3), (12, 4, 0.5, 2)])
def test_every_mini_batch_holds_its_share_and_an_epoch_passes_over_the_own_images_once(count, batch, fraction, own):
    images = MixedImages(numbered(count, 0), numbered(50, 100), fraction)
    order = images.epoch(batch, torch.Generator().manual_seed(0))
    assert len(order) == images.epoch_size(batch)
    mine = [part[part < count] for part in order.split(batch)]
    assert sorted(torch.cat(mine).tolist()) == list(range(count))
    assert all(len(part) == own for part in mine[:-1])
    assert all(int((part >= count).sum()) == batch - own for part in order.split(batch))
    assert not torch.equal(order, images.epoch(batch, torch.Generator().manual_seed(1)))


def test_a_batch_keeps_the_order_and_the_labels_of_both_sources():
    images = MixedImages(numbered(4, 0), numbered(5, 100), 0.5)
    x, y = images.batch(torch.tensor([5, 0, 4, 3, 8]))
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [101, 0, 100, 3, 104]
    assert torch.equal(y, images.labels[[5, 0, 4, 3, 8]])
    x, _ = images.subset(torch.tensor([1, 6])).batch(torch.tensor([0, 1]))
    assert (255 * x[:, 0, 0, 0]).round().tolist() == [1, 102]


def test_validation_images_are_held_out_of_the_own_images_alone():
    kept, held_out = MixedImages(numbered(30, 0), numbered(20, 100), 0.5).split(0.2, 0)
    assert len(held_out) == 6 and float(held_out.batch(torch.arange(6))[0].max()) < 100 / 255
    assert len(kept) == 24 + 20


def archive(path: Path, side: int = 8, label: int = 9) -> Path:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (40, side, side), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=np.full(40, label), x_test=x[:2], y_test=np.zeros(2, int))
    return path


def test_a_run_on_extra_images_takes_as_many_steps_as_its_own_images_need(tmp_path: Path):
    text = f"extra:own=(digits),extra=(npz:path={archive(tmp_path / 'more.npz')}),fraction=0.5"
    assert parse_dataset(DATASETS.spell(parse_dataset(text))) == parse_dataset(text)
    train(tiny(data=text, epochs=1, batch_size=500), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / CHECKPOINT).exists()
    assert records(tmp_path / "run")[-1]["step"] == -(-1293 // 250)


@pytest.mark.parametrize(
    "side, label, fraction, message",
    [
        (6, 9, 0.5, r"extra: images are \(1, 6, 6\), but those of digits are \(1, 8, 8\)"),
        (8, 10, 0.5, r"extra: label 10, but digits has 10 classes, from 0"),
        (8, 9, 1.5, r"fraction=1.5: expected a share of the mini-batch between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(side, label, fraction, message, tmp_path: Path):
    file = archive(tmp_path / "more.npz", side, label)
    with pytest.raises(ValueError, match=message):
        parse_dataset(f"extra:own=(digits),extra=(npz:path={file}),fraction={fraction}")(None)


def test_a_mini_batch_too_small_for_its_share_is_refused():
    images = MixedImages(numbered(4, 0), numbered(5, 100), 0.9)
    with pytest.raises(ValueError, match=r"a mini-batch of 4 can not hold 0\.9 of extra images"):
        images.epoch_size(4)


def test_class_sizes_fall_by_the_ratio_and_the_test_images_stay():
    labels = torch.arange(1000) % 10
    sizes = torch.bincount(labels[tail(labels, 10, 50.0, 0)], minlength=10).tolist()
    assert sizes == [int(100 * 50 ** (-k / 9)) for k in range(10)] and sizes[0] == 100 and sizes[-1] == 2
    data = parse_dataset("long_tail:data=(digits),ratio=20")(None)
    whole = parse_dataset("digits")(None)
    assert len(data.test) == len(whole.test) and len(data.train) < len(whole.train)
    with pytest.raises(ValueError, match=r"ratio=0\.5: expected the largest class over the smallest"):
        parse_dataset("long_tail:ratio=0.5")


def test_a_balanced_epoch_draws_every_class_about_equally_often():
    labels = torch.cat([torch.zeros(900), torch.ones(100)]).long()
    images = BalancedImages(MemoryImages(torch.zeros(1000, 1, 1, 1), labels))
    order = images.epoch(10, torch.Generator().manual_seed(0))
    assert len(order) == 1000 and abs(int(labels[order].sum()) - 500) < 80
    kept, held_out = images.split(0.1, 0)
    assert isinstance(kept, BalancedImages) and not isinstance(held_out, BalancedImages)
