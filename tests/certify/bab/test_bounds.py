"""Nothing escapes: bounds of domains, tightened boxes, splits, leaves."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.threat import Ball, L2Ball, LinfBall
from certify.bab.ascent import Point, Task, ascend, bound
from certify.bab.branching import BRANCHINGS, LEAST_GAIN, gap_scores, intercept_scores
from certify.bab.domains import bounded
from certify.bab.dual import backward, forward, minimiser
from certify.bab.search import UNEVEN, Plan, Search
from certify.bab.tighten import tighten
from certify.bab.triangle import Triangle
from certify.branching.babsr import BaBSR
from certify.branching.kfsb import KFSB
from tests.certify.bab.cores import (
    STEMS,
    before,
    evaluated,
    inside,
    random_core,
    random_domains,
    small_core,
    some_core,
    units,
    whole,
)
from tests.certify.networks import KINDS, on_vectors

SEEDS = (0, 1, 2, 3, 4, 5)
"""The core of number 4 has no neurons."""

FULL = (0, 1, 2, 3, 5)

NAMES = [*(f"random {seed}" for seed in SEEDS), *(f"stem {seed}" for seed in STEMS)]

TOLERANCE = 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_no_point_of_a_domain_is_below_its_bound(name: str) -> None:
    core = some_core(name)
    generator = torch.Generator().manual_seed(0)
    u = units(core, 4000, generator)
    z, a = before(core, u)
    domains = random_domains(core, 60, generator, share=min(0.25, 3 / (1 + len(core))))
    met = inside(domains, z)
    for output in core.outputs:
        values = output(u, a)
        for iterations in (0, 5):
            low = evaluated(core, domains, output, iterations).low
            least = torch.where(met, values, math.inf).amin(1)
            assert (low <= least + TOLERANCE * (1 + low.abs())).all()
    assert met.any(1).sum() > 5 or not len(core)


@pytest.mark.parametrize("name", NAMES)
def test_a_bound_is_the_value_along_the_lines_it_chose(name: str) -> None:
    core = some_core(name)
    domains = random_domains(core, 20, torch.Generator().manual_seed(0), share=0.0)
    lines, one = domains.relaxation(core).slopes(domains.alpha), core.lb.new_ones(20)
    for output in core.outputs:
        dual = backward(core, lines, output, one)
        u = minimiser(core, dual.x)
        _, a = forward(core, lines, dual.A, core.input_weight.times(u))
        torch.testing.assert_close(output(u, a), dual.low, rtol=1e-7, atol=1e-7)  # less its allowance


@pytest.mark.parametrize("enough", [0.0, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_minimisers_come_with_what_the_input_adds_there(name: str, enough: float) -> None:
    core = some_core(name)
    output = replace(core.outputs[0], constant=core.outputs[0].constant - 100)  # no domain is finished
    domains = random_domains(core, 20, torch.Generator().manual_seed(0), share=0.1)
    _, found = bounded(core, domains, output, 3, enough)
    assert found.u is not None and found.fed is not None
    torch.testing.assert_close(found.fed, core.input_weight.times(found.u))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_a_bound_is_its_difference_quotient(seed: int) -> None:
    core, _ = random_core(seed)
    domains = random_domains(core, 1, torch.Generator().manual_seed(seed), share=0.5)
    output, h = core.outputs[0], 1e-7

    def low(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        count = alpha.shape[1]
        task = Task(output, sign=domains.sign.expand(-1, count))
        return ascend(core, domains.relaxation(core), task, Point(alpha, beta), 0).low

    found = evaluated(core, domains, output)
    unstable = domains.relaxation(core).unstable
    expected = torch.cat([torch.where(unstable, found.A.clamp(min=0) * found.z, 0.0), -domains.sign * found.z], 1)
    eye = torch.eye(len(core)).double() * h
    base = low(domains.alpha, domains.beta)
    # Bounds are concave and piecewise smooth: at a random point both one-sided quotients are the gradient.
    quotients = torch.stack(
        [
            (low(domains.alpha + eye, domains.beta.expand(-1, len(core))) - base) / h,
            (low(domains.alpha.expand(-1, len(core)), domains.beta + eye * domains.sign.abs().T) - base) / h,
        ],
        1,
    )
    torch.testing.assert_close(quotients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tightened_boxes_hold_every_possible_counterexample(name: str) -> None:
    core = some_core(name)
    generator = torch.Generator().manual_seed(0)
    u = units(core, 20_000, generator)
    z, a = before(core, u)
    for output in core.outputs:
        values = output(u, a)
        # The property is moved so that some sampled points violate it.
        moved = replace(output, constant=output.constant - values.quantile(0.1))
        bad = values <= values.quantile(0.1)
        for number in range(3):
            domains = random_domains(core, 1, generator, share=0.0 if number == 0 else 0.15)
            node = evaluated(core, domains, moved, 10)
            here = bad & inside(node, z)[0]
            found = tighten(core, node, moved, 10, {})
            if found is None:
                assert not here.any()
                continue
            again = tighten(core, replace(node, lb=found.lb, ub=found.ub), moved, 5, found.memory)
            for boxes in (found, again):
                if boxes is None:
                    assert not here.any()
                else:
                    some = z[:, here]
                    assert ((some >= boxes.lb - TOLERANCE) & (some <= boxes.ub + TOLERANCE)).all()


def test_tightening_widens_by_the_slack() -> None:
    core, _ = random_core(1)
    node = evaluated(core, whole(core), core.outputs[0], 5)
    found = [tighten(replace(core, slack=core.slack * share), node, core.outputs[0], 5, {}) for share in (0.0, 1e9)]
    exact, wide = found
    assert exact is not None and wide is not None
    assert (wide.ub - wide.lb).sum() > (exact.ub - exact.lb).sum()


def test_the_multipliers_of_splits_pay_for_the_slack() -> None:
    core, _ = random_core(1)
    domains = random_domains(core, 10, torch.Generator().manual_seed(0))
    exact, wide = (replace(core, slack=torch.full_like(core.slack, slack)) for slack in (0.0, 0.5))
    low = [evaluated(some, domains, core.outputs[0]).low for some in (exact, wide)]
    torch.testing.assert_close(low[0] - low[1], 0.5 * domains.beta.sum(0))


@pytest.mark.parametrize("seed", FULL)
def test_both_children_cover_their_parent(seed: int) -> None:
    core, _ = random_core(seed)
    generator = torch.Generator().manual_seed(seed)
    domains = random_domains(core, 8, generator, share=0.2)
    unstable = domains.relaxation(core).unstable
    some = unstable.any(0).nonzero().flatten()
    domains = domains[some]
    neurons = unstable[:, some].double().argmax(0)
    children = domains.halves(neurons)
    z, _ = before(core, units(core, 3000, generator))
    whole_, parts = inside(domains, z), inside(children, z).view(2, len(domains), -1)
    assert (whole_ == parts.any(0)).all()
    for place, neuron in enumerate(neurons.tolist()):
        ends = [
            (float(children.lb[neuron, child]), float(children.ub[neuron, child]))
            for child in (place, place + len(domains))
        ]
        assert ends == [(0.0, float(domains.ub[neuron, place])), (float(domains.lb[neuron, place]), 0.0)]


@pytest.mark.parametrize("name", sorted(BRANCHINGS.names()))
def test_branching_picks_unstable_neurons_or_none(name: str) -> None:
    rule = BRANCHINGS.parse(name)
    for seed in SEEDS:
        core, _ = random_core(seed)
        domains = random_domains(core, 12, torch.Generator().manual_seed(seed), share=0.6)
        domains = evaluated(core, domains, core.outputs[0], 2)
        unstable = domains.relaxation(core).unstable
        neurons = rule(core, domains, core.outputs[0]).neurons
        for column, neuron in enumerate(neurons.tolist()):
            assert unstable[neuron, column] if neuron >= 0 else not unstable[:, column].any()
        decided = replace(domains, lb=domains.ub.clamp(min=0), ub=domains.ub.clamp(min=0))
        assert (rule(core, decided, core.outputs[0]).neurons == -1).all()


@pytest.mark.parametrize("seed", FULL)
@pytest.mark.parametrize("candidates", [1, 3])
def test_kfsb_picks_the_best_candidate_and_bounds_its_children(seed: int, candidates: int) -> None:
    core, _ = random_core(seed)
    domains = random_domains(core, 12, torch.Generator().manual_seed(seed), share=0.3)
    output = replace(core.outputs[0], constant=core.outputs[0].constant - 100)  # nothing is proven
    domains = evaluated(core, domains, output, 2)
    split = KFSB(candidates)(core, domains, output)
    relaxation = domains.relaxation(core)
    scores = (intercept_scores(domains, relaxation), gap_scores(core, domains, relaxation))
    for column in (split.neurons >= 0).nonzero().flatten().tolist():
        domain = domains[column : column + 1]
        gains = {}
        for neuron in torch.cat([s[:, column].topk(min(candidates, len(core))).indices for s in scores]).tolist():
            if relaxation.unstable[neuron, column]:
                low = evaluated(core, domain.halves(torch.tensor([neuron])), output).low
                gains[neuron] = float((low - domain.low).clamp(min=LEAST_GAIN).prod())
        assert gains[int(split.neurons[column])] == pytest.approx(max(gains.values()), rel=1e-6)
    some = (split.neurons >= 0).nonzero().flatten()
    children = domains[some].halves(split.neurons[some])
    task, start = Task(output, sign=children.sign), Point(children.alpha, children.beta)
    expected = bound(core, children.relaxation(core), task, start)
    assert split.dual is not None
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(split.dual, name), value, rtol=1e-9, atol=1e-9)
    known, unknown = (bounded(core, children, output, 2, 0.0, dual)[0] for dual in (split.dual, None))
    for name, value in vars(unknown).items():
        torch.testing.assert_close(getattr(known, name), value, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_size_of_a_tree_is_foreseen_from_the_progress_of_its_splits() -> None:
    """Every split raises the bound by 1/8 of the gap, and the 16 children of 4 splits are open."""
    core, _ = random_core(0)
    root = replace(whole(core), low=torch.tensor([-1.0]))
    open_ = replace(whole(core, 16), low=torch.full((16,), -0.5))
    open_.sign[:4] = 1.0
    search = Search(core, core.outputs[0], 1.0, Plan(KFSB(), KFSB(), batch=8), math.inf)
    assert not search.hopeless(root, [open_], 30, 30 + UNEVEN * 16 * 2**5 + 1)
    assert search.hopeless(root, [open_], 30, 30 + UNEVEN * 16 * 2**5 - 1)
    assert not search.hopeless(root, [open_], 7, 100)  # too early to say
    stuck = replace(open_, low=torch.full((16,), -1.0))
    assert search.hopeless(root, [stuck], 30, 1e30)


@pytest.mark.parametrize("name", sorted(BRANCHINGS.names()))
def test_branching_on_a_core_without_neurons_picks_none(name: str) -> None:
    core, _ = random_core(4)
    assert not len(core)
    domains = evaluated(core, whole(core, 3), core.outputs[0])
    assert BRANCHINGS.parse(name)(core, domains, core.outputs[0]).neurons.tolist() == [-1] * 3


@pytest.mark.parametrize("seed", FULL)
def test_the_least_leaf_is_the_least_point(seed: int) -> None:
    core, _ = random_core(seed)
    generator = torch.Generator().manual_seed(seed)
    u = units(core, 3000, generator)
    z, a = before(core, u)
    output, values = core.outputs[0], core.outputs[0](u, a)
    unstable = ((core.lb < 0) & (core.ub > 0))[:, 0]
    patterns, which = (z > 0).T.unique(dim=0, return_inverse=True)
    for number in values.argsort()[:20].tolist():
        positive = patterns[which[number]]
        sign = torch.where(unstable, positive.double() * 2 - 1, 0.0).unsqueeze(1)
        root = whole(core)
        lb, ub = torch.where(sign > 0, 0.0, root.lb), torch.where(sign < 0, 0.0, root.ub)
        found = Triangle(core, output).minimum(*(end[:, 0].numpy() for end in (lb, ub)))
        low, point = found.low, found.u
        mine = which == which[number]
        assert low <= values[mine].min() + TOLERANCE
        assert point is not None
        assert float(output(point, core.evaluate(point))) == pytest.approx(low, abs=1e-5)


def test_a_leaf_without_points_has_an_infinite_minimum() -> None:
    core, _ = random_core(0)
    z, _ = before(core, units(core, 20_000, torch.Generator().manual_seed(0)))
    root = whole(core)
    seen = {tuple(column) for column in (z > 0).T.unique(dim=0).tolist()}
    generator, empty = torch.Generator().manual_seed(1), 0
    for _ in range(20):
        positive = torch.rand(len(core), generator=generator) < 0.5
        positive = torch.where(core.lb[:, 0] >= 0, True, torch.where(core.ub[:, 0] <= 0, False, positive))
        sign = (positive.double() * 2 - 1).unsqueeze(1)
        lb, ub = (
            torch.where(sign > 0, root.lb.clamp(min=0), root.lb),
            torch.where(sign < 0, root.ub.clamp(max=0), root.ub),
        )
        low = Triangle(core, core.outputs[0]).minimum(*(end[:, 0].numpy() for end in (lb, ub))).low
        empty += low == math.inf
        assert low < math.inf or tuple(positive.tolist()) not in seen
    assert empty > 0


@pytest.mark.parametrize("seed", FULL)
def test_a_leaf_that_could_still_be_split_is_not_lost(seed: int) -> None:
    core, _ = random_core(seed)
    output = core.outputs[0]
    u = units(core, 3000, torch.Generator().manual_seed(seed))
    least = float(output(u, core.evaluate(u)).min())
    relaxed = Triangle(core, output).minimum(core.lb[:, 0].numpy(), core.ub[:, 0].numpy()).low
    assert relaxed < least - 1e-3
    moved = replace(output, constant=output.constant - (least + relaxed) / 2)
    search = Search(core, moved, 1e-6, Plan(KFSB(), BaBSR()), time.perf_counter() + 20)
    search.leaf(search.root())
    assert search.stuck


@pytest.mark.parametrize("tighten_iterations", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_search_says_holds_at_every_point(name: str, tighten_iterations: int) -> None:
    core = some_core(name)
    u = units(core, 20_000, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs])
    for number, output in enumerate(core.outputs):
        for share in (0.0, 0.05):
            # Near the true minimum both answers are hard to get.
            offset = values[number].min() - share * (values[number].max() - values[number].min())
            moved = replace(output, constant=output.constant - offset)
            plan = Plan(KFSB(), BaBSR(), tighten_iterations=tighten_iterations, batch=8)
            result = Search(core, moved, 1e-6, plan, (deadline := time.perf_counter() + 2)).run()
            least = float((values[number] - offset).min())
            assert result.low <= least + TOLERANCE
            if result.proven:
                assert least > 0
            elif result.witness is not None:
                assert float(moved(result.witness, core.evaluate(result.witness))) <= 0
            else:
                assert result.doubtful or time.perf_counter() > deadline


@pytest.mark.parametrize("name, ball", [("sigmoid", LinfBall(0.2)), ("tanh", L2Ball(0.5)), ("relu", L2Ball(2.0))])
def test_what_no_split_helps_to_decide_is_not_proven(name: str, ball: Ball) -> None:
    few = on_vectors(lambda inputs: (nn.Linear(inputs, 8), 8))
    core, _ = small_core([few, KINDS[name], few], 0, ball)
    u = core.inside(units(core, 4000, torch.Generator().manual_seed(0)))
    plan = Plan(KFSB(), BaBSR(), tighten_iterations=0)
    stuck = 0
    for output in core.outputs[:2]:
        root = float(Search(core, output, 1e-6, plan, math.inf).root().low)
        least = float(output(u, core.evaluate(u)).min())
        # From a property that a point refutes to one that the root proves; between them lines are too coarse.
        for share in (0.1, 0.5, 1.01):
            moved = replace(output, constant=output.constant - least + share * (least - root))
            result = Search(core, moved, 1e-6, plan, time.perf_counter() + 20).run()
            assert result.proven == (result.low > 0)
            stuck += not result.proven and result.witness is None
        assert result.proven
    assert stuck
