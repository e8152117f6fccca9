"""Attempts to escape what a core in float32 says: its slack, its linear programs, its tightened boxes, its proofs.

The truth is the network of the same weights in float64. The first layers have large weights that cancel, and rows that
are sums of others, so that some cells between their hyperplanes are no wider than a rounding error.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.bab.domains import bounded
from certify.bab.matrix import Chained
from certify.bab.search import Plan, Result, Search
from certify.bab.tighten import tighten
from certify.bab.triangle import Triangle
from certify.bab.unstable_core import Core, core_of
from certify.bounds.crown import intermediate_boxes
from certify.branching.babsr import BaBSR
from certify.branching.kfsb import KFSB
from certify.precision import ALLOWANCES, rounding_size
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from certify.verifiers.bab import BranchAndBound
from tests.certify.bab.cores import STEMS, before, stem_problem, units, whole

SCALES = (1.0, 1e3)
SEEDS = (0, 1, 2)
INPUTS = 2

EPS = 3 / 16
"""Both precisions have the same box, and weights times this radius are rounded in float32."""


def thin(seed: int, scale: float) -> nn.Sequential:
    """A network in float32; every third neuron of a hidden layer is the rounded sum of the two before it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    for place, factor in ((0, scale), (2, scale), (4, 1 / scale)):
        layer = model[place]
        layer.weight.data *= 2 * factor
        if place == 0:
            layer.bias.data = -layer.weight.data @ (torch.rand(INPUTS) * 0.2 + 0.4)
        if place < 4:
            for rows in (layer.weight.data, layer.bias.data):
                rows[2::3] = rows[::3] + rows[1::3]
    return model.eval()


def cores(seed: int, scale: float) -> tuple[Core, Core, Tensor]:
    """(core in float32, core in float64 with the same neurons, rounding sizes of the rows in float32)."""
    return both(thin(seed, scale), torch.full((1, INPUTS), 0.5), LinfBall(EPS))


def both(model: nn.Module, x: Tensor, ball: LinfBall) -> tuple[Core, Core, Tensor]:
    """The same for any network."""
    label = model(x).argmax(1)
    made = []
    boxes = None
    for dtype in (torch.float32, torch.float64):
        network = copy.deepcopy(model).to(dtype)
        snapshot = capture(network, x.to(dtype)).snapshot().without_gradient()
        snapshot, region = snapshot.with_spec(margin_spec(label, 3, dtype)), Region.around(x.to(dtype), ball)
        if boxes is None:
            boxes, size = intermediate_boxes(snapshot, region), rounding_size(snapshot, region)[0]
        cast = {place: type(box)(box.lb.to(dtype), box.ub.to(dtype)) for place, box in boxes.items()}
        made.append(core_of(snapshot, region, cast))
    return made[0], made[1], size


