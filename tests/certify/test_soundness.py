"""Sampled and attacked points never escape a bound: every op, in every form, and all ordered pairs of ops."""

from __future__ import annotations

import zlib

import pytest
import torch

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify.bounds.bound import bound
from certify.interval import Interval
from certify.op import Activation, Box
from certify.ops.relu import ReLU
from certify.ops.s_shaped import SShaped
from certify.tracing import capture
from tests.certify.networks import INPUT, KINDS, VARIANTS, network, pair, sandwich
from tests.certify.soundness import METHODS, check, check_rules

BALLS: list[Ball] = [LinfBall(0.08), L2Ball(0.4), L1Ball(0.9), LinfBall(torch.tensor([0.02, 0.3]))]
DTYPES = [torch.float32, torch.float64]


def images(seed: int, count: int = 2) -> torch.Tensor:
    """Random images with some pixels on the border of the range."""
    x = torch.rand(count, *INPUT, generator=torch.Generator().manual_seed(seed))
    return (x * 1.2 - 0.1).clamp(0, 1)


def number(text: str) -> int:
    return zlib.crc32(text.encode())


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_points_never_escape_the_bounds_of_a_pair_of_ops(first: str, second: str) -> None:
    seed = number(first + second)
    dtype = DTYPES[seed % 2]
    model, x, ball = pair(first, second, seed).to(dtype), images(seed).to(dtype), BALLS[seed // 2 % len(BALLS)]
    check(model, x, ball)
    # Around a small ball nearly everything is linear and no slack hides a mistake.
    check(model, x, ball.scaled(0.02), points=200)


@pytest.mark.parametrize("name", VARIANTS)
def test_points_never_escape_the_bounds_of_a_variant_between_nonlinear_layers(name: str) -> None:
    for seed, ball in enumerate(BALLS):
        dtype = DTYPES[seed % 2]
        model, x = sandwich(name, seed).to(dtype), images(seed).to(dtype)
        check(model, x, ball, points=4_000)
        check_rules(model, x, ball)


@pytest.mark.parametrize("name", KINDS)
def test_the_rules_of_every_op_hold_on_its_input_boxes(name: str) -> None:
    for seed, ball in enumerate(BALLS):
        check_rules(pair(name, "conv", seed).to(DTYPES[seed % 2]), images(seed).to(DTYPES[seed % 2]), ball)
        check_rules(pair("relu", name, seed).to(DTYPES[seed % 2]), images(seed).to(DTYPES[seed % 2]), ball)


@pytest.mark.parametrize("name", [*KINDS, *VARIANTS])
def test_bounds_equal_the_forward_pass_where_eps_is_zero(name: str) -> None:
    model = (pair(name, "relu", 0) if name in KINDS else sandwich(name, 0)).double()
    x = images(1).double()
    for ball in (LinfBall(0.0), L2Ball(0.0), L1Ball(0.0)):
        for method, options in METHODS.items():
            bounds = bound(model, x, ball, method=method, **options)
            torch.testing.assert_close(bounds.lb, model(x), rtol=0, atol=1e-5)
            torch.testing.assert_close(bounds.ub, model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, *VARIANTS])
def test_interval_bounds_of_a_larger_ball_contain_those_of_a_smaller_one(name: str) -> None:
    model = (pair(name, "relu", 0) if name in KINDS else sandwich(name, 0)).double()
    snapshot = capture(model, images(0).double()).snapshot()
    for small in (LinfBall(0.03), L2Ball(0.2), L1Ball(0.5)):
        inner = bound(snapshot, images(0).double(), small, method="ibp")
        outer = bound(snapshot, images(0).double(), small.scaled(1.7), method="ibp")
        assert (outer.lb <= inner.lb + 1e-12).all() and (outer.ub >= inner.ub - 1e-12).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_points_never_escape_the_bounds_of_random_stacks_of_ops(ball: Ball, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = list(KINDS)
    for trial in range(40):
        depth = int(torch.randint(1, 5, (), generator=generator))
        picked = [names[i] for i in torch.randint(len(names), (depth,), generator=generator).tolist()]
        # Pools shrink images: one is enough.
        picked = [n for i, n in enumerate(picked) if "pool" not in n or n not in picked[:i]]
        model = network([KINDS[n] for n in picked], number(f"{seed} {trial}")).to(dtype)
        check(model, images(trial).to(dtype), ball, points=20_000)


@pytest.mark.parametrize("op", [ReLU(), ReLU(0.1), SShaped("sigmoid"), SShaped("tanh")], ids=str)
@pytest.mark.parametrize("ends", [(torch.nan, torch.inf), (torch.nan, torch.nan), (-torch.inf, torch.nan)])
def test_a_box_that_is_not_a_number_never_passes_for_a_stable_neuron(op: Activation, ends: tuple[float, float]) -> None:
    lb, ub = torch.full((1, 2), ends[0]), torch.full((1, 2), ends[1])
    for box in (Box(lb, ub), Interval(torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf))):
        for sign in (1.0, -1.0):
            (through,), constant = op.backward(torch.full((1, 1, 2), sign), [box])
            bound = constant + through.sum(2)
            assert not torch.isfinite(bound).any()
