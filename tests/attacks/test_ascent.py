"""The ascent loop: step lengths, what it keeps, what it drops, and what it must not spend."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attacks.ascent import Ascent, Survivors, Task, ascend, stronger
from attacks.losses import cross_entropy, margin
from attacks.threat import L1Ball, L2Ball, LinfBall

BALLS = [LinfBall(0.25), L2Ball(0.25), L1Ball(0.25)]


class Counting:
    """A model that counts its passes and the examples in them."""

    def __init__(self, model):
        self.model, self.sizes = model, []

    def __call__(self, x):
        self.sizes.append(len(x))
        return self.model(x)


def two_logits(x: torch.Tensor) -> torch.Tensor:
    """Class 0 wins where the sum of the pixels is below 1."""
    total = x.flatten(1).sum(1)
    return torch.stack([1 - total, total - 1], dim=1)


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)


def test_step_lengths_decay_at_fractions_and_at_indices():
    assert Ascent(4, 0.5).lengths() == [0.5] * 4
    # The published schedule of small-box training: a tenth from steps ceil(.5 n), ceil(.8 n), ceil(.9 n) = 4, 7, 8 on.
    lengths = Ascent(8, 0.5, decay=0.1, decay_at=(0.5, 0.8, 0.9)).lengths()
    assert lengths == pytest.approx([0.5] * 4 + [0.05] * 3 + [0.005])
    assert Ascent(3, 1.0, decay=0.2, decay_at=(2.0,)).lengths() == [1.0, 1.0, 0.2]


@pytest.mark.parametrize("keep, passes", [("last", 5), ("best", 6), ("fooled", 6)])
def test_a_step_costs_one_pass_and_only_kept_points_one_more(keep, passes):
    model = Counting(two_logits)
    x = torch.full((3, 4), 0.1)
    ascend(model, margin, Task(x, (zeros(3),), LinfBall(0.1)), x.clone(), Ascent(5, 0.5, keep=keep))
    assert model.sizes == [3] * passes


class Forbid(TorchDispatchMode):
    """Fails where an operation would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", ["last", "best", "fooled"])
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_without_early_removal_nothing_waits_for_the_device(ball, keep, small_net, examples):
    x = examples(5)
    task = Task(x, (zeros(5),), ball)
    ball.box(x)  # reads the limits of the pixel range once, on the host
    with Forbid():
        start = ball.sample(x, torch.Generator().manual_seed(0))
        ascend(small_net(), cross_entropy, task, start, Ascent(3, 0.5, keep=keep))


