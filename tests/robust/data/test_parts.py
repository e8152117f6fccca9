"""Parts of a data set, and stand-ins for one that is not at hand."""

from __future__ import annotations

import pytest
import torch

from robust.checkpoint import load
from robust.data.stand_in import SHAPES
from robust.dataset import DATASETS, parse_dataset
from robust.run_setup import CHECKPOINT
from robust.trainer import train
from tests.robust.runs import tiny


def test_a_part_has_every_class_in_its_share_and_keeps_the_rest():
    whole, part = parse_dataset("digits")(), parse_dataset("subset:data=(digits),train=200,test=50")()
    assert (len(part.train), len(part.test)) == (200, 50)
    assert torch.bincount(part.train.labels).tolist() == pytest.approx([20] * 10, abs=2)
    assert (part.mean, part.input_shape, part.classes) == (whole.mean, whole.input_shape, whole.classes)
    assert part.name == "digits (a part)"


def test_a_part_holds_images_of_the_whole_and_no_test_images_to_train_on():
    whole, part = parse_dataset("digits")(), parse_dataset("subset:data=(digits),train=100,test=30")()
    images = {x.numpy().tobytes() for x in whole.train.batch(torch.arange(len(whole.train)))[0]}
    assert all(x.numpy().tobytes() in images for x in part.train.batch(torch.arange(100))[0])


@pytest.mark.parametrize("text", ["subset:data=(digits)", "subset:data=(digits),train=99999,test=99999"])
def test_no_count_or_too_large_a_one_keeps_everything(text):
    assert len(parse_dataset(text)().train) == 1437


@pytest.mark.parametrize("name", SHAPES)
def test_a_stand_in_has_the_shape_of_its_data_set_and_says_what_it_is(name):
    data = parse_dataset(f"stand_in:data=({name}),train=20,test=10")()
    channels, side = SHAPES[name]
    x, y = data.train.batch(torch.arange(20))
    assert x.shape == (20, channels, side, side) and data.input_shape == (channels, side, side)
    assert data.name == f"stand-in for {name} (resized digits)" and len(data.test) == 10
    assert 0.2 < float(x.mean()) < 0.4 and int(y.max()) < 10


def test_a_stand_in_takes_crops_and_constants_from_what_it_stands_for():
    data = parse_dataset("stand_in:data=(tiny_imagenet:size=56,crop_padding=0),train=20,test=10,classes=200")()
    assert data.input_shape == (3, 56, 56) and len(data.classes) == 200
    assert int(data.train.labels.max()) >= 100
    cifar = parse_dataset("stand_in:data=(cifar10:mean=0,std=1),train=20,test=10")()
    assert (cifar.mean, cifar.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_checkpoint_of_a_stand_in_says_so(tmp_path):
    text = DATASETS.spell(parse_dataset("stand_in:data=(mnist),train=40,test=20"))
    train(tiny(data=text, epochs=1, eps_schedule="constant", validation=0.0), tmp_path, progress=False)
    assert load(tmp_path / CHECKPOINT).settings["data"].startswith("stand_in:data=(mnist)")


@pytest.mark.parametrize(
    "text, message",
    [
        ("stand_in:data=(npz:path=x)", "no stand-in for 'npz'; there is one for digits, mnist"),
        ("stand_in:data=(mnist),classes=3", "expected counts of images from 0 and of classes from 10"),
        ("subset:data=(digits),train=-1", "expected counts of images from 0"),
    ],
)
def test_what_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_dataset(text)
