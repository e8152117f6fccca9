"""Threat models: membership is exact, over the real numbers that the floats stand for."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import threat
from attacks.noise import streams
from attacks.threat import L1Ball, L2Ball, LinfBall, make_ball

BALLS = [LinfBall, L2Ball, L1Ball]
RADII = [0.0, 8 / 255, 0.1, 0.3, 1.0]
DTYPES = [torch.float32, torch.float64]


def images(dtype: torch.dtype, count: int = 6, seed: int = 0) -> torch.Tensor:
    """Random images that include exact zeros, exact ones and denormal-size pixels."""
    x = torch.rand((count, 2, 3, 4), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[:, 0, 0] = 0.0
    x[:, 1, 1] = 1.0
    x[:, 0, 1, 0] = 1e-30
    return x


def far_points(x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    scale = torch.tensor([0.0, 1e-8, 1e-3, 0.3, 10.0, 1e4], dtype=x.dtype).view(-1, 1, 1, 1)
    return x + scale * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def exactly_inside(norm: str, point: torch.Tensor, x: torch.Tensor, eps: float) -> bool:
    """Membership of one example by rational arithmetic."""
    pixels = point.flatten().tolist()
    moves = [abs(Fraction(p) - Fraction(q)) for p, q in zip(pixels, x.flatten().tolist(), strict=True)]
    in_range = all(0 <= p <= 1 for p in pixels)
    radius = Fraction(eps)
    if norm == "linf":
        return in_range and max(moves) <= radius
    if norm == "l1":
        return in_range and sum(moves) <= radius
    return in_range and sum(m * m for m in moves) <= radius * radius


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", RADII)
@pytest.mark.parametrize("ball_type", BALLS)
def test_projected_and_sampled_points_are_inside_in_exact_arithmetic(ball_type, eps, dtype):
    x = images(dtype)
    ball = ball_type(eps)
    for points in (ball.project(far_points(x), x), ball.sample(x, torch.Generator().manual_seed(2))):
        assert points.dtype == dtype and not points.isnan().any()
        assert all(exactly_inside(ball.norm, p, q, eps) for p, q in zip(points, x, strict=True))
        assert ball.contains(points, x).all()


@pytest.mark.parametrize("ball_type", [L2Ball, L1Ball])
def test_rounding_many_pixels_does_not_lengthen_a_short_move(ball_type):
    # 20000 moves far below the spacing of floats near 1: rounded to the nearest they would add up to more than eps.
    x = torch.rand(3, 20000, generator=torch.Generator().manual_seed(0))
    far = x + torch.randn(3, 20000, generator=torch.Generator().manual_seed(1))
    points = ball_type(1e-4).project(far, x)
    assert all(exactly_inside(ball_type.norm, p, q, 1e-4) for p, q in zip(points, x, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball_type", BALLS)
def test_each_example_may_have_its_own_radius(ball_type, dtype):
    x = images(dtype)
    radii = torch.tensor([0.0, 0.01, 8 / 255, 0.3, 0.9, 1.0])
    ball = ball_type(radii)
    for points in (ball.project(far_points(x), x), ball.sample(x, torch.Generator().manual_seed(2))):
        assert all(exactly_inside(ball.norm, p, q, e) for p, q, e in zip(points, x, radii.tolist(), strict=True))
    kept = torch.tensor([4, 1])
    assert torch.equal(ball.select(kept).project(far_points(x)[kept], x[kept]), ball.project(far_points(x), x)[kept])
    assert ball.eps_of(x).shape == (6, 1, 1, 1) and ball.eps_of(x).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", RADII)
def test_the_inward_box_is_the_largest_one_inside_and_the_outward_box_the_smallest_around(eps, dtype):
    x = images(dtype)
    ball = LinfBall(eps)
    (lo, hi), (outer_lo, outer_hi) = ball.box(x), ball.box(x, "outward")
    for pixel, low, high, outer_low, outer_high in zip(
        *(t.flatten().tolist() for t in (x, lo, hi, outer_lo, outer_hi)), strict=True
    ):
        true_low = max(Fraction(pixel) - Fraction(eps), Fraction(0))
        true_high = min(Fraction(pixel) + Fraction(eps), Fraction(1))
        assert true_low <= low <= pixel <= high <= true_high
        assert outer_low <= true_low and true_high <= outer_high
    # Nothing is given away: the next float outside the inward box is infeasible, the next inside the outer box cuts it.
    next_out = torch.nextafter(lo, torch.full_like(lo, -math.inf)).flatten().tolist()
    next_in = torch.nextafter(outer_lo, torch.full_like(lo, math.inf)).flatten().tolist()
    for pixel, below, above in zip(x.flatten().tolist(), next_out, next_in, strict=True):
        assert below < max(Fraction(pixel) - Fraction(eps), Fraction(0)) < above


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    pixel=st.floats(-1, 1, width=32),
    eps=st.one_of(st.floats(0, 1), st.floats(0, 1, width=32), st.sampled_from([1e-30, 8 / 255, 2.0**-149])),
    near=st.booleans(),
    wide=st.booleans(),
)
def test_the_box_of_any_pixel_and_radius_is_rounded_to_the_right_side(pixel, eps, near, wide):
    pixel = torch.tensor(eps).item() if near else pixel  # a pixel and a radius that all but cancel
    x = torch.tensor([[pixel]], dtype=torch.float64 if wide else torch.float32)
    ball = LinfBall(eps, pixel_range=None)
    lo, hi = (t.item() for t in ball.box(x))
    outer_lo, outer_hi = (t.item() for t in ball.box(x, "outward"))
    low, high = Fraction(pixel) - Fraction(eps), Fraction(pixel) + Fraction(eps)
    assert outer_lo <= low <= lo <= pixel <= hi <= high <= outer_hi
    assert ball.contains(torch.tensor([[lo]], dtype=x.dtype), x).all()
    assert outer_lo == lo or not ball.contains(torch.tensor([[outer_lo]], dtype=x.dtype), x).any()
    step_up = torch.nextafter(torch.tensor(outer_lo, dtype=x.dtype), torch.tensor(math.inf, dtype=x.dtype)).item()
    assert lo in (outer_lo, step_up)


def test_zero_and_one_stay_exact_limits_of_the_outward_box():
    x = torch.tensor([[0.0, 1.0, 0.5]])
    lo, hi = LinfBall(0.75).box(x, "outward")
    assert lo.tolist() == [[0.0, 0.25, 0.0]] and hi.tolist() == [[0.75, 1.0, 1.0]]


def test_without_a_pixel_range_the_box_is_not_cut():
    x = torch.tensor([[0.0, 1.0]])
    lo, hi = LinfBall(2.0, pixel_range=None).box(x)
    assert lo.tolist() == [[-2.0, -1.0]] and hi.tolist() == [[2.0, 3.0]]
    for ball_type in BALLS:
        ball = ball_type(2.0, None)
        assert ball.contains(ball.project(x - 50, x), x).all()
        assert (ball.project(x - 50, x) < 0).any()


def test_a_pixel_range_between_two_floats_is_kept_inside_and_enclosed_outside():
    x = torch.tensor([[0.5]])
    ball = LinfBall(0.75, pixel_range=(0.1, 0.9))
    (lo, hi), (outer_lo, outer_hi) = ball.box(x), ball.box(x, "outward")
    assert outer_lo.item() <= 0.1 <= lo.item() and hi.item() <= 0.9 <= outer_hi.item()
    assert outer_lo.item() != lo.item()


@pytest.mark.parametrize("ball_type", BALLS)
def test_membership_is_decided_without_tolerance(ball_type):
    x = torch.full((1, 4), 0.5)
    moved = x.clone()
    moved[0, 0] = 0.75
    assert ball_type(0.25).contains(moved, x).all()
    assert not ball_type(math.nextafter(0.25, 0)).contains(moved, x).any()
    assert not ball_type(0.25).contains(torch.full((1, 4), math.nan), x).any()
    assert not ball_type(0.5, (0.0, 0.7)).contains(moved, x).any()


def nearest_in_l1(v: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """The projection on the L1 ball cut by [0, 1], by bisection on the threshold."""
    low, high = 0.0, float((v - x).abs().max()) + 1

    def shrink(t: float) -> torch.Tensor:
        moves = (v - x).sign() * ((v - x).abs() - t).clamp(min=0)
        return (x + moves).clamp(0, 1) - x

    if shrink(0.0).abs().sum() <= eps:
        return x + shrink(0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if shrink(middle).abs().sum() > eps else (low, middle)
    return x + shrink(high)


@pytest.mark.parametrize("eps", [0.0, 0.05, 1.0, 4.0, 1000.0])
def test_the_l1_projection_agrees_with_bisection(eps):
    x = images(torch.float64)
    far = far_points(x)
    nearest = L1Ball(eps).project(far, x)
    for point, v, centre in zip(nearest, far, x, strict=True):
        torch.testing.assert_close(point, nearest_in_l1(v, centre, eps), atol=3e-6 * max(eps, 1e-6), rtol=0)


@pytest.mark.parametrize("ball_type", BALLS)
def test_projecting_a_feasible_point_changes_it_by_less_than_the_slack(ball_type):
    x = images(torch.float64)
    ball = ball_type(0.3)
    inside = ball.sample(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ball.project(inside, x), inside, atol=1e-6, rtol=0)
    assert torch.equal(ball.project(x, x), x)


def test_samples_fill_the_ball_evenly():
    # The share of the volume within r of the centre is r**d: the radii, raised to that power, are uniform.
    x = torch.full((4000, 3), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    lengths = {
        "linf": (LinfBall(0.1).sample(x, generator) - x).abs().amax(1),
        "l2": (L2Ball(0.1).sample(x, generator) - x).norm(dim=1),
        "l1": (L1Ball(0.1).sample(x, generator) - x).abs().sum(1),
    }
    for norm, length in lengths.items():
        shares = ((length / 0.1) ** 3).sort().values
        assert (shares - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max() < 0.03, norm


@pytest.mark.parametrize("ball_type", BALLS)
def test_a_draw_of_exactly_0_gives_a_point_of_the_ball(ball_type, monkeypatch):
    draw = threat.uniform

    def with_zeros(*arguments):
        return draw(*arguments).index_fill_(-1, torch.tensor([0]), 0.0)

    monkeypatch.setattr(threat, "uniform", with_zeros)
    x = images(torch.float32)
    ball = ball_type(0.3)
    assert ball.contains(ball.sample(x, torch.Generator().manual_seed(0)), x).all()


@pytest.mark.parametrize("ball_type", BALLS)
def test_with_a_stream_per_example_noise_does_not_depend_on_the_batch(ball_type):
    x = images(torch.float32)
    together = ball_type(0.3).sample(x, streams(7, range(6)))
    alone = torch.cat([ball_type(0.3).sample(x[i : i + 1], streams(7, [i])) for i in reversed(range(6))]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(together, ball_type(0.3).sample(x, streams(8, range(6))))


@pytest.mark.parametrize("ball_type", BALLS)
def test_the_steepest_move_has_its_length_and_gains_at_least_any_other(ball_type):
    gradient = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ball = ball_type(0.5)
    step = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    move = ball.steepest(gradient, step)
    lengths = {"linf": move.abs().amax((1, 2, 3)), "l2": move.flatten(1).norm(dim=1), "l1": move.abs().sum((1, 2, 3))}
    torch.testing.assert_close(lengths[ball.norm], step)
    torch.testing.assert_close((move * gradient).sum((1, 2, 3)), step * ball.dual_norm(gradient, (1, 2, 3)))


@pytest.mark.parametrize("ball_type", BALLS)
def test_tiny_and_zero_gradients_give_finite_moves(ball_type):
    gradient = torch.zeros(2, 3, 4, 4)
    gradient[1] = 1e-30
    move = ball_type(0.5).steepest(gradient, 0.1)
    assert move.isfinite().all() and (move[0] == 0).all() and move[1].abs().sum() > 0.05


def test_an_l1_move_fills_each_pixel_to_the_border_before_it_takes_the_next():
    gradient = torch.tensor([[3.0, -2.0, 1.0, 0.0]])
    at = torch.tensor([[0.75, 0.0, 0.5, 0.5]])
    assert L1Ball(1.0).steepest(gradient, 0.375, at).tolist() == [[0.25, 0.0, 0.125, 0.0]]
    assert L1Ball(1.0).steepest(gradient, 0.375).tolist() == [[0.375, 0.0, 0.0, 0.0]]
    assert L1Ball(1.0).steepest(gradient, torch.tensor([2.0]), at).tolist() == [[0.25, 0.0, 0.5, 0.0]]


def test_an_l1_move_is_spread_over_a_hundredth_of_many_pixels():
    gradient = torch.arange(500.0).view(1, 5, 100)
    move = L1Ball(1.0).steepest(gradient, 0.5)
    torch.testing.assert_close(move.flatten()[-5:], torch.full((5,), 0.1))
    assert (move != 0).sum() == 5


def test_the_hint_for_a_radius_in_grey_levels_names_the_fraction():
    with pytest.raises(ValueError, match=r"eps=8 leaves the pixel range \[0, 1\]; did you mean 8/255\?"):
        LinfBall(8)
    with pytest.raises(ValueError, match="did you mean 8/255"):
        LinfBall(torch.tensor([0.1, 8.0]))
    assert LinfBall(8, pixel_range=(0, 255)).eps == 8 and L2Ball(8).eps == 8 and L1Ball(12).eps == 12


@pytest.mark.parametrize("ball_type", BALLS)
@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.1]), torch.tensor([math.nan])])
def test_a_radius_that_is_no_length_is_refused(ball_type, eps):
    with pytest.raises(ValueError, match="finite and not negative"):
        ball_type(eps)


@pytest.mark.parametrize("eps", ["8/255", None, [0.1, 0.2]])
def test_a_radius_that_is_no_number_is_refused(eps):
    with pytest.raises(ValueError, match="eps must be a number such as 8 / 255 or a tensor, got"):
        LinfBall(eps)
    assert LinfBall(Fraction(8, 255)).eps == 8 / 255


def test_a_ball_can_be_scaled_and_made_by_name():
    assert LinfBall(0.2).scaled(0.5) == LinfBall(0.1)
    assert make_ball("l2", 0.5) == L2Ball(0.5)
    assert LinfBall(0.2).select(torch.tensor([0])) == LinfBall(0.2)
    with pytest.raises(ValueError, match="known: linf, l2, l1"):
        make_ball("l3", 0.5)
    with pytest.raises(ValueError, match="low < high"):
        LinfBall(0.1, (1.0, 0.0))
    with pytest.raises(ValueError, match="2 radii, the batch 3"):
        LinfBall(torch.tensor([0.1, 0.2])).box(torch.zeros(3, 4))
