"""The authors' interface of AutoAttack: the same points as the attack, on any batch size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from attacks import LinfBall, StandardEvaluation


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).train()
    x = torch.rand(24, 1, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    return model, x, y


def short(model, **options) -> StandardEvaluation:
    adversary = StandardEvaluation(model, eps=0.2, **options)
    adversary.attack = dataclasses.replace(adversary.attack, steps=5, queries=20)
    return adversary


def test_it_gives_the_attacks_points_their_classes_and_the_accuracy(problem, capsys):
    model, x, y = problem
    adversary = short(model)
    points, classes = adversary.run_standard_evaluation(x, y, bs=7, return_labels=True)
    expected = adversary.attack(model, x, y, LinfBall(0.2))
    torch.testing.assert_close(points, expected, atol=1e-5, rtol=0)
    assert torch.equal(classes, model(points).argmax(1)) and torch.equal(points[0], x[0]) and model.training
    right = 100 * float((classes == y).double().mean())
    assert 10 < right < 90 and capsys.readouterr().out == f"robust accuracy under all attacks: {right:.2f} %\n"
    torch.testing.assert_close(short(model, verbose=False).run_standard_evaluation(x, y), expected, atol=1e-5, rtol=0)
    assert capsys.readouterr().out == ""


def test_every_attack_by_itself_sees_all_examples(problem, capsys):
    model, x, y = problem
    found = short(model, norm="L2", version="standard").run_standard_evaluation_individual(x, y)
    assert list(found) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert all(points.shape == x.shape and not torch.equal(points[1:], x[1:]) for points in found.values())
    assert capsys.readouterr().out.count("robust accuracy under") == 4


def test_what_it_does_not_do_is_refused(problem):
    model, x, y = problem
    with pytest.raises(ValueError, match="norm='linf': expected one of Linf, L2, L1"):
        StandardEvaluation(model, norm="linf")
    with pytest.raises(ValueError, match="version='custom': expected standard, plus or rand"):
        StandardEvaluation(model, version="custom")
    with pytest.raises(ValueError, match=r"state_path='a\.json': not kept here; `robust attack` writes"):
        StandardEvaluation(model).run_standard_evaluation(x, y, state_path="a.json")
