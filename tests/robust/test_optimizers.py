"""Optimisers against PyTorch's own, step by step, and through a stored state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robust.optimizer import OPTIMIZERS

PLAIN = {
    "adam:lr=0.01,weight_decay=0.1": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw:lr=0.01,weight_decay=0.1": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "nadam:lr=0.01,weight_decay=0.1": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "radam:lr=0.01,weight_decay=0.1": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "sgd:lr=0.01,momentum=0.8,weight_decay=0.1": lambda p: torch.optim.SGD(p, 0.01, 0.8, weight_decay=0.1),
    "sgd:lr=0.01,nesterov=true": lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=5e-4, nesterov=True),
    "sgd:lr=0.01,momentum=0,weight_decay=0": lambda p: torch.optim.SGD(p, 0.01),
}


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(30, 6), torch.randn(30, 1)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (model(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("text", PLAIN)
def test_it_is_the_optimiser_that_its_name_says(text: str) -> None:
    model, x, y = problem()
    other = copy.deepcopy(model)
    descend(model, OPTIMIZERS.parse(text)(model.parameters()), x, y, 20)
    descend(other, PLAIN[text](other.parameters()), x, y, 20)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_every_registered_optimiser_is_compared_here() -> None:
    assert {text.partition(":")[0] for text in PLAIN} == set(OPTIMIZERS.names())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_its_rate_is_the_one_that_the_schedule_multiplies(name: str) -> None:
    factory = OPTIMIZERS.parse(f"{name}:lr=0.125")
    (group,) = factory(problem()[0].parameters()).param_groups
    assert factory.lr == group["lr"] == 0.125


@pytest.mark.parametrize("text", PLAIN)
def test_a_parameter_may_get_its_first_gradient_late(text: str) -> None:
    model, x, y = problem()
    other = copy.deepcopy(model)
    for network, optimizer in (
        (model, OPTIMIZERS.parse(text)(model.parameters())),
        (other, PLAIN[text](other.parameters())),
    ):
        descend(network[0], optimizer, x, y, 3)
        descend(network, optimizer, x, y, 5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
