"""Auto-PGD against a second, one-example-at-a-time transcription of the published algorithm."""

from __future__ import annotations

import pytest
import torch

from attacks.ascent import Task
from attacks.attack import ATTACKS
from attacks.auto_pgd import _Climber, _SparseClimber, checkpoints, climb, start_on_border
from attacks.losses import LOSSES, cross_entropy, dlr
from attacks.methods.apgd import APGD, APGDT
from attacks.noise import streams
from attacks.threat import L1Ball, L2Ball, LinfBall


def test_the_step_is_judged_after_the_published_iterations():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert checkpoints(1) == [1]


def plain_run(model, loss, x, y, ball, start, steps):
    """Best point and its loss for one example; keeps the whole history instead of counters."""

    def look(point):
        inputs = point.clone().requires_grad_()
        value = loss(model(inputs), y)
        return torch.autograd.grad(value.sum(), inputs)[0], value.item()

    point = before = best = start.clone()
    gradient, value = look(point)
    best_gradient, history, best_history = gradient, [value], [value]
    step, halved_before, best_before, last_mark = 2 * ball.eps, True, value, 0
    for k in range(1, steps + 1):
        a = 1.0 if k == 1 else 0.75
        move = gradient.sign() if ball.norm == "linf" else gradient / gradient.norm()
        u = ball.project(point + step * move, x)
        point, before = ball.project(point + a * (u - point) + (1 - a) * (point - before), x), point
        gradient, value = look(point)
        history.append(value)
        if value > best_history[-1]:
            best, best_gradient = point, gradient
        best_history.append(max(value, best_history[-1]))
        if k in checkpoints(steps):
            rises = sum(history[j] > history[j - 1] for j in range(last_mark + 1, k + 1))
            halve = rises <= 0.75 * (k - last_mark) or (not halved_before and best_before >= best_history[-1])
            if halve:
                step, point, gradient = step / 2, best, best_gradient
            halved_before, best_before, last_mark = halve, best_history[-1], k
    return best, best_history[-1]


@pytest.mark.parametrize("loss", [cross_entropy, dlr])
@pytest.mark.parametrize("ball", [LinfBall(0.03), L2Ball(0.1)], ids=lambda ball: ball.norm)
def test_a_batched_run_follows_the_plain_algorithm_example_by_example(ball, loss, small_net, examples):
    net, x = small_net(dtype=torch.float64), examples(12, dtype=torch.float64)
    y = net(x).argmax(1)
    start = start_on_border(x, ball, streams(0, range(12)))
    points, scores = climb(net, loss, Task(x, (y,), ball), start.clone(), steps=100)
    held = scores.isfinite()
    assert held.sum() >= 4
    for i in held.nonzero().flatten().tolist():
        row = slice(i, i + 1)
        point, value = plain_run(net, loss, x[row], y[row], ball, start[row], steps=100)
        torch.testing.assert_close(points[row], point, atol=1e-7, rtol=0)
        assert scores[i].item() == pytest.approx(value, abs=1e-7)


def test_a_period_with_exactly_three_rises_in_four_halves_the_step(examples):
    x = examples(2)
    task = Task(x, (torch.zeros(2, dtype=torch.long),), LinfBall(0.1))
    state = _Climber.begin(lambda x: x.flatten(1), cross_entropy, task, x.clone(), "float32")
    state.rises = torch.tensor([12.0, 13.0])
    state.judge(period=16)
    torch.testing.assert_close(state.step, torch.tensor([0.1, 0.2]))
    assert state.halved.tolist() == [True, False]
    # Without a rise of the best loss, the step that was kept is halved too; the one just halved gets a second period.
    state.rises = torch.tensor([16.0, 16.0])
    state.judge(period=16)
    torch.testing.assert_close(state.step, torch.tensor([0.1, 0.1]))


def test_a_start_lies_on_the_border_of_the_ball():
    x = torch.full((5, 3, 4), 0.5, dtype=torch.float64)
    linf = start_on_border(x, LinfBall(0.1), streams(0, range(5))) - x
    torch.testing.assert_close(linf.abs().amax((1, 2)), torch.full((5,), 0.1, dtype=torch.float64))
    l2 = start_on_border(x, L2Ball(0.1), streams(0, range(5))) - x
    torch.testing.assert_close(l2.flatten(1).norm(dim=1), torch.full((5,), 0.1, dtype=torch.float64), rtol=1e-5, atol=0)


