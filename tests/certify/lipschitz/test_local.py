"""Local Lipschitz constants: points and pairs of points must not escape them; known answers; errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify.bounds.jacobian import DUAL
from certify.lipschitz.local import METHODS, jacobian_bounds, local_lipschitz, monotone_features
from certify.lipschitz.problem import posed
from certify.lipschitz.radius import certified_radius
from certify.lipschitz.search import Search, proven_norms
from certify.op import UnsupportedOp
from certify.spec import margin_spec
from certify.tracing import capture
from tests.certify.lipschitz.nets import box, by_brute_force, cloud, difference_of_relus, family, jacobians, mlp
from tests.certify.networks import CLASSES, INPUT, KINDS, VARIANTS, layer, network, pair, sandwich

QUICK = Search(samples=8, rounds=1, moves=4)
TIGHT = 1 + 1e-9
SIZES = ([2, 5, 2], [3, 6, 5, 2], [4, 4, 4, 4, 3], [1, 8, 3])


def check_random_nets(sizes: list[int], seeds: range) -> None:
    """No derivative at a sampled point, no difference quotient and no attained value above an upper bound; the order.

    Branch and bound ends, at a value that is attained.
    """
    nets = family(sizes, seeds)
    points = nets.sample(40, seeds[0]).requires_grad_()
    outputs = nets(points)
    slopes = [torch.autograd.grad(outputs[..., k].sum(), points, retain_graph=True)[0] for k in range(sizes[-1])]
    change = (outputs - nets(nets.x.unsqueeze(1))).detach().abs()
    # The last digits of two outputs differ even where a network is constant.
    change = (change - 1e-14 * (1 + outputs.detach().abs())).clamp(min=0)
    distance = (points.detach() - nets.x.unsqueeze(1)).abs().amax(2, keepdim=True)
    floor = torch.maximum(torch.stack(slopes, 2).abs().sum(3).amax(1), (change / distance).amax(1))
    # Not by `local_lipschitz`, which cuts what is attained at the upper bound.
    problem = posed(nets.together, nets.x, nets.ball, None, None, QUICK)
    with torch.no_grad():
        bab, attained = METHODS["bab"](problem, timeout=600.0)
        chain = [bab, *(METHODS[name](problem)[0] for name in ("crown", "recurjac"))]
        chain += [METHODS["interval"](problem, states=states)[0] for states in ("crown", "interval")]
    assert bool((bab <= attained * (1 + 1e-6) + 1e-12).all())
    for ub in chain:
        assert seeds_where(ub * TIGHT < torch.maximum(floor, attained), seeds) == []
    for less, more in itertools.pairwise(chain):
        assert seeds_where(less > more * TIGHT, seeds) == []


def seeds_where(wrong: Tensor, seeds: range) -> list[int]:
    return [seeds[i] for i in wrong.any(1).nonzero().flatten().tolist()]


@pytest.mark.parametrize("sizes", SIZES)
def test_no_derivative_of_random_nets_escapes(sizes: list[int]):
    check_random_nets(sizes, range(50))


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(0, 10_000, 2_000))
@pytest.mark.parametrize("kind", range(len(SIZES)))
def test_no_derivative_of_ten_thousand_random_nets_escapes(kind: int, begin: int):
    check_random_nets(SIZES[kind], range(begin + kind, begin + 2_000, len(SIZES)))


def test_networks_in_a_batch_are_bounded_as_one_by_one():
    for sizes in SIZES[1:3]:
        nets = family(sizes, range(2))
        for method in METHODS:
            together = local_lipschitz(nets.together, nets.x, nets.ball, method).ub
            for i, ub in enumerate(together):
                x, ball = box(sizes, i)
                assert torch.allclose(local_lipschitz(mlp(sizes, i), x, ball, method).ub[0], ub, rtol=1e-9), method


def wide(model: nn.Module) -> nn.Module:
    return model.double().eval()


OPS = [(name, LinfBall(0.1)) for name in (*KINDS, *VARIANTS)]
OTHER_BALLS = [
    (name, ball)
    for name in ("conv", "tanh", "max_pool", "skip", "min_max", "silu")
    for ball in (L2Ball(0.4), L1Ball(1.0))
]


@pytest.mark.parametrize(("name", "ball"), OPS + OTHER_BALLS, ids=lambda v: v if isinstance(v, str) else v.norm)
def test_no_derivative_of_any_op_escapes_its_entry_bounds(name: str, ball: Ball):
    model = wide(pair("relu", name, 1) if name in KINDS else sandwich(name, 1))
    x = torch.rand(1, *INPUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    points = cloud(x, ball, 60)
    rows = torch.eye(CLASSES, dtype=torch.float64)
    truth = jacobians(model, points, rows)
    for method in ("interval", "crown"):
        bounds = jacobian_bounds(model, x, ball, method)
        assert bool((bounds.lb[0] <= truth.amin(0) + 1e-9).all()) and bool((truth.amax(0) <= bounds.ub[0] + 1e-9).all())
        found = local_lipschitz(model, x, ball, method, search=QUICK)
        norms = torch.linalg.vector_norm(truth.flatten(2), DUAL[ball.norm], dim=2).amax(0)
        assert bool((norms <= found.ub[0] * TIGHT + 1e-12).all()) and bool((found.lb <= found.ub).all())


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "max_pool", "skip"])
def test_bounds_at_a_point_are_the_derivative(name: str):
    model = wide(pair(name, "conv", 2))
    x = torch.rand(2, *INPUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = torch.stack([jacobians(model, x[i : i + 1], torch.eye(CLASSES, dtype=torch.float64))[0] for i in range(2)])
    bounds = jacobian_bounds(model, x, LinfBall(0.0))
    assert torch.allclose(bounds.lb, truth, atol=1e-9) and torch.allclose(bounds.ub, truth, atol=1e-9)
    found = local_lipschitz(model, x, LinfBall(0.0))
    assert torch.allclose(found.ub, truth.flatten(2).abs().sum(2)) and torch.allclose(found.lb, found.ub)


@pytest.mark.parametrize("seed", range(8))
def test_exact_and_branch_and_bound_equal_brute_force(seed: int):
    sizes = [[2, 5, 2], [3, 3, 2, 2], [1, 6, 1], [2, 3, 3, 2]][seed % 4]
    model = mlp(sizes, 50 + seed)
    x, ball = box(sizes, 50 + seed)
    truth = by_brute_force(model, x, float(ball.eps))
    for method in ("exact", "bab"):
        found = local_lipschitz(model, x, ball, method)
        assert torch.allclose(found.ub[0], truth, rtol=1e-7, atol=0)
        assert torch.allclose(found.lb[0], truth, rtol=1e-7, atol=0)


def test_hand_cases():
    x, ball = torch.zeros(1, 1, dtype=torch.float64), LinfBall(1.0, None)
    for method in ("crown", "bab", "exact"):
        assert local_lipschitz(difference_of_relus(1.0), x, ball, method).ub.item() == pytest.approx(1)
    # x itself: bounds that take the two indicators for independent stop at 2.
    assert local_lipschitz(difference_of_relus(-1.0), x, ball, "crown").ub.item() == pytest.approx(2)
    for method, options in (("bab", {}), ("bab", {"split": "input"}), ("exact", {})):
        found = local_lipschitz(difference_of_relus(-1.0), x, ball, method, **options)
        assert found.ub.item() == pytest.approx(1) == found.lb.item(), (method, options)


def test_a_kink_is_in_clarkes_set():
    # relu at 0: slopes 0 and 1 both count, although autograd answers 0 there; and nothing is claimed to be attained.
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1)).double()
    model[0].weight.data.fill_(1.0), model[2].weight.data.fill_(1.0)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for method in ("interval", "recurjac", "crown"):
        assert local_lipschitz(model, zero, LinfBall(0.0, None), method).ub.item() == 1
        # The box touches the kink from the inactive side.
        assert local_lipschitz(model, zero - 0.5, LinfBall(0.5, None), method).ub.item() == 1
    # x - (relu(x) - relu(-x)) is 0, but autograd's value at 0 is 1.
    graph = capture(Cancelled().double(), zero).snapshot()
    assert proven_norms(graph, zero, torch.ones(1, 1, dtype=torch.float64), "linf").item() == 0


class Cancelled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - (torch.relu(x) - torch.relu(-x))


def test_constant_and_linear_networks():
    x, ball = torch.rand(3, 4, dtype=torch.float64), LinfBall(0.1)
    linear = mlp([4, 3], 0)
    constant = mlp([4, 5, 3], 0)
    constant[2].weight.data.zero_()
    for method in METHODS:
        assert torch.equal(local_lipschitz(constant, x, ball, method).ub, torch.zeros(3, 3, dtype=torch.float64)), (
            method
        )
        found = local_lipschitz(linear, x, ball, method)
        assert torch.allclose(found.ub, linear[0].weight.abs().sum(1).expand(3, 3)), method
        assert torch.allclose(found.lb, found.ub), method


def test_margins_are_rows_and_batches_are_independent():
    model = mlp([3, 8, 8, 4], 3)
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    ball = LinfBall(torch.tensor([0.05, 0.1, 0.2, 0.3, 0.0]))
    spec = margin_spec(y, 4, torch.float64)
    for method in ("interval", "crown", "bab"):
        together = local_lipschitz(model, x, ball, method, spec)
        assert together.ub.shape == together.lb.shape == (5, 3)
        for i in range(5):
            alone = local_lipschitz(model, x[i : i + 1], LinfBall(float(ball.eps[i])), method, spec[i : i + 1])
            assert torch.allclose(alone.ub[0], together.ub[i], rtol=1e-6), method
    logits = local_lipschitz(model, x, ball, "crown").ub
    margins = local_lipschitz(model, x, ball, "crown", spec).ub
    others = torch.stack([torch.arange(4)[torch.arange(4) != label] for label in y])
    assert bool((margins <= logits.gather(1, y.unsqueeze(1)) + logits.gather(1, others) + 1e-9).all())


def test_memory_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    model = wide(network([KINDS["relu"], KINDS["conv"], KINDS["relu"]], 0))
    x = torch.rand(3, *INPUT, dtype=torch.float64)
    whole = local_lipschitz(model, x, LinfBall(0.05), search=QUICK)
    monkeypatch.setattr("certify.lipschitz.linear.NUMBERS", 500)
    monkeypatch.setattr("certify.bounds.crown.ROW_BUDGET_ON_CPU", 2_000)
    monkeypatch.setattr("certify.lipschitz.search.NUMBERS", 500)
    parts = local_lipschitz(model, x, LinfBall(0.05), search=QUICK)
    assert torch.allclose(whole.ub, parts.ub, rtol=1e-12)


CHAINS = {
    "relu after relu": [layer(nn.ReLU), layer(nn.ReLU)],
    "branches": [VARIANTS["residual_of_residual"], layer(nn.ReLU)],
    "smooth": [KINDS["tanh"], KINDS["conv"], KINDS["leaky_relu"]],
    "pooled": [KINDS["relu"], VARIANTS["conv_stride"], KINDS["relu"], KINDS["avg_pool"], KINDS["relu"]],
}


@pytest.mark.parametrize(
    ("norm", "method"), [("linf", "crown"), ("linf", "recurjac"), ("l2", "crown"), ("l1", "crown")]
)
@pytest.mark.parametrize("name", CHAINS)
def test_bounds_by_the_core_are_those_by_the_layers(name: str, norm: str, method: str, monkeypatch: pytest.MonkeyPatch):
    model = wide(network(CHAINS[name], 0))
    x = torch.rand(2, *INPUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    spec = margin_spec(torch.tensor([0, 2]), CLASSES, torch.float64)
    found = []
    for dear in (math.inf, 0):
        monkeypatch.setattr("certify.lipschitz.linear.DEAR", dear)
        found.append(local_lipschitz(model, x, LinfBall(0.1), method, spec, norm=norm, search=Search(samples=0)).ub)
    assert torch.allclose(*found, rtol=1e-10, atol=0)
    monkeypatch.setattr("certify.bounds.crown.ROW_BUDGET_ON_CPU", 30_000)
    parts = local_lipschitz(model, x, LinfBall(0.1), method, spec, norm=norm, search=Search(samples=0)).ub
    assert torch.allclose(parts, found[1], rtol=1e-12, atol=0)


def test_only_networks_of_open_gates_have_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("certify.lipschitz.linear.DEAR", 0)
    used = []
    monkeypatch.setattr(
        "certify.lipschitz.linear.shared_row_norms", lambda graph, rows, *_: used.append(graph) or rows[:, 0]
    )
    x = torch.rand(1, *INPUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for name, expected in (("relu", 1), ("tanh", 1), ("max_pool", 0), ("min_max", 0)):
        used.clear()
        local_lipschitz(wide(network([(KINDS | VARIANTS)[name]], 0)), x, LinfBall(0.1), search=Search(samples=0))
        assert len(used) == expected, name
    used.clear()
    monkeypatch.setattr("certify.bounds.jacobian_core.MOST_OPEN", 3)
    local_lipschitz(wide(network([KINDS["relu"]], 0)), x, LinfBall(0.1), search=Search(samples=0))
    assert not used


def test_optimised_slopes_are_never_worse():
    model = mlp([4, 20, 20, 20, 3], 4)
    x, ball = torch.rand(2, 4, dtype=torch.float64), LinfBall(0.2)
    plain = local_lipschitz(model, x, ball, "crown").ub
    tight = local_lipschitz(model, x, ball, "crown", states="alpha_crown", iterations=10).ub
    assert bool((tight <= plain * TIGHT).all()) and bool((tight < 0.999 * plain).any())


def test_branch_and_bound_is_valid_at_every_moment():
    model = mlp([3, 10, 10, 2], 7)
    x, ball = torch.zeros(1, 3, dtype=torch.float64), LinfBall(0.6, None)
    truth = local_lipschitz(model, x, ball, "exact").ub
    history: list[tuple[Tensor, Tensor]] = []
    found = local_lipschitz(model, x, ball, "bab", batch_size=4, on_bound=lambda ub, lb: history.append((ub, lb)))
    assert len(history) > 5 and torch.allclose(found.ub, truth, rtol=1e-7)
    for ub, lb in history:
        assert bool((lb <= truth * TIGHT).all()) and bool((truth <= ub * TIGHT).all())
    for (before, _), (after, _) in itertools.pairwise(history):
        assert bool((after <= before).all())
    stopped = local_lipschitz(model, x, ball, "bab", timeout=0.0)
    assert bool((stopped.ub >= truth / TIGHT).all()) and bool((stopped.ub > 1.01 * truth).any())


def test_splitting_inputs_tightens_smooth_networks():
    model = mlp([2, 6, 6, 2], 5, nn.Tanh)
    x, ball = torch.zeros(1, 2, dtype=torch.float64), LinfBall(0.5, None)
    root = local_lipschitz(model, x, ball, "crown").ub
    found = local_lipschitz(model, x, ball, "bab", timeout=60.0, tolerance=0.01)
    assert bool((found.ub <= found.lb * 1.011).all()) and bool((found.ub < 0.9 * root).any())
    truth = jacobians(model, cloud(x, ball, 4000), torch.eye(2, dtype=torch.float64)).abs().sum(2).amax(0)
    assert bool((truth <= found.ub[0] * TIGHT).all())


@pytest.mark.parametrize("options", [{"kernel_size": 2, "stride": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}])
def test_who_is_the_maximum_of_a_window_is_known_only_where_it_is_sure(options: dict):
    model = nn.Sequential(nn.MaxPool2d(**options), nn.Flatten()).double()
    seen = set()
    for seed in range(20):
        x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ball = LinfBall(0.05, None)
        rows = torch.eye(model(x).shape[1], dtype=torch.float64)
        truth = jacobians(model, cloud(x, ball, 400), rows)
        bounds = jacobian_bounds(model, x, ball)
        assert bool((bounds.lb[0] <= truth.amin(0)).all()) and bool((truth.amax(0) <= bounds.ub[0]).all())
        seen |= {(float(a), float(b)) for a, b in zip(bounds.lb.flatten(), bounds.ub.flatten(), strict=True)}
    assert seen == {(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)}


def test_proven_monotony_holds_between_points():
    model = mlp([3, 12, 3], 1)
    model[0].weight.data[:, 0].abs_(), model[2].weight.data[0].abs_(), model[2].weight.data[1].abs_().neg_()
    x, ball = torch.zeros(1, 3, dtype=torch.float64), LinfBall(1.0, None)
    signs = monotone_features(model, x, ball)
    assert signs[0, 0, 0] == 1 and signs[0, 1, 0] == -1 and not bool(signs[0, :, 1:].all())
    low, high = cloud(x, ball, 500), cloud(x, ball, 500, 1)
    for feature in range(3):
        a, b = low.clone(), low.clone()
        a[:, feature] = torch.minimum(low[:, feature], high[:, feature])
        b[:, feature] = torch.maximum(low[:, feature], high[:, feature])
        rise = model(b) - model(a)
        assert bool((rise * signs[0, :, feature] >= -1e-12).all())


@pytest.mark.parametrize("ball", [LinfBall(0.2), L2Ball(0.4), L1Ball(0.6)], ids=lambda b: b.norm)
def test_no_point_within_the_certified_radius_changes_the_prediction(ball: Ball):
    model = mlp([4, 12, 12, 3], 9)
    x = torch.rand(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3
    radii = certified_radius(model, x, y, ball)
    assert radii[0] == 0 and bool((radii[1:] > 0).all()) and bool((radii <= float(ball.eps)).all())
    for i in range(1, 10):
        points = cloud(x[i : i + 1], type(ball)(float(radii[i])), 2000)
        assert bool((model(points).argmax(1) == y[i]).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lipmip"}, "no method 'lipmip' for local Lipschitz constants; known: interval, recurjac, crown"),
        ({"norm": "l3"}, "no Lipschitz constant for distances in 'l3'; known norms: linf, l2, l1"),
        ({"spec": torch.ones(2, 4)}, r"spec must be \[B, R, K\] = \[2, R, 3\], got \(2, 4\)"),
        ({"states": "milp"}, "no bounds 'milp' before the activations; known: interval, crown, alpha_crown"),
        ({"iterations": 3}, 'iterations=3 is of states="alpha_crown"'),
        ({"method": "bab", "split": "both"}, 'split must be "relu" or "input", got \'both\''),
        ({"method": "exact", "ball": L2Ball(0.1)}, "exact enumerates the cells of a box, not of an l2 ball; use bab"),
        ({"method": "exact", "most": 1}, "more than 1 linear pieces at a time; use bab"),
        ({"x": torch.zeros(0, 3)}, r"x holds no examples: its shape is \(0, 3\)"),
        ({"x": torch.zeros(0, 3), "method": "crown"}, "x holds no examples"),
        ({"x": torch.full((2, 3), 7.0)}, r"x has values from 7 to 7, outside the pixel range \[0, 1\]"),
    ],
)
def test_a_wrong_call_gets_one_clear_line(arguments: dict, message: str):
    problem = {"x": torch.full((2, 3), 0.5), "ball": LinfBall(0.5), **arguments}
    with pytest.raises(ValueError, match=message):
        local_lipschitz(mlp([3, 8, 3], 0), **problem)


def test_unsupported_ops_are_named():
    with pytest.raises(UnsupportedOp, match=r"no bound rule for nn\.GELU"):
        local_lipschitz(nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.GELU()), torch.rand(1, 4), LinfBall(0.1))
    smooth = mlp([2, 3, 2], 0, nn.Tanh)
    with pytest.raises(UnsupportedOp, match="exact knows networks of affine ops and ReLUs; node '_1' is another"):
        local_lipschitz(smooth, torch.rand(1, 2), LinfBall(0.1), "exact")
