"""Bounds against answers that are known: by hand, by enumeration, by a linear program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from attacks.threat import L1Ball, L2Ball, LinfBall
from certify.bounds.bound import bound
from certify.bounds.crown import intermediate_boxes
from certify.region import Region
from certify.tracing import capture
from tests.certify.networks import INPUT, KINDS, network
from tests.certify.soundness import METHODS


def dense(sizes: list[int], seed: int) -> nn.Sequential:
    """ReLU network in float64 with random weights."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layer = nn.Linear(n, m).double()
        layer.weight.data = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
        layer.bias.data = 0.3 * torch.randn(m, generator=generator, dtype=torch.float64)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_crown_on_a_network_worked_out_by_hand() -> None:
    # z1 = x1 + x2, z2 = x1 - x2, y = relu(z1) + relu(z2) on x in [-1, 1]^2, pixel range off; x0 = 0, eps = 1.
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    model[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    model[0].bias.data.zero_()
    model[2].weight.data = torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    model[2].bias.data = torch.tensor([0.5, 0.0], dtype=torch.float64)
    x, ball = torch.zeros(1, 2, dtype=torch.float64), LinfBall(1.0, pixel_range=None)
    # Both z are in [-2, 2]: chord z/2 + 1, adaptive lower line 0 (ub is not greater than -lb).
    # Upper bound of y: (z1 + z2)/2 + 2 + 0.5 = x1 + 2.5 <= 3.5; intervals give 2 + 2 + 0.5. Lower bound: 0.5.
    crown = bound(model, x, ball, method="crown")
    assert crown.ub[0, 0] == 3.5 and crown.lb[0, 0] == 0.5
    # Second output: -relu(z1) >= -(z1/2 + 1) >= -2, <= 0.
    assert crown.lb[0, 1] == -2.0 and crown.ub[0, 1] == 0.0
    assert bound(model, x, ball, method="ibp").ub[0, 0] == 4.5


def test_crown_takes_the_adaptive_lower_line_by_hand() -> None:
    # z = x on [-1, 3]: ub > -lb, so the lower line is z itself: relu(z) >= z >= -1. Zero would be tighter here.
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    model[2].weight.data = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    model[2].bias.data.zero_()
    crown = bound(model, torch.ones(1, 1, dtype=torch.float64), LinfBall(2.0, pixel_range=None), method="crown")
    assert crown.lb.tolist() == [[-1.0, -2.0]] and crown.ub.tolist() == [[3.0, 6.0]]


@pytest.mark.parametrize("method", ["crown_ibp", "crown", "alpha_crown"])
@pytest.mark.parametrize("ball", [LinfBall(1e-3), L2Ball(1e-3), L1Ball(1e-3)], ids=lambda b: b.norm)
def test_linear_bounds_are_exact_where_every_neuron_is_stable(method: str, ball: LinfBall | L2Ball | L1Ball) -> None:
    model = dense([6, 10, 10, 3], 0)
    x = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    snapshot = capture(model, x).snapshot().without_gradient()
    boxes = intermediate_boxes(snapshot, Region.around(x, ball))
    stable = torch.stack([~((b.lb < 0) & (b.ub > 0)).any(1) for b in boxes.values()]).all(0)
    assert stable.any()
    bounds = bound(snapshot, x[stable], ball, method=method)
    for i, point in enumerate(x[stable]):
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v), point)
        spread = ball.dual_norm(jacobian, (1,)) * ball.eps
        torch.testing.assert_close(bounds.lb[i], model(point) - spread, rtol=0, atol=1e-9)
        torch.testing.assert_close(bounds.ub[i], model(point) + spread, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "front", [nn.Identity(), nn.ZeroPad2d(1), nn.Unflatten(1, (1, 2))], ids=["plain", "pad", "shape"]
)
@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.3), L1Ball(0.5)], ids=lambda b: b.norm)
def test_hidden_bounds_of_the_first_layer_are_exact(front: nn.Module, ball: LinfBall | L2Ball | L1Ball) -> None:
    ball = type(ball)(ball.eps, pixel_range=None)
    x = torch.rand(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first = nn.Sequential(front, nn.Flatten(), nn.Linear(front(x)[0].numel(), 6)).double()
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 2).double())
    boxes = intermediate_boxes(capture(model, x).snapshot().without_gradient(), Region.around(x, ball))
    (box,) = boxes.values()
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: first(v)[0], x[i : i + 1]).flatten(1)
        spread = ball.dual_norm(jacobian, (1,)) * ball.eps
        unstable = (box.lb[i] < 0) & (box.ub[i] > 0)
        torch.testing.assert_close(box.ub[i][unstable], (first(x[i : i + 1])[0] + spread)[unstable])
        torch.testing.assert_close(box.lb[i][unstable], (first(x[i : i + 1])[0] - spread)[unstable])


def exact_minima(model: nn.Sequential, x: Tensor, eps: float) -> Tensor:
    """Smallest value of every output of a one-hidden-layer network on the box, by all activation patterns."""
    w1, b1, w2, b2 = (t.detach().numpy() for t in (*model[0].parameters(), *model[2].parameters()))
    low, high = (x[0] - eps).clamp(min=0).numpy(), (x[0] + eps).clamp(max=1).numpy()
    best = np.full(len(w2), np.inf)
    for pattern in itertools.product((0.0, 1.0), repeat=len(w1)):
        on = np.array(pattern)
        # on: W x + b >= 0; off: <= 0.
        sign = 1 - 2 * on
        for row in range(len(w2)):
            weight = (w2[row] * on) @ w1
            solution = linprog(weight, sign[:, None] * w1, -sign * b1, bounds=list(zip(low, high, strict=True)))
            if solution.status == 0:
                best[row] = min(best[row], solution.fun + (w2[row] * on) @ b1 + b2[row])
    return torch.from_numpy(best)


