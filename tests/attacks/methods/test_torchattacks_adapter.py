"""The adapter to the torchattacks package: what it gives, what it refuses, and that nothing of the caller's changes."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from attacks import ATTACKS, L2Ball, LinfBall

torchattacks = pytest.importorskip("torchattacks", reason="the extra [torchattacks] is not installed")


def net_and_points(small_net, examples):
    net, x = small_net(), examples(12)
    y = net(x).argmax(1)
    y[-1] = (y[-1] + 1) % 4
    return net, x, y


@pytest.mark.parametrize(
    "text, ball",
    [
        ("name=FGSM", LinfBall(0.1)),
        ("name=PGD,options=steps=5", LinfBall(0.1)),
        ("name=VMIFGSM,options=steps=3+N=2", LinfBall(0.1)),
        ("name=PGDL2", L2Ball(0.3)),
        ("name=APGD,options=steps=10", L2Ball(0.3)),
        ("name=CW,options=steps=10+c=5", L2Ball(0.5)),
        ("name=OnePixel,options=steps=2+popsize=4", LinfBall(0.3)),
        ("name=Square,options=n_queries=20", LinfBall(0.1)),
        ("name=PGD,targeted=true", LinfBall(0.1)),
    ],
)
def test_points_are_inside_the_ball_and_noise_is_private(text, ball, small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    attack = ATTACKS.parse(f"torchattacks:{text}")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # noqa: NPY002
    points = attack(net, x, y, ball)
    assert ball.contains(points, x).all() and torch.equal(points[-1], x[-1])
    assert torch.equal(points, attack(net, x, y, ball))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == numpy.random.get_state()[1].tolist()  # noqa: NPY002


def test_it_is_the_packages_attack(small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    ours = ATTACKS.parse("torchattacks:name=MIFGSM,options=steps=7+alpha=0.01")(net, x[:-1], y[:-1], LinfBall(0.05))
    theirs = torchattacks.MIFGSM(net, eps=0.05, alpha=0.01, steps=7)(x[:-1], y[:-1])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_mistake_is_answered_in_one_line(small_net, examples):
    net, x, y = net_and_points(small_net, examples)
    for text, message in (
        ("name=Nothing", "torchattacks has no attack named 'Nothing'; known: APGD, "),
        ("name=AutoAttack", "torchattacks' AutoAttack runs APGD and FAB for 10 instead of 100 steps; use autoattack"),
        ("name=PGD,options=stepz=3", "torchattacks' PGD has no parameter 'stepz'; it has: eps, alpha, steps"),
        ("name=PGD,options=random_start=1", "torchattacks' PGD, random_start: expected true or false, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            ATTACKS.parse(f"torchattacks:{text}")(net, x, y, LinfBall(0.1))
    with pytest.raises(ValueError, match="torchattacks' PGD searches linf, and the ball is l2"):
        ATTACKS.parse("torchattacks:name=PGD")(net, x, y, L2Ball(0.1))
