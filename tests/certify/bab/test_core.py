"""The core is the network: the same values, and with CROWN's lines CROWN's bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import Ball, L1Ball, L2Ball, LinfBall
from certify.bab.ascent import Relaxation
from certify.bab.dual import backward, minimiser, minimum
from certify.bab.matrix import Chained, Matrix
from certify.bab.unstable_core import core_of
from certify.bounds.crown import crown, intermediate_boxes
from certify.op import UnsupportedOp
from robust.min_max import MinMax
from tests.certify.bab.cores import STEMS, cored, ended, random_core, small_core, stem_core, stem_problem, units
from tests.certify.bab.problems import KINDS
from tests.certify.networks import KINDS as BLOCKS
from tests.certify.networks import VARIANTS, Block, layer

RELU = layer(nn.ReLU)
NETWORKS: dict[str, list[Block]] = {
    "dense": [BLOCKS["linear"], RELU, BLOCKS["linear"], RELU],
    "conv": [RELU, BLOCKS["conv"], RELU],
    "skip": [RELU, BLOCKS["skip"], RELU],
    "residuals": [RELU, VARIANTS["residual_of_residual"], RELU],
    "concat": [BLOCKS["concat"], BLOCKS["conv"], RELU],
    "leaky_relu": [BLOCKS["leaky_relu"], BLOCKS["conv"], BLOCKS["leaky_relu"]],
    "sigmoid": [BLOCKS["sigmoid"], BLOCKS["conv"], RELU],
    "tanh": [RELU, BLOCKS["conv"], BLOCKS["tanh"]],
    "affine": [BLOCKS["conv"]],
}
BALLS = [LinfBall(0.05), LinfBall(1e-4), L2Ball(0.3), L1Ball(0.5)]


@pytest.mark.parametrize("ball", BALLS, ids=repr)
@pytest.mark.parametrize("name", NETWORKS)
def test_with_the_adaptive_lines_its_bound_is_that_of_crown(name: str, ball: Ball) -> None:
    torch.manual_seed(0)
    core, snapshot = small_core(NETWORKS[name], 0, ball)
    expected = crown(snapshot, core.region, intermediate_boxes(snapshot, core.region))[0][0]
    relaxation = Relaxation.on(core, core.lb, core.ub)
    lines = relaxation.slopes(relaxation.default())
    found = [float(backward(core, lines, output, core.lb.new_ones(1)).low) for output in core.outputs]
    torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=1e-6, atol=1e-6)
    assert len(core) > 0 or name == "affine" or ball == BALLS[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_network_computes(name: str) -> None:
    torch.manual_seed(0)
    core, snapshot = small_core(NETWORKS[name], 1, LinfBall(0.05))
    u = units(core, 50, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs], 1)
    torch.testing.assert_close(values, snapshot(core.pixels(u)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_random_small_networks_are_computed_too(seed: int) -> None:
    core, snapshot = random_core(seed)
    u = units(core, 50, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs], 1)
    torch.testing.assert_close(values, snapshot(core.pixels(u)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(1.0), L1Ball(3.0)], ids=lambda b: b.norm)
def test_minima_over_the_input_are_exact_and_never_above_a_point(ball: Ball) -> None:
    # 500 pixels: moves of l1 attacks spread over a hundredth of them, the minimiser of a linear function does not.
    torch.manual_seed(0)
    x = torch.rand(1, 500, dtype=torch.float64)
    core, _ = cored(nn.Sequential(nn.Linear(500, 3), nn.ReLU(), nn.Linear(3, 3)), x, ball)
    A = torch.randn(500, 20, dtype=torch.float64)
    low, _ = minimum(core, A * core.region.radius.T)
    exact = core.region.minimum(A.T.unsqueeze(1), low.new_zeros(20, 1))[:, 0] - A.T @ core.region.center[0]
    torch.testing.assert_close(low, exact, rtol=1e-9, atol=1e-9)
    points = ball.sample(x.expand(2000, -1).contiguous(), torch.Generator().manual_seed(0))
    assert ((points - core.region.center) @ A >= low - 1e-9).all()
    reached = ((A * core.region.radius.T) * minimiser(core, A * core.region.radius.T)).sum(0)
    torch.testing.assert_close(reached, low, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", STEMS)
def test_a_stem_changes_neither_values_nor_bounds(seed: int) -> None:
    core, snapshot = stem_core(seed)
    u = units(core, 50, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs], 1)
    torch.testing.assert_close(values, snapshot(core.pixels(u)), rtol=1e-9, atol=1e-9)
    plain = replace(core, input_weight=Matrix(core.input_weight.whole))
    p = torch.randn(core.input_weight.shape[0], 7, dtype=torch.float64)
    for stem, multiplied_out in [(core, plain), *zip(core.prefixes, plain.prefixes, strict=True)]:
        torch.testing.assert_close(stem.evaluate(u), multiplied_out.evaluate(u))
        rows = stem.input_weight.shape[0]
        torch.testing.assert_close(
            stem.input_weight.transposed_times(p[:rows]), plain.input_weight.whole[:rows].T @ p[:rows]
        )
    expected = crown(snapshot, core.region, intermediate_boxes(snapshot, core.region))[0][0]
    relaxation = Relaxation.on(core, core.lb, core.ub)
    lines = relaxation.slopes(relaxation.default())
    found = torch.stack([backward(core, lines, output, core.lb.new_ones(1)).low[0] for output in core.outputs])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_first_activation_without_unstable_neurons_is_a_stem_all_the_same() -> None:
    model, x, ball = stem_problem(5)
    model[0].bias.data += 5.0
    model[2].bias.data -= 5.0 * model[2].weight.data.sum((1, 2, 3))
    core, snapshot = cored(model, x, ball)
    assert isinstance(core.input_weight, Chained) and core.input_weight.near == 0 and len(core.layers[0].index) == 0
    u = units(core, 50, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs], 1)
    torch.testing.assert_close(values, snapshot(core.pixels(u)), rtol=1e-9, atol=1e-9)
    for prefix in core.prefixes:
        torch.testing.assert_close(prefix.evaluate(u), core.evaluate(u)[: len(prefix)])


def test_neurons_that_read_the_input_past_the_stem_have_it_multiplied_out() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.beside = nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(1, 2, 3, stride=2)
            self.rest = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(torch.relu(self.stem(x)) + self.beside(x))

    torch.manual_seed(0)
    core, snapshot = cored(Past(), torch.rand(1, 1, 9, 9), LinfBall(0.1))
    assert isinstance(core.input_weight, Matrix) and core.layers[1].reads.stop > 0
    u = units(core, 50, torch.Generator().manual_seed(0))
    values = torch.stack([output(u, core.evaluate(u)) for output in core.outputs], 1)
    torch.testing.assert_close(values, snapshot(core.pixels(u)), rtol=1e-9, atol=1e-9)


def test_a_prefix_is_the_core_of_the_first_layers() -> None:
    core, _ = random_core(1)
    u = units(core, 20, torch.Generator().manual_seed(0))
    for prefix in core.prefixes:
        torch.testing.assert_close(prefix.evaluate(u), core.evaluate(u)[: len(prefix)])


def test_ops_that_are_no_elementwise_activations_are_refused_in_one_line() -> None:
    torch.manual_seed(0)
    snapshot, region = ended(
        nn.Sequential(nn.Conv2d(1, 2, 3), MinMax(), nn.Flatten(), nn.Linear(8, 3)),
        torch.rand(1, 1, 4, 4),
        LinfBall(0.1),
    )
    with pytest.raises(UnsupportedOp, match="elementwise activations and MaxPool2d; it has no rule for MinMax"):
        core_of(snapshot, region, intermediate_boxes(snapshot, region))