@pytest.mark.parametrize("seed", range(4))
def test_no_bound_exceeds_the_exact_minimum(seed: int) -> None:
    model, eps = dense([3, 5, 3], seed), 0.4
    x = torch.rand(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact = exact_minima(model, x, eps)
    gaps = {m: exact - bound(model, x, LinfBall(eps), method=m, **o).lb[0] for m, o in METHODS.items()}
    assert all((gap >= -1e-9).all() for gap in gaps.values())
    assert gaps["alpha_crown"].max() < 1.0, "the comparison should be a close one"


def relaxed_minimum(model: nn.Sequential, x: Tensor, eps: float, row: int) -> float:
    """Minimum of one output over the triangle relaxation with CROWN's hidden bounds, by a linear program."""
    snapshot = capture(model, x).snapshot().without_gradient()
    boxes = [
        (b.lb[0].numpy(), b.ub[0].numpy())
        for b in intermediate_boxes(snapshot, Region.around(x, LinfBall(eps))).values()
    ]
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model if isinstance(m, nn.Linear)]
    count = x.shape[1] + 2 * sum(len(b) for _, b in layers[:-1])
    bounds = [(max(v - eps, 0.0), min(v + eps, 1.0)) for v in x[0].tolist()]
    equal, equal_to, below, below_of = [], [], [], []
    before = range(x.shape[1])
    for (weight, bias), (lb, ub) in zip(layers[:-1], boxes, strict=True):
        z = range(before.stop, before.stop + len(bias))
        a = range(z.stop, z.stop + len(bias))
        bounds += list(zip(lb, ub, strict=True)) + [(0.0, max(u, 0.0)) for u in ub]
        for i in range(len(bias)):
            row_z = np.zeros(count)
            row_z[list(before)], row_z[z[i]] = weight[i], -1.0
            equal.append(row_z)
            equal_to.append(-bias[i])
            unstable = lb[i] < 0 < ub[i]
            slope = ub[i] / (ub[i] - lb[i]) if unstable else float(lb[i] >= 0)
            upper, lower = np.zeros(count), np.zeros(count)
            upper[a[i]], upper[z[i]] = 1.0, -slope
            below.append(upper)
            below_of.append(-slope * lb[i] if unstable else 0.0)
            lower[a[i]], lower[z[i]] = -1.0, 1.0 if unstable else slope
            below.append(lower)
            below_of.append(0.0)
        before = a
    cost = np.zeros(count)
    cost[list(before)] = layers[-1][0][row]
    solution = linprog(cost, np.array(below), below_of, np.array(equal), equal_to, bounds=bounds)
    assert solution.status == 0
    return float(solution.fun + layers[-1][1][row])


@pytest.mark.parametrize("seed", range(3))
def test_alpha_crown_with_fixed_hidden_bounds_reaches_the_linear_program(seed: int) -> None:
    model, eps = dense([4, 8, 8, 3], seed), 0.3
    x = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"iterations": 400, "lr": 0.1, "decay": 0.99, "optimise_intermediate": False}
    ours = bound(model, x, LinfBall(eps), method="alpha_crown", **options).lb[0]
    program = torch.tensor([relaxed_minimum(model, x, eps, row) for row in range(3)], dtype=torch.float64)
    assert (ours <= program + 1e-7).all()
    torch.testing.assert_close(ours, program, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kinds", [("relu", "conv"), ("leaky_relu", "skip"), ("sigmoid", "conv"), ("relu", "max_pool")])
@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.4), L1Ball(0.8)], ids=lambda b: b.norm)
def test_alpha_crown_is_never_looser_than_crown(kinds: tuple[str, ...], ball: LinfBall | L2Ball | L1Ball) -> None:
    # It starts from CROWN's bound and keeps the best. Between ibp, crown_ibp and crown no order holds by construction:
    # hidden boxes shrink, but the adaptive choice of lower lines changes with them.
    model = network([KINDS[name] for name in kinds], 0).double()
    x = torch.rand(3, *INPUT, generator=torch.Generator().manual_seed(0)).double()
    crown = bound(model, x, ball, method="crown")
    for joint in (True, False):
        alpha = bound(model, x, ball, method="alpha_crown", iterations=5, optimise_intermediate=joint)
        assert (alpha.lb >= crown.lb - 1e-12).all() and (alpha.ub <= crown.ub + 1e-12).all()


def test_hidden_bounds_of_crown_are_never_looser_than_intervals() -> None:
    from certify.bounds.interval import interval_walk

    for seed, kinds in enumerate([("relu", "conv"), ("tanh", "skip"), ("relu", "concat"), ("sigmoid", "max_pool")]):
        model = network([KINDS[name] for name in kinds] + [KINDS["relu"]], seed).double()
        x = torch.rand(3, *INPUT, generator=torch.Generator().manual_seed(seed)).double()
        snapshot = capture(model, x).snapshot().without_gradient()
        for ball in (LinfBall(0.1), L2Ball(0.4), L1Ball(0.8)):
            region = Region.around(x, ball)
            tight, loose = intermediate_boxes(snapshot, region), interval_walk(snapshot, region.interval())[1]
            for place, box in loose.items():
                assert (tight[place].lb >= box.lb - 1e-12).all() and (tight[place].ub <= box.ub + 1e-12).all()
