"""Carlini and Wagner's attack: pixels at the border move, and the search for c ends near the smallest move."""

from __future__ import annotations

import torch

from attacks import ATTACKS, L2Ball


def test_pixels_at_zero_and_one_can_move():
    x = torch.tensor([[0.0, 1.0, 0.0]])
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])

    def model(x):
        return x @ weight + torch.tensor([0.0, 0.8])

    # Long enough to leave the flat ends of tanh: a tenth of the steps must show progress.
    attack = ATTACKS.parse("carlini_wagner:steps=2000,searches=2,weight=1")
    found = attack.nearest(model, x, torch.tensor([1]), L2Ball(1.0))
    assert (found.points != x).all() and (model(found.points).argmax(1) == 0).all()
    # The gap of 2.8 in the logits closes at a distance of 2.8 / |2 w| = 2.8 / (2 sqrt(3)).
    assert 0.808 <= found.distances.item() < 0.85


def test_more_searches_never_find_a_longer_move(small_net, examples):
    net, x = small_net(), examples(8)
    y = net(x).argmax(1)
    before = torch.full((8,), torch.inf, dtype=torch.float64)
    for searches in (1, 3, 5):
        attack = ATTACKS.parse(f"carlini_wagner:steps=60,weight=0.1,searches={searches}")
        distances = attack.nearest(net, x, y, L2Ball(1.0)).distances
        assert (distances <= before).all()
        before = distances
    assert before.isfinite().sum() >= 6
