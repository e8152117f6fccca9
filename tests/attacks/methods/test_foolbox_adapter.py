"""The adapter to the Foolbox package, both ways."""

from __future__ import annotations

import warnings

import pytest
import torch

from attacks import ATTACKS, PGD, L2Ball, LinfBall, as_foolbox_attack
from attacks.losses import misclassified

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    foolbox = pytest.importorskip("foolbox", reason="the extra [foolbox] is not installed")


def net_and_points(small_net, examples):
    net, x = small_net().eval(), examples(12)
    y = net(x).argmax(1)
    y[-1] = (y[-1] + 1) % 4
    return net, x, y


@pytest.mark.parametrize(
    "text, ball",
    [
        ("name=LinfProjectedGradientDescent,options=steps=5", LinfBall(0.1)),
        ("name=LinfFastGradient", LinfBall(0.1)),
        ("name=DDN,options=steps=10", L2Ball(0.5)),
        ("name=L2FMN,options=steps=10", L2Ball(0.5)),
        ("name=L2AdditiveGaussianNoise", L2Ball(0.5)),
    ],
)
def test_points_are_inside_the_ball_and_noise_is_private(text, ball, small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    attack = ATTACKS.parse(f"foolbox:{text}")
    before = torch.get_rng_state()
    points = attack(net, x, y, ball)
    assert ball.contains(points, x).all() and torch.equal(points[-1], x[-1])
    assert torch.equal(points, attack(net, x, y, ball))
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_the_packages_attack_and_the_model_is_one_of_the_package(small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    text = "foolbox:name=LinfProjectedGradientDescent,options=steps=7+random_start=false"
    ours = ATTACKS.parse(text)(net, x[:-1], y[:-1], LinfBall(0.05))
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(steps=7, random_start=False)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    _, theirs, fooled = attack(model, x[:-1], y[:-1], epsilons=0.05)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(fooled, misclassified(net(theirs), y[:-1]))


def test_an_attack_of_ours_serves_code_written_for_the_package(small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = as_foolbox_attack(PGD(steps=5), "linf")
    points, clipped, success = attack(model, x, foolbox.criteria.Misclassification(y), epsilons=[0.05, 0.2])
    assert success.shape == (2, 12) and clipped is points
    for found, eps, fooled in zip(points, (0.05, 0.2), success, strict=True):
        assert foolbox.distances.linf(x, found).max() <= eps
        assert torch.equal(fooled, misclassified(net(found), y))
    one = attack(model, x, y, epsilons=0.05)
    assert torch.equal(one[0], points[0]) and torch.equal(one[2], success[0])


def test_a_mistake_is_answered_in_one_line(small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    for text, message in (
        ("name=Nothing", "foolbox has no attack named 'Nothing'; known: BinarizationRefinement, "),
        ("name=DDN,options=stepz=3", "foolbox's DDN has no parameter 'stepz'; it has: init_epsilon, steps, gamma"),
        ("name=Spatial", "foolbox's Spatial has no norm of linf, l2, l1"),
        ("name=Dataset", "foolbox's Dataset has no norm of linf, l2, l1"),
    ):
        with pytest.raises(ValueError, match=message):
            ATTACKS.parse(f"foolbox:{text}")(net, x, y, LinfBall(0.1))
    with pytest.raises(ValueError, match="foolbox's DDN searches l2, and the ball is linf"):
        ATTACKS.parse("foolbox:name=DDN")(net, x, y, LinfBall(0.1))
