"""Networks with an adversarial point that sampling and attacks miss: nobody certifies them, branch and bound finds it.

A ReLU bump of height 4 is added to a wrong logit where three projections of the input are all within 1e-3 of their
values at a hidden point of the ball. Without the bump the network is robust, and is certified.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.methods.margin_pgd import MarginPGD
from attacks.threat import LinfBall
from certify.verdict import check_witness
from certify.verifier import VERIFIERS

SHAPE = (1, 4, 4)
PIXELS = 16
CLASSES = 3
WIDTH = 1e-3
METHODS = (
    "ibp",
    "crown_ibp",
    "crown",
    "alpha_crown:iterations=3",
    "cascade:last=none,alpha=(alpha_crown:iterations=2)",
)
COMPLETE = ("bab:timeout=20", "cascade:long_attack=(margin_pgd:steps=10),timeout=20")
BALL = LinfBall(0.1)


class Bumpy(nn.Module):
    """Small robust network plus `height` times the bump."""

    def __init__(self, hidden: Tensor, target: int, height: float) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.base[3].bias.data = torch.tensor([2.0, 0.0, -2.0])
        self.base[3].weight.data *= 0.3
        directions = torch.randn(3, PIXELS)
        directions /= directions.norm(dim=1, keepdim=True) * WIDTH
        middle = -directions @ hidden.flatten()
        # relu(u + 1) - 2 relu(u) + relu(u - 1) is 1 at u = 0 and 0 outside [-1, 1].
        self.edges = nn.Linear(PIXELS, 9)
        self.edges.weight.data = directions.repeat(3, 1)
        self.edges.bias.data = torch.cat([middle + 1, middle, middle - 1])
        self.all_three = nn.Linear(9, 1)
        self.all_three.weight.data = torch.tensor([[1.0] * 3 + [-2.0] * 3 + [1.0] * 3])
        self.all_three.bias.data.fill_(-2.0)
        self.lift = nn.Linear(1, CLASSES, bias=False)
        self.lift.weight.data.zero_()
        self.lift.weight.data[target] = height

    def forward(self, x: Tensor) -> Tensor:
        bump = torch.relu(self.all_three(torch.relu(self.edges(x.flatten(1)))))
        return self.base(x) + self.lift(bump)


def planted(seed: int) -> tuple[Bumpy, Tensor, Tensor, Tensor]:
    """(network, image, label, hidden counterexample)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.rand(1, *SHAPE) * 0.8 + 0.1
        hidden = BALL.project(x + (torch.rand_like(x) * 2 - 1) * 0.099, x)
        return Bumpy(hidden[0], target=2, height=20.0).eval(), x, torch.tensor([0]), hidden


def survives(seed: int) -> bool:
    """Check one planted network; True if sampling and an attack miss the counterexample."""
    model, x, y, hidden = planted(seed)
    check_witness(model, hidden[0], x[0], y[0], BALL)
    for method in METHODS:
        (verdict,) = VERIFIERS.parse(method)(model, x, y, BALL)
        assert verdict.status != "certified", f"seed {seed}: {method} certifies a network with a counterexample"
    for method in COMPLETE:
        (verdict,) = VERIFIERS.parse(method)(model, x, y, BALL)
        assert verdict.status == "falsified", f"seed {seed}: {method} misses the counterexample"
        check_witness(model, verdict.witness, x[0], y[0], BALL)
    with torch.no_grad():
        many = BALL.sample(x.expand(2000, *SHAPE).contiguous(), torch.Generator().manual_seed(seed + 10_000))
        missed = bool((model(many).argmax(1) == 0).all())
        missed &= int(model(MarginPGD(steps=20)(model, x, y, BALL)).argmax()) == 0
        model.lift.weight.zero_()
    assert VERIFIERS.parse("crown")(model, x, y, BALL)[0].status == "certified", "robust without the bump"
    return missed


def test_nobody_certifies_a_network_with_a_hidden_counterexample() -> None:
    missed = [survives(seed) for seed in range(20)]
    assert sum(missed) >= 19, "the counterexamples are not hidden: attacks find them"


@pytest.mark.slow
def test_nobody_certifies_any_of_many_networks_with_a_hidden_counterexample() -> None:
    assert sum(survives(seed) for seed in range(20, 140)) >= 114
