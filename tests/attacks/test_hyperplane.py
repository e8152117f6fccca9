"""Projections on a hyperplane inside the pixel range, against scipy's solver of linear and quadratic programs."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog, minimize

from attacks import make_ball
from attacks.hyperplane import onto_hyperplane


def problem(seed: int):
    generator = torch.Generator().manual_seed(seed)
    point = torch.rand(6, 5, dtype=torch.float64, generator=generator)
    point[:, 0], point[:, 1] = 0.0, 1.0
    slope = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    slope[0, 2] = 0.0
    value = torch.randn(6, dtype=torch.float64, generator=generator) * 0.5
    return point, slope, value


def shortest(norm: str, point, slope, value) -> float:
    """Length of the shortest move onto the hyperplane, by a general solver; nan where none stays in the range."""
    x, w = point.numpy(), slope.numpy()
    room = list(zip(-x, 1 - x, strict=True))
    if norm == "l2":
        constraint = {"type": "eq", "fun": lambda d: w @ d + value.item()}
        options = {"maxiter": 500, "ftol": 1e-14}
        solved = minimize(
            lambda d: d @ d, 0 * x, bounds=room, constraints=[constraint], method="SLSQP", options=options
        )
        return solved.fun**0.5 if solved.success else float("nan")
    # Variables: move d, then bounds of its sizes (one for Linf, one per pixel for L1), whose sum is minimised.
    size, bounds = len(x), 1 if norm == "linf" else len(x)
    rows = []
    for sign in (1, -1):
        for i in range(size):
            row = [0.0] * (size + bounds)
            row[i], row[size + (0 if norm == "linf" else i)] = sign, -1.0
            rows.append(row)
    solved = linprog(
        [0.0] * size + [1.0] * bounds,
        A_ub=rows,
        b_ub=[0.0] * len(rows),
        A_eq=[[*w, *[0.0] * bounds]],
        b_eq=[-value.item()],
        bounds=room + [(0, None)] * bounds,
    )
    return solved.fun if solved.status == 0 else float("nan")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("seed", range(4))
def test_the_move_is_the_shortest_one_and_ends_on_the_hyperplane_in_the_range(norm, seed):
    point, slope, value = problem(seed)
    ball = make_ball(norm, 0.1)
    move = onto_hyperplane(ball, point, slope, value)
    assert (point + move >= -1e-12).all() and (point + move <= 1 + 1e-12).all()
    feasible = 0
    for i in range(len(point)):
        length = shortest(norm, point[i], slope[i], value[i])
        if length == length:
            feasible += 1
            assert (value[i] + slope[i] @ move[i]).abs() < 1e-9
            assert ball.length(move)[i].item() == pytest.approx(length, rel=1e-4, abs=1e-6)
    assert feasible >= 3


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_hyperplane_beyond_the_range_is_approached_as_far_as_the_range_goes(norm):
    point, slope = torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, -2.0]])
    move = onto_hyperplane(make_ball(norm, 0.1), point, slope, torch.tensor([-10.0]))
    torch.testing.assert_close(point + move, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_without_a_range_the_distance_is_that_of_the_dual_norm(norm):
    point, slope, value = problem(7)
    ball = make_ball(norm, 0.1, pixel_range=None)
    move = onto_hyperplane(ball, point, slope, value)
    torch.testing.assert_close(ball.length(move), value.abs() / ball.dual_norm(slope, (1,)))