def test_best_keeps_the_largest_loss_on_the_way_and_last_the_end_of_it():
    # The loss peaks at pixel 0.3; equal steps of 0.2 overshoot it and come back.
    def peak(x):
        height = -(x.flatten(1).sum(1) - 0.3).abs()
        return torch.stack([torch.zeros_like(height), height], dim=1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    task = Task(x, (zeros(1),), LinfBall(1.0))
    best, score = ascend(peak, margin, task, x.clone(), Ascent(2, 0.25, keep="best"))
    assert best.item() == 0.25 and score.item() == pytest.approx(-0.05)
    last, score = ascend(peak, margin, task, x.clone(), Ascent(3, 0.25, keep="last"))
    assert last.item() == 0.25 and score.isnan().all()
    last, _ = ascend(peak, margin, task, x.clone(), Ascent(2, 0.25, keep="last"))
    assert last.item() == 0.5


def test_first_fooled_stops_where_the_latest_fooled_goes_on():
    x = torch.zeros(1, 1, dtype=torch.float64)
    task = Task(x, (zeros(1),), LinfBall(1.0))

    def model(x):
        return two_logits(2 * x)  # class 0 below 0.5

    first, score = ascend(model, margin, task, x.clone(), Ascent(4, 0.25, keep="first_fooled"))
    assert first.item() == 0.75 and score.item() == math.inf
    latest, score = ascend(model, margin, task, x.clone(), Ascent(4, 0.25, keep="fooled"))
    assert latest.item() == 1.0 and score.item() == math.inf
    loss, score = ascend(model, margin, task, x.clone(), Ascent(4, 0.25, keep="best"))
    assert loss.item() == 1.0 and score.item() == pytest.approx(2.0)


def test_the_batch_shrinks_when_enough_examples_are_fooled():
    # Example i needs i + 1 steps.
    x = 1 - 0.03125 - torch.arange(10, dtype=torch.float64).view(10, 1) * 0.0625
    model = Counting(two_logits)
    task = Task(x, (zeros(10),), LinfBall(1.0, pixel_range=None))
    points, scores = ascend(model, margin, task, x.clone(), Ascent(10, 0.0625, keep="first_fooled"))
    assert (two_logits(points).argmax(1) == 1).all() and (scores == math.inf).all()
    # Dropped at more than a fifth done: 3 of 10, 2 of 7, 2 of 5, then one by one.
    assert model.sizes == [10, 10, 10, 10, 7, 7, 5, 5, 3, 2, 1]


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_early_removal_changes_neither_who_is_fooled_nor_the_unfooled_points(ball, small_net, examples):
    x, net = examples(40, dtype=torch.float64), small_net(dtype=torch.float64)
    y = net(x).argmax(1)
    radii = torch.linspace(0.0, 0.25, 40, dtype=torch.float64)
    task = Task(x, (y,), type(ball)(radii))
    plan = {"steps": 6, "step_size": 0.5}
    dropped, scores = ascend(net, margin, task, x.clone(), Ascent(**plan, keep="first_fooled"))
    followed, reference = ascend(net, margin, task, x.clone(), Ascent(**plan, keep="fooled"))
    assert torch.equal(scores == math.inf, reference == math.inf)
    held = scores < math.inf
    assert 0 < held.sum() < 40
    torch.testing.assert_close(dropped[held], followed[held])
    assert (net(dropped).argmax(1) != y)[~held].all()


def test_rows_of_one_example_end_together():
    # Row 0 and row 2 attack example 0; row 0 succeeds at once, so row 2 is left where it was.
    x = torch.tensor([[0.95], [0.0], [0.0]], dtype=torch.float64)
    task = Task(x, (zeros(3),), LinfBall(1.0, None), owner=torch.tensor([0, 1, 0]))
    counted = Counting(two_logits)
    ascend(counted, margin, task, x.clone(), Ascent(4, 0.1, keep="first_fooled"))
    assert counted.sizes == [3, 3, 1, 1, 1]


def test_steps_in_units_of_the_box_follow_its_width_in_every_pixel():
    x = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    task = Task(x, (zeros(1),), LinfBall(0.5))
    point, _ = ascend(two_logits, margin, task, x.clone(), Ascent(1, 0.5, unit="box", keep="last"))
    assert point.tolist() == [[0.125, 0.75, 1.0]]
    point, _ = ascend(two_logits, margin, task, x.clone(), Ascent(1, 0.5, unit="eps", keep="last"))
    assert point.tolist() == [[0.25, 0.75, 1.0]]
    with pytest.raises(ValueError, match="linf"):
        ascend(two_logits, margin, Task(x, (zeros(1),), L2Ball(0.5)), x.clone(), Ascent(1, 0.5, unit="box"))


@pytest.mark.parametrize("ball_type", [LinfBall, L2Ball, L1Ball])
def test_steps_follow_the_radius_of_each_example(ball_type):
    x = torch.full((2, 1), 0.25, dtype=torch.float64)
    ball = ball_type(torch.tensor([0.1, 0.4], dtype=torch.float64))
    point, _ = ascend(two_logits, margin, Task(x, (zeros(2),), ball), x.clone(), Ascent(1, 0.5, keep="last"))
    torch.testing.assert_close(point, torch.tensor([[0.3], [0.45]], dtype=torch.float64))


def test_a_vanished_gradient_does_not_freeze_the_momentum():
    # No slope below 0.1: the first gradient is zero, the later ones are not.
    def model(x):
        total = (x.flatten(1).sum(1) - 0.1).clamp(min=0)
        return torch.stack([1 - total, total], dim=1)

    x = torch.full((1, 1), 0.1, dtype=torch.float64)
    plan = Ascent(2, 0.5, keep="last", momentum=1.0)
    shifted = Task(x, (zeros(1),), LinfBall(0.5))
    assert ascend(model, margin, shifted, x.clone(), plan)[0].isfinite().all()
    moved, _ = ascend(model, margin, shifted, x.clone() + 0.01, plan)
    assert moved.item() == pytest.approx(0.6)


def test_undefined_losses_leave_a_feasible_point():
    def model(x):
        return two_logits(x) * math.nan

    x = torch.full((2, 3), 0.5)
    task = Task(x, (zeros(2),), LinfBall(0.25))
    for keep in ("first_fooled", "fooled", "best", "last"):
        point, _ = ascend(model, margin, task, x.clone(), Ascent(3, 0.5, keep=keep))
        assert task.ball.contains(point, x).all()


def test_the_stronger_run_wins_and_survivors_never_give_back():
    x = torch.zeros(3, 1)
    task = Task(x, (zeros(3),), LinfBall(0.5))
    weak = (torch.full((3, 1), 0.1), torch.tensor([math.inf, 1.0, 2.0]))
    strong = (torch.full((3, 1), 0.2), torch.tensor([5.0, 1.0, 1.0]))
    points, scores = stronger(weak, strong)
    assert points.flatten().tolist() == pytest.approx([0.1, 0.2, 0.1]) and scores.tolist() == [math.inf, 1.0, 2.0]
    survivors = Survivors(task, fooled=torch.tensor([False, False, True]))
    assert survivors.left().tolist() == [0, 1]
    survivors.add(weak[0][:2], weak[1][:2], torch.tensor([0, 1]))
    assert survivors.left().tolist() == [1] and survivors.points[2].item() == 0.0


def test_reduced_precision_touches_the_model_only():
    seen = []

    def model(x):
        z = x.flatten(1) @ torch.ones(3, 2)
        seen.append(z.dtype)
        return z

    x = torch.full((2, 3), 0.5)
    plan = Ascent(2, 0.5, keep="best", precision="bfloat16")
    point, scores = ascend(model, margin, Task(x, (zeros(2),), LinfBall(0.25)), x.clone(), plan)
    assert set(seen) == {torch.bfloat16} and point.dtype == scores.dtype == torch.float32