def near_edges(core: Core, count: int, seed: int) -> Tensor:
    """Points u `[M, count]`, most of them so close to where neurons switch that float32 cannot tell."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(INPUTS, count, generator=generator, dtype=torch.float64) * 2 - 1
    first = core.layers[0].part
    weight, bias = core.input_weight.whole[first], core.bias[first]
    for column in range(count // 4, count):
        some = torch.randperm(len(weight), generator=generator)[: int(torch.randint(1, 3, (), generator=generator))]
        if column % 2:
            # Two neurons and their rounded sum: here it can have the sign that they both have not.
            some = 3 * (some[:1] // 3) + torch.arange(2)
        off = torch.linalg.pinv(weight[some]) @ (weight[some] @ u[:, column : column + 1] + bias[some])
        noise = torch.randn(INPUTS, 1, generator=generator, dtype=torch.float64) * 10.0 ** -(6 + column % 5)
        u[:, column : column + 1] -= off + noise
    return u[:, (u.abs() <= 1).all(0)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", SEEDS)
def test_neurons_of_the_network_lie_within_the_slack_of_the_core(seed: int, scale: float) -> None:
    core, exact, _ = cores(seed, scale)
    assert_slack_covers_the_core(core, exact, near_edges(exact, 400, seed))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", STEMS)
def test_neurons_behind_a_stem_do_too(seed: int, scale: float) -> None:
    model, x, ball = stem_problem(seed)
    for layer, factor in ((model[0], scale), (model[2], 1 / scale)):
        layer.weight.data *= factor
        layer.bias.data *= scale if layer is model[0] else 1
    core, exact, _ = both(model, x, ball)
    assert isinstance(core.input_weight, Chained)
    assert_slack_covers_the_core(core, exact, units(exact, 400, torch.Generator().manual_seed(seed)))


def assert_slack_covers_the_core(core: Core, exact: Core, u: Tensor) -> None:
    """The neurons of `exact` are where those that `core` computes are, up to its slack, and not exactly there."""
    z, _ = before(exact, u)
    read = [core.input_weight.whole.double() @ u]
    if isinstance(core.input_weight, Chained):
        front, near, deep = core.input_weight.front.whole.double() @ u, core.input_weight.near, core.input_weight.deep
        read.append(torch.cat([front[:near], deep.whole.double() @ front[near:]]))
    for product in read:
        a = torch.empty_like(z)
        values = core.bias.double().repeat(1, u.shape[1])
        values[: len(product)] += product
        for layer in core.layers:
            values[layer.part] += layer.weight.whole.double() @ a[layer.reads]
            a[layer.part] = layer.op.forward(values[layer.part])
        off = (values - z).abs().amax(1, keepdim=True)
        assert (off <= core.slack).all()
        assert (off > 0).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_cell_that_holds_a_point_is_empty_or_bounded_above_it(seed: int, scale: float) -> None:
    core, exact, size = cores(seed, scale)
    u = near_edges(exact, 120, seed)
    z, a = before(exact, u)
    root = whole(core)
    output = core.outputs[0]
    threshold = float(size[0]) * ALLOWANCES[torch.float32][1]
    values = exact.outputs[0](u, a)
    triangle = Triangle(core, output)
    # As splits make the cells; neurons that the boxes call stable are left to the boxes.
    unstable = (root.lb < 0) & (root.ub > 0)
    sign = torch.where(unstable, torch.where(z > 0, 1.0, -1.0), 0.0).float()
    lb, ub = torch.where(sign > 0, 0.0, root.lb), torch.where(sign < 0, 0.0, root.ub)
    for column in range(0, u.shape[1], 3):
        found = triangle.minimum(*(end[:, column].double().numpy() for end in (lb, ub)))
        assert found.low <= float(values[column]) + threshold, "the program of a cell"
    cells = whole(core, u.shape[1])
    cells = replace(cells, sign=sign, lb=lb, ub=ub, low=cells.low.expand(u.shape[1]).clone())
    for _ in range(3):
        cells = bounded(core, cells, output, 60, math.inf)[0]
        assert (cells.low <= values + threshold).all(), "the dual bound of a cell"
        # Multipliers under which the bound of an empty domain grows without limit.
        cells = replace(cells, beta=100 * cells.beta)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", SEEDS)
def test_tightening_in_float32_keeps_every_counterexample(seed: int, scale: float) -> None:
    core, exact, size = cores(seed, scale)
    u = near_edges(exact, 1000, seed)
    z, a = before(exact, u)
    for number, output in enumerate(core.outputs):
        values = exact.outputs[number](u, a)
        order = values.argsort()
        for rank in (0, 3, 30):
            # The property is moved so that few points, or one, are counterexamples.
            offset = values[order[rank]]
            threshold = float(size[number]) * ALLOWANCES[torch.float32][1]
            moved = replace(output, constant=output.constant - offset.float() - threshold)
            bad = z[:, order[: rank + 1]]
            node = bounded(core, whole(core), moved, 20, math.inf)[0]
            assert float(node.low) <= 0, "the root holds a counterexample"
            memory: dict = {}
            for _ in range(3):
                found = tighten(core, node, moved, 20, memory)
                assert found is not None, "a counterexample was lost"
                assert ((bad >= found.lb - core.slack) & (bad <= found.ub + core.slack)).all()
                node, memory = replace(node, lb=found.lb, ub=found.ub), found.memory
                node = bounded(core, node, moved, 20, math.inf)[0]


def test_a_proof_that_an_attained_value_contradicts_is_a_doubt() -> None:
    _, core, _ = cores(0, 1.0)
    u = near_edges(core, 1000, 0)
    least = float(core.outputs[0](u, core.evaluate(u)).min())
    plan = Plan(KFSB(), BaBSR())
    for height, size in ((0.5, 0.0), (0.5, 1.0 / ALLOWANCES[torch.float64][1])):
        # Attained values are at least about 0.5; with the greater size the proof must reach 1.0 above the computed 0.
        output = replace(core.outputs[0], constant=core.outputs[0].constant - least + height)
        search = Search(core, output, size, plan, time.perf_counter() + 60)
        search.proven = lambda domains: torch.ones_like(domains.low, dtype=torch.bool)  # type: ignore[method-assign]
        result = search.run()
        assert (result.proven, result.doubtful) == ((True, False) if size == 0 else (False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("seed", SEEDS)
def test_large_weights_are_decided_or_left_open_but_never_wrong(seed: int, scale: float, dtype: torch.dtype) -> None:
    model = thin(seed, scale).to(dtype)
    _, exact, _ = cores(seed, scale)
    x = torch.full((1, INPUTS), 0.5, dtype=dtype)
    u = near_edges(exact, 500, seed)
    for eps in (0.02, 0.1, 0.2):
        label = model(x).argmax(1)
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(0.5 + eps * u.T)
        others = logits.clone()
        others[:, int(label)] = -math.inf
        attained = float((logits[:, int(label)] - others.amax(1)).min())
        for inputs in (0, 8):
            (verdict,) = BranchAndBound(timeout=20, inputs=inputs)(model, x, label, LinfBall(eps))
            assert verdict.status == "falsified" or verdict.margin_lb <= attained
            assert verdict.status != "unknown" or scale > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_margin_of_a_search_that_found_nothing_pays_for_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "run", lambda search: Result(-math.inf))
    for seed in range(10):
        model = thin(seed, 1e3)
        x = torch.rand(1, INPUTS, generator=torch.Generator().manual_seed(seed))
        label = model(x).argmax(1)
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(x.double())[0]
        margin = float((logits[label] - logits)[torch.arange(3) != label].min())
        # In so small a box the bound is the margin itself, up to rounding.
        (verdict,) = BranchAndBound(inputs=0)(model.to(dtype), x.to(dtype), label, LinfBall(1e-13))
        assert verdict.status == "unknown" and margin - 0.05 * (1 + margin) <= verdict.margin_lb < margin
