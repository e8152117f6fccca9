"""Schedules at their boundaries, and the ramp of certified training against golden values.

Golden values: computed from the definition in auto_LiRPA's scheduler (power 4, a quarter of the ramp curved).
"""

from __future__ import annotations

import pytest

from robust.schedule import SCHEDULES, ramp_progress
from robust.schedules.constant import Constant
from robust.schedules.cosine import Cosine
from robust.schedules.geometric import Geometric
from robust.schedules.linear import Linear
from robust.schedules.milestones import Milestones
from robust.schedules.smooth import Smooth
from robust.schedules.triangular import Triangular

CIFAR_STEPS = 391
"""Batches of 128 in 50,000 images."""


@pytest.mark.parametrize(
    "step, value",
    [
        (0, 0.0),
        (5, 0.00012308),
        (10, 0.00196923),
        (20, 0.03150769),
        (25, 0.07692308),
        (26, 0.08923077),
        (50, 0.38461538),
        (75, 0.69230769),
        (99, 0.98769231),
        (100, 1.0),
        (101, 1.0),
    ],
)
def test_the_smooth_ramp_has_its_golden_values(step, value):
    assert Smooth(start=0, end=1)(step, 100, 1) == pytest.approx(value, abs=5e-9)


@pytest.mark.parametrize("epoch, value", [(1, 0.0), (11, 0.004808), (21, 0.076923), (41, 0.384615), (61, 0.692308)])
def test_the_smooth_ramp_of_cifar10_has_its_golden_values(epoch, value):
    assert Smooth(start=1, end=81)(epoch * CIFAR_STEPS, CIFAR_STEPS, 160) == pytest.approx(value, abs=5e-7)


def test_the_smooth_ramp_is_0_up_to_its_start_and_1_from_its_end():
    ramp = Smooth(start=1, end=81)
    assert ramp(0, CIFAR_STEPS, 160) == ramp(CIFAR_STEPS, CIFAR_STEPS, 160) == 0
    assert 0 < ramp(CIFAR_STEPS + 1, CIFAR_STEPS, 160) < 1e-9
    assert ramp(81 * CIFAR_STEPS - 1, CIFAR_STEPS, 160) < 1
    assert ramp(81 * CIFAR_STEPS, CIFAR_STEPS, 160) == ramp(160 * CIFAR_STEPS, CIFAR_STEPS, 160) == 1


@pytest.mark.parametrize("schedule", [Smooth(1, 21), Smooth(0, 8, middle=0.4), Smooth(0.5, 2.5, power=2), Linear(2, 7)])
def test_ramps_never_fall_and_stay_between_0_and_1(schedule):
    values = [schedule(step, 7, 30) for step in range(210)]
    assert values == sorted(values)
    assert values[0] == 0 and values[-1] == 1


def test_the_slopes_of_the_smooth_ramp_agree_where_curve_and_line_meet():
    values = [Smooth(0, 1)(step, 100_000, 1) for step in (24_999, 25_000, 25_001)]
    assert values[1] - values[0] == pytest.approx(values[2] - values[1], rel=1e-3)


@pytest.mark.parametrize("schedule", [Smooth(3, 3), Linear(3, 3)])
def test_a_ramp_without_length_jumps(schedule):
    assert ramp_progress(schedule, 0, 10) == 1
    assert schedule(30, 10, 5) == 1


@pytest.mark.parametrize(
    "step, value", [(0, 0.0), (2_000, 0.0), (4_500, 0.25), (11_999, 0.9999), (12_000, 1.0), (60_000, 1.0)]
)
def test_the_linear_ramp_runs_straight_between_fractional_epochs(step, value):
    assert Linear(start=20 / 3, end=40)(step, 300, 200) == pytest.approx(value, abs=1e-12)


def test_the_linear_ramp_of_l2_training_starts_above_zero():
    # eps_t = eps (0.1 + (m - 0.1) min(2 epoch / epochs, 1)) at m = 1.5, as a factor on 1.5 eps.
    ramp = Linear(end=400, initial=1 / 15)
    expected = [(0.1 + 1.4 * min(2 * epoch / 800, 1)) / 1.5 for epoch in (0, 100, 399, 400, 799)]
    assert [ramp(epoch * 196, 196, 800) for epoch in (0, 100, 399, 400, 799)] == pytest.approx(expected, rel=1e-12)


def test_geometric_ramps_and_decays_have_equal_ratios():
    ramp = Geometric(end=4)
    assert [ramp(step, 1, 8) for step in range(6)] == pytest.approx([0.01, 10**-1.5, 0.1, 10**-0.5, 1, 1])
    decay = Geometric(start=4, end=8, initial=1.0, final=1e-4)
    assert [decay(step, 1, 8) for step in (0, 4, 5, 6, 8)] == pytest.approx([1, 1, 0.1, 0.01, 1e-4])
    with pytest.raises(ValueError, match=r"equal ratios need positive ends, got 0 and 1\.0"):
        Geometric(initial=0)


def test_milestones_lower_the_rate_from_the_first_step_of_their_epoch():
    decay = Milestones(at=(120, 140))
    steps = [0, 120 * CIFAR_STEPS - 1, 120 * CIFAR_STEPS, 140 * CIFAR_STEPS - 1, 140 * CIFAR_STEPS]
    assert [decay(step, CIFAR_STEPS, 160) for step in steps] == pytest.approx([1, 1, 0.2, 0.2, 0.04])


def test_milestones_without_epochs_change_nothing():
    assert Milestones()(10_000, 10, 1) == 1


def test_the_cosine_warms_up_and_ends_at_its_final_value():
    cosine = Cosine(warmup=2, final=0.1)
    assert [cosine(step, 10, 12) for step in (0, 10, 20, 70, 120, 130)] == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1])
    assert Cosine()(0, 10, 12) == 1


def test_the_constant_schedule_is_1():
    assert Constant()(0, 10, 1) == Constant()(10_000, 10, 1) == 1


@pytest.mark.parametrize("name", ["smooth:start=1,end=81", "linear:start=1,end=81"])
def test_progress_counts_the_steps_of_the_ramp(name):
    ramp = SCHEDULES.parse(name)
    progress = [ramp_progress(ramp, epoch * CIFAR_STEPS, CIFAR_STEPS) for epoch in (0, 1, 41, 81, 160)]
    assert progress == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("name", ["constant", "cosine", "milestones:at=5"])
def test_a_schedule_without_a_ramp_has_it_behind_from_the_start(name):
    assert ramp_progress(SCHEDULES.parse(name), 0, 10) == 1


@pytest.mark.parametrize("end", range(2, 400, 7))
def test_the_ramp_is_over_exactly_when_the_radius_is_full(end):
    # Objectives switch on ramp == 1 and the radius on the factor: a rounding apart and they would disagree for a step.
    ramp = Smooth(start=1 / 3, end=end / 3)
    for steps in (3, 21, 390):
        last = end * steps // 3
        assert ramp_progress(ramp, last, steps) == ramp(last, steps, 200) == 1
        assert ramp_progress(ramp, last - 1, steps) < 1 and ramp(last - 1, steps, 200) < 1


def test_the_triangle_rises_to_1_at_its_peak_and_falls_to_0_and_no_step_has_rate_0():
    triangle = Triangular(peak=0.4)
    values = [triangle(step, 3, 3) for step in range(9)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [Triangular()(step, 1, 3) for step in range(3)] == pytest.approx([0.5, 1, 0.5])
    with pytest.raises(ValueError, match=r"triangular: peak=1\.5: expected a share of the run between 0 and 1"):
        Triangular(peak=1.5)
