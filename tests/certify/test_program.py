"""The mixed-integer program of a network, the linear program of a leaf, and the verifier that solves the former."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from torch import Tensor, nn

import certify.leaf as leaf_module
from attacks.threat import L2Ball, LinfBall
from certify.bounds.crown import Boxes, intermediate_boxes
from certify.graph import Snapshot
from certify.leaf import leaf_lp
from certify.op import UnsupportedOp
from certify.ops.relu import ReLU
from certify.program import Program
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.cascade import Cascade
from certify.verifiers.milp import MILP
from tests.certify.networks import KINDS, VARIANTS, layer, network
from tests.certify.test_exactness import dense, exact_minima, relaxed_minimum

PIECEWISE = ["relu", "leaky_relu", "max_pool"]


def problem(model: nn.Module, x: Tensor, eps: float) -> tuple[Snapshot, Region, Boxes]:
    """Network with its logits as rows, in float64."""
    model, x = model.double(), x.double()
    snapshot = capture(model, x).snapshot().without_gradient()
    region = Region.around(x, LinfBall(eps))
    return snapshot, region, intermediate_boxes(snapshot, region)


def solved(program: Program, row: int, sign: float = 1.0) -> OptimizeResult:
    return milp(
        sign * program.rows[[row]].toarray()[0],
        integrality=program.binary.astype(int),
        bounds=Bounds(program.lb, program.ub),
        constraints=LinearConstraint(program.matrix, -np.inf, program.limit),
    )


def least(snapshot: Snapshot, region: Region, boxes: Boxes, row: int = 0) -> float:
    program = Program.of(snapshot, region, boxes)
    return float(solved(program, row).fun + program.constants[row])


def image(seed: int = 0, count: int = 1) -> Tensor:
    return torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "block",
    [name for name in (*KINDS, *VARIANTS) if not any(part in name for part in ("sig", "tanh", "silu", "min_max"))],
)
def test_with_the_input_fixed_the_program_has_the_forward_pass_as_its_only_solution(block: str) -> None:
    made = (KINDS | VARIANTS)[block]
    snapshot, region, boxes = problem(network([made, KINDS["conv"], layer(nn.ReLU)], 1), image(), 0.3)
    program = Program.of(snapshot, region, boxes)
    assert program.binary.any()
    point = torch.lerp(region.center - region.radius, region.center + region.radius, image(1).double())
    count = point.numel()
    lb, ub = program.lb.copy(), program.ub.copy()
    lb[:count] = ub[:count] = point.flatten().numpy()
    fixed = dataclasses.replace(program, lb=lb, ub=ub)
    expected = float(snapshot(point)[0, 0])
    for sign in (1.0, -1.0):
        found = solved(fixed, 0, sign)
        assert found.status == 0
        assert sign * found.fun + program.constants[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_minimum_equals_that_of_all_activation_patterns(seed: int) -> None:
    model, eps = dense([3, 5, 3], seed), 0.4
    x = torch.rand(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exact = exact_minima(model, x, eps)
    for row in range(3):
        assert least(*problem(model, x, eps), row) == pytest.approx(float(exact[row]), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_without_splits_the_leaf_is_the_triangle_relaxation(seed: int) -> None:
    model, eps = dense([4, 8, 8, 3], seed), 0.3
    x = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    snapshot, region, boxes = problem(model, x, eps)
    for row in range(3):
        low, point = leaf_lp(snapshot, region, boxes, {}, row)
        assert low == pytest.approx(relaxed_minimum(model, x, eps, row), abs=1e-6)
        assert point is not None and float(snapshot(point.unsqueeze(0))[0, row]) >= low


def patterns(snapshot: Snapshot, boxes: Boxes) -> list[dict[int, Tensor]]:
    """All ways to split the unstable ReLUs."""
    places = [p for p, node in enumerate(snapshot.nodes) if isinstance(node.op, ReLU)]
    masks = [snapshot.nodes[p].op.loose(boxes[snapshot.nodes[p].inputs[0]])[0] for p in places]
    count = int(sum(mask.sum() for mask in masks))
    assert 3 <= count <= 9
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=count):
        left = iter(signs)
        splits = {}
        for place, mask in zip(places, masks, strict=True):
            sign = torch.zeros(mask.shape)
            sign[mask] = torch.tensor([next(left) for _ in range(int(mask.sum()))])
            splits[place] = sign
        found.append(splits)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_leaves_of_a_whole_tree_give_the_exact_minimum(seed: int) -> None:
    model, eps = dense([3, 4, 4, 2], seed), 0.4
    x = torch.rand(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    snapshot, region, boxes = problem(model, x, eps)
    exact = least(snapshot, region, boxes)
    leaves = [leaf_lp(snapshot, region, boxes, splits, 0) for splits in patterns(snapshot, boxes)]
    assert any(math.isinf(low) for low, _ in leaves), "some combinations should be empty"
    low, point = min((leaf for leaf in leaves), key=lambda leaf: leaf[0])
    assert low == pytest.approx(exact, abs=1e-6)
    assert point is not None and float(snapshot(point.unsqueeze(0))[0, 0]) == pytest.approx(exact, abs=1e-6)


def test_splits_that_contradict_each_other_leave_nothing() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0], [1.0]])
    model[0].bias.data = torch.tensor([-0.5, -0.625])
    snapshot, region, boxes = problem(model, torch.full((1, 1), 0.5), 0.5)
    place = next(p for p, node in enumerate(snapshot.nodes) if isinstance(node.op, ReLU))
    low, point = leaf_lp(snapshot, region, boxes, {place: torch.tensor([-1.0, 1.0])}, 0)
    assert low == math.inf and point is None
    low, point = leaf_lp(snapshot, region, boxes, {place: torch.tensor([1.0, -1.0])}, 0)
    assert point is not None and 0.5 - 1e-9 <= float(point) <= 0.625 + 1e-9


def test_a_solver_that_calls_a_program_empty_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eps = dense([4, 8, 8, 3], 0), 0.3
    x = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    snapshot, region, boxes = problem(model, x, eps)
    honest, _ = leaf_lp(snapshot, region, boxes, {}, 0)
    solve, answers = leaf_module._solve, [OptimizeResult(status=leaf_module.INFEASIBLE)]
    monkeypatch.setattr(leaf_module, "_solve", lambda *args: answers.pop() if answers else solve(*args))
    low, point = leaf_lp(snapshot, region, boxes, {}, 0)
    assert not answers and point is not None and low == pytest.approx(honest, abs=1e-6)


def test_the_bound_of_a_leaf_holds_whatever_multipliers_the_solver_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eps = dense([4, 8, 8, 3], 0), 0.3
    x = torch.rand(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    snapshot, region, boxes = problem(model, x, eps)
    honest, _ = leaf_lp(snapshot, region, boxes, {}, 0)
    solve, noise = leaf_module._solve, np.random.default_rng(0)

    def careless(*args: object) -> OptimizeResult:
        found = solve(*args)  # type: ignore[arg-type]
        off = noise.standard_normal(len(found.ineqlin.marginals))
        found.ineqlin.marginals = found.ineqlin.marginals + (0.1 * off if noise.random() < 0.5 else 1e-3 * abs(off))
        found.fun -= 1.0
        return found

    monkeypatch.setattr(leaf_module, "_solve", careless)
    for _ in range(20):
        assert leaf_lp(snapshot, region, boxes, {}, 0)[0] <= honest + 1e-9


@pytest.mark.parametrize("kind", PIECEWISE + ["skip"])
def test_milp_decides_every_example_and_agrees_with_the_cascade(kind: str) -> None:
    model = _narrow(kind)
    x = image(0, 4)
    y = model(x).argmax(1)
    decided = set()
    for eps in (0.01, 0.05):
        exact = MILP()(model, x, y, LinfBall(eps))
        for verdict, other in zip(
            exact, Cascade(last=None, alpha=AlphaCROWN(iterations=3))(model, x, y, LinfBall(eps)), strict=True
        ):
            assert verdict.status in ("certified", "falsified") and verdict.method == "milp"
            assert {verdict.status, other.status} != {"certified", "falsified"}
            if {verdict.status, other.status} == {"certified"}:
                assert verdict.margin_lb >= other.margin_lb - 1e-4
            decided.add(verdict.status)
    assert decided == {"certified", "falsified"}


def _narrow(kind: str) -> nn.Module:
    """A network of some 20 ReLUs, or 9 windows and 8 ReLUs."""
    torch.manual_seed(4)
    pool = nn.MaxPool2d(2, stride=1)
    blocks = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "max_pool": pool, "skip": KINDS["skip"]((1, 4, 4))}
    stem = [nn.Conv2d(2, 1, 3, stride=1, padding=1), nn.AvgPool2d(2, 1), blocks[kind]]
    front = nn.Sequential(*stem, nn.Conv2d(1, 2, 3, stride=1), nn.Flatten(), nn.ReLU())
    hidden = front(image(0)).detach()
    head = nn.Linear(hidden.shape[1], 4)
    # A small margin at the first image, so that the prediction depends on the pixels.
    head.bias.data += torch.tensor([0.02, 0.0, 0.0, 0.0]) - head(hidden).detach()[0]
    return nn.Sequential(front, head).eval()


def test_the_margin_is_the_least_of_any_point() -> None:
    model = _narrow("relu")
    x = image(3)
    y = model(x).argmax(1)
    ball = LinfBall(0.01)
    (verdict,) = MILP()(model, x, y, ball)
    points = ball.sample(x.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    margins = torch.einsum("rk,bk->br", margin_spec(y, 4)[0], model(points)).detach()
    assert verdict.status == "certified" and verdict.margin_lb <= float(margins.min())
    assert float(margins.min()) - verdict.margin_lb < 0.2 * float(margins.max() - margins.min())


def test_what_cannot_be_written_as_a_program_is_refused_in_one_line() -> None:
    x, y = image(), torch.tensor([0])
    with pytest.raises(ValueError, match="l2 ball; this verifier knows linf"):
        MILP()(_narrow("relu"), x, y, L2Ball(0.1))
    model = network([KINDS["tanh"]], 0)
    with pytest.raises(UnsupportedOp, match="SShaped is not piecewise linear; linear programs know") as error:
        MILP()(model, x, model(x).argmax(1), LinfBall(0.1))
    assert "\n" not in str(error.value)
    snapshot, region, boxes = problem(_narrow("relu"), image(0, 2), 0.1)
    with pytest.raises(ValueError, match="one example and an linf ball; got 2 examples"):
        Program.of(snapshot, region, boxes)


def test_without_time_or_room_an_example_stays_unknown() -> None:
    model, x = _narrow("relu"), image()
    y = model(x).argmax(1)
    (verdict,) = MILP(neurons=1)(model, x, y, LinfBall(0.4))
    assert verdict.status == "unknown" and verdict.margin_lb == -math.inf
    (verdict,) = MILP(timeout=0.0)(model, x, y, LinfBall(0.1))
    assert verdict.status == "unknown"


def test_margins_within_the_solvers_tolerance_are_left_unknown() -> None:
    # One neuron, margin 1e-7 at the worst corner: no claim either way can rest on tolerances of 1e-6.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    model[1].weight.data[:], model[1].bias.data[:] = 1.0, -0.5
    model[3].weight.data, model[3].bias.data = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([1e-7, 0.0]).double()
    x = torch.full((1, 1), 0.6, dtype=torch.float64)
    (verdict,) = MILP()(model, x, torch.tensor([0]), LinfBall(0.2))
    assert verdict.status == "unknown"
    model[3].bias.data[0] = 1e-4
    (verdict,) = MILP()(model, x, torch.tensor([0]), LinfBall(0.2))
    assert verdict.status == "certified" and verdict.margin_lb == pytest.approx(1e-4, abs=1e-5)
    model[3].bias.data[0] = -1e-4
    (verdict,) = MILP()(model, x, torch.tensor([0]), LinfBall(0.2))
    assert verdict.status == "falsified"
