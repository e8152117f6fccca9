"""Curves over radii against the closed form of a linear model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import Ball
from robust.eps_curve import EpsCurve, attacked_over_eps, certified_over_eps, eps_curve
from tests.robust.linear_problem import BALL, Decision, ExactLinear, WorstPoint, data, linear_model, worst_point

FACTORS = [0.0, 0.1, 0.5, 1.0, 2.0, 4.0]


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    images = data().test
    return linear_model(), *images.batch(torch.arange(len(images)))


@pytest.mark.parametrize("batch_size", [4, 100])
def test_an_exact_bound_and_the_best_attack_give_the_closed_form(batch_size: int) -> None:
    model, x, y = problem()
    exact = [(worst_point(model, x, y, BALL.scaled(f))[1] > 0).double().mean().item() for f in FACTORS]
    assert len(set(exact)) > 3
    assert certified_over_eps(model, x, y, BALL, FACTORS, ExactLinear(), batch_size) == exact
    assert attacked_over_eps(model, x, y, BALL, FACTORS, WorstPoint(0.9999), batch_size) == exact


def test_values_belong_to_their_factors_whatever_the_order() -> None:
    model, x, y = problem()
    for measure, method in ((certified_over_eps, ExactLinear()), (attacked_over_eps, WorstPoint())):
        ascending = measure(model, x, y, BALL, FACTORS, method)
        assert measure(model, x, y, BALL, FACTORS[::-1], method) == ascending[::-1]
        assert ascending == sorted(ascending, reverse=True)


def test_what_is_certified_in_a_larger_ball_is_not_asked_again() -> None:
    model, x, y = problem()
    asked: list[int] = []

    def erratic(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        """Certifies in the largest ball alone, as no bound should."""
        asked.append(len(x))
        return [Decision("certified", 1.0) if ball.eps == 4 * BALL.eps else Decision("unknown", -1.0)] * len(x)

    assert certified_over_eps(model, x, y, BALL, FACTORS, erratic) == [18 / 23] * len(FACTORS)
    assert asked == [18]


def test_the_curve_carries_radii_in_pixel_units_and_ascending() -> None:
    model, x, y = problem()
    curve = eps_curve(model, x, y, BALL, [2.0, 0.5], ExactLinear(), WorstPoint(0.9999))
    assert curve.eps == (0.025, 0.1)
    assert curve.certified == curve.under_attack
    assert curve.certified[0] > curve.certified[1]
    assert (curve.norm, curve.clean, curve.examples) == ("linf", 18 / 23, 23)
    assert eps_curve(model, x, y, BALL, [1.0]) == EpsCurve("linf", (0.05,), clean=18 / 23, examples=23)


def test_a_curve_needs_a_value_per_radius() -> None:
    EpsCurve("linf", (0.1, 0.2), (0.5, 0.4))
    with pytest.raises(ValueError, match="expected 2 values of certified, got 1"):
        EpsCurve("linf", (0.1, 0.2), (0.5,))