def test_only_examples_that_hold_out_are_passed_on(small_net, examples):
    net, x = small_net(), examples(30)
    y = net(x).argmax(1)
    y[:10] = (y[:10] + 1) % 4
    sizes = []
    handle = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    APGD(steps=10, restarts=2)(net, x, y, LinfBall(0.05))
    handle.remove()
    assert sizes[0] == 30 and sizes[1] == 20 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 20


def test_targets_are_tried_one_after_the_other_on_what_is_left(small_net, examples):
    net, x = small_net(), examples(20)
    y = net(x).argmax(1)
    sizes = []
    handle = net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    APGDT(steps=5, targets=9)(net, x, y, LinfBall(1e-6))
    handle.remove()
    assert sizes == [20] * (1 + 3 * 6)  # a clean pass, then three targets (four classes) of a start and five steps


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_restart_from_the_best_point_never_loses_it(loss, small_net, examples):
    net, x = small_net(), examples(30)
    y = net(x).argmax(1)
    ball = LinfBall(0.03)
    start = start_on_border(x, ball, streams(0, range(30)))
    points, scores = climb(net, LOSSES[loss], Task(x, (y,), ball), start, steps=30)
    held = scores.isfinite()
    torch.testing.assert_close(LOSSES[loss](net(points), y)[held], scores[held], atol=1e-5, rtol=1e-5)
    assert (net(points).argmax(1) != y)[~held].all()


def radii_of_calls(text: str, small_net, examples) -> list[float]:
    """Largest L1 distance from the clean points in each pass of an attack with radius 1."""
    net, x = small_net(), examples(4)
    ball, lengths = L1Ball(1.0), []
    clean = net(x).argmax(1)

    def model(points):
        if len(points) == len(x):
            lengths.append(ball.length(points - x).max().item())
        return torch.nn.functional.one_hot(clean, 4)[: len(points)] + 1e-3 * net(points)  # never fooled

    points = ATTACKS.parse(text)(model, x, clean, ball)
    assert ball.contains(points, x).all()
    return lengths


def test_l1_runs_in_wider_balls_first_and_ends_inside(small_net, examples):
    lengths = radii_of_calls("apgd:steps=10", small_net, examples)
    # A clean pass; then start and 3 steps at 3 eps, start and 3 steps at 2 eps, start and 4 steps at eps.
    assert len(lengths) == 1 + 4 + 4 + 5 and lengths[0] == 0
    assert 2 < max(lengths[1:5]) <= 3 and 1 < max(lengths[5:9]) <= 2 and max(lengths[9:]) <= 1
    assert max(radii_of_calls("apgd:steps=10,wide_start=false", small_net, examples)) <= 1


def test_an_l1_step_that_lost_pixels_starts_again_from_the_best_point(examples):
    x = examples(2)
    task = Task(x, (torch.zeros(2, dtype=torch.long),), L1Ball(1.0))
    inner = _Climber.begin(lambda x: x.flatten(1), cross_entropy, task, x.clone(), "float32")
    state = _SparseClimber.begin(inner, warm=False)
    assert state.share.tolist() == pytest.approx([0.2, 0.2]) and state.moved.tolist() == [12, 12]
    best = x.clone()
    best[0, 0, 1], best[1] = 0.5, 0.5  # moves two pixels of the first example, all twelve of the second
    inner.best_point, inner.point = best, x.clone()
    state.step = torch.tensor([0.5, 0.5])
    state.judge(period=4)
    torch.testing.assert_close(state.share, torch.tensor([2 / 12, 12 / 12]) / 1.5)
    torch.testing.assert_close(state.step, torch.tensor([1.0, 0.5 / 1.5]))
    assert torch.equal(inner.point[0], best[0]) and torch.equal(inner.point[1], x[1])
    state.step = torch.tensor([0.1, 0.1])
    state.judge(period=4)
    torch.testing.assert_close(state.step, torch.tensor([0.1, 0.1]))
