"""BETA: every target is searched, and the worst one wins."""

from __future__ import annotations

import torch

from attacks import ATTACKS, LinfBall
from attacks.losses import margin, targeted_margin


def test_the_point_is_that_of_the_target_with_the_largest_margin(small_net, examples):
    net, x = small_net(), examples(12)
    y = net(x).argmax(1)
    attack, ball = ATTACKS.parse("beta:steps=10"), LinfBall(0.1)
    points, margins = attack.candidates(net, x, y, ball)
    assert points.shape == (12, 3, *x.shape[1:]) and margins.shape == (12, 3)
    targets = net(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :3]
    for rank in range(3):
        value = targeted_margin(net(points[:, rank]), y, targets[:, rank])
        torch.testing.assert_close(value, margins[:, rank], atol=1e-4, rtol=1e-4)
        assert ball.contains(points[:, rank], x).all()
    chosen = attack(net, x, y, ball)
    assert torch.equal(chosen, points[torch.arange(12), margins.argmax(1)])
    assert (margin(net(chosen), y) >= margins.amax(1) - 1e-4).all()


def test_the_width_of_a_pass_plays_no_part(small_net, examples):
    net, x = small_net(), examples(6)
    y = net(x).argmax(1)
    whole = ATTACKS.parse("beta:steps=5")(net, x, y, LinfBall(0.1))
    parts = ATTACKS.parse("beta:steps=5,rows=6")(net, x, y, LinfBall(0.1))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_it_is_as_strong_as_projected_ascent_on_every_margin(small_net, examples):
    net, x = small_net(), examples(60)
    y = net(x).argmax(1)
    ball = LinfBall(0.05)
    robust = [
        (net(ATTACKS.parse(text)(net, x, y, ball)).argmax(1) == y).sum().item() for text in ("beta", "margin_pgd")
    ]
    assert 0 < robust[1] < 60 and robust[0] <= robust[1] + 2
