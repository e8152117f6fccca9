"""The embedded digits."""

import torch

from robust.dataset import parse_dataset

DIGITS = parse_dataset("digits")()


def everything(images):
    return images.batch(torch.arange(len(images)))


def test_digits_are_1437_training_and_360_test_images():
    assert (len(DIGITS.train), len(DIGITS.test)) == (1437, 360)
    x, y = everything(DIGITS.test)
    assert x.shape == (360, *DIGITS.input_shape) and y.shape == (360,)
    assert DIGITS.classes == tuple("0123456789") and DIGITS.augmentation is None


def test_every_class_gives_a_fifth_of_its_images_to_the_test():
    train, test = (torch.bincount(part.labels, minlength=10) for part in (DIGITS.train, DIGITS.test))
    assert ((test - (train + test) / 5).abs() <= 1).all()


def test_both_parts_together_are_scikit_learns_digits():
    from sklearn.datasets import load_digits

    stored = load_digits()
    expected = sorted((*row, label) for row, label in zip(stored.data.tolist(), stored.target.tolist(), strict=True))
    found = []
    for part in (DIGITS.train, DIGITS.test):
        x, y = everything(part)
        grey = (x * 16).round().flatten(1)
        # 16 grey levels survive the way through 256 of them.
        assert (x * 16 - (x * 16).round()).abs().max() < 16 * 0.5 / 255 + 1e-6
        found += [(*row, label) for row, label in zip(grey.tolist(), y.tolist(), strict=True)]
    assert sorted(found) == expected


def test_black_and_white_are_exact():
    x, _ = everything(DIGITS.train)
    assert x.min() == 0 and x.max() == 1


def test_constants_are_those_of_the_training_images():
    x, _ = everything(DIGITS.train)
    assert abs(x.mean() - DIGITS.mean[0]) < 5e-5 and abs(x.std() - DIGITS.std[0]) < 5e-5


def test_the_split_never_changes():
    x, y = everything(DIGITS.test)
    assert y[:12].tolist() == [0, 2, 4, 7, 1, 6, 8, 9, 5, 3, 0, 2]
    assert (x.double() * 255).sum().round() == 1_782_171


def test_validation_is_taken_from_training_alone():
    part = DIGITS.split(0.1, seed=0)
    assert (len(part.train), len(part.test)) == (1293, 144)
    parts = torch.cat([everything(part.train)[0], everything(part.test)[0]])
    assert sorted(parts.flatten(1).tolist()) == sorted(everything(DIGITS.train)[0].flatten(1).tolist())
    assert part.classes == DIGITS.classes and part.input_shape == DIGITS.input_shape
