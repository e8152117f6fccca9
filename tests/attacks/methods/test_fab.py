"""FAB: one step by hand, early stops, and distances for every radius."""

from __future__ import annotations

import pytest
import torch

from attacks import ATTACKS, FAB, LinfBall, make_ball
from attacks.ascent import Task
from attacks.methods.fab import Path
from attacks.nearest import nearest_boundary, target_boundary


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_without_overshoot_a_step_ends_on_the_linearised_boundary_wherever_it_starts(norm):
    weight = torch.tensor([[1.0, -1.0], [2.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.6, 0.7, 0.4]], dtype=torch.float64)

    def model(x):
        return x @ weight

    task = Task(x, (torch.tensor([0]), torch.tensor([1])), make_ball(norm, 0.1))
    start = torch.tensor([[0.3, 0.4, 0.5]], dtype=torch.float64)
    for boundary in (nearest_boundary, target_boundary):
        path = Path(1, overshoot=1.0, backward=0.9, max_bias=0.1, precision="float32", stop=False)
        logits = model(path._step(model, boundary, task, start))
        assert logits[0, 0].item() == pytest.approx(logits[0, 1].item(), abs=1e-12)


def test_the_bias_pulls_towards_the_clean_point():
    # On the line z = 0.5 in two dimensions: from (0.2, 0.9) with the clean point (0.2, 0.1), L2. Both distances to the
    # line are 0.3, so the bias is capped: 0.1 of the way from (0.5, 0.9) to (0.5, 0.1).
    def model(x):
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)

    task = Task(torch.tensor([[0.2, 0.1]]), (torch.tensor([0]), torch.tensor([1])), make_ball("l2", 0.1))
    path = Path(1, overshoot=1.0, backward=0.9, max_bias=0.1, precision="float32", stop=False)
    point = path._step(model, target_boundary, task, torch.tensor([[0.2, 0.9]]))
    torch.testing.assert_close(point, torch.tensor([[0.5, 0.82]]))


def test_the_attack_stops_inside_the_ball_and_nearest_goes_on(small_net, examples):
    net, x = small_net(), examples(30)
    y = net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    ball = LinfBall(0.2)
    nearest = FAB(targets=3).nearest(net, x, y, ball)
    assert (nearest.distances[:3] == 0).all() and (net(nearest.points).argmax(1) != y).all()
    calls = []
    handle = net.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    points = FAB(targets=3)(net, x, y, ball)
    handle.remove()
    assert sum(calls) < 0.5 * 30 * 2 * 100 * 3
    assert (net(points).argmax(1) != y)[nearest.distances <= ball.eps].all() and ball.contains(points, x).all()


def test_the_scale_of_the_logits_plays_no_part(small_net, examples):
    net, x = small_net(dtype=torch.float64), examples(10, dtype=torch.float64)
    y = net(x).argmax(1)
    attack = ATTACKS.parse("fab:steps=20")
    one = attack.nearest(net, x, y, LinfBall(0.1))
    other = attack.nearest(lambda x: 1e5 * net(x), x, y, LinfBall(0.1))
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-4, atol=1e-9)
