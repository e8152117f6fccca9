"""Cores of random networks, and points of their regions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.threat import Ball, LinfBall
from certify.bab.ascent import Point, Relaxation, Task, ascend
from certify.bab.domains import Domains
from certify.bab.matrix import Chained
from certify.bab.unstable_core import Affine, Core, core_of
from certify.bounds.crown import intermediate_boxes
from certify.graph import Snapshot
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from tests.certify.bab.problems import random_problem
from tests.certify.networks import network


def ended(model: nn.Module, x: Tensor, ball: Ball) -> tuple[Snapshot, Region]:
    """(network that ends in the margins of its prediction, region) in float64."""
    model, x = model.double(), x.double()
    snapshot = capture(model, x).snapshot().without_gradient()
    logits = snapshot(x)
    return snapshot.with_spec(margin_spec(logits.argmax(1), logits.shape[1], torch.float64)), Region.around(x, ball)


def cored(model: nn.Module, x: Tensor, ball: Ball) -> tuple[Core, Snapshot]:
    """(core, network) of one example, in float64."""
    snapshot, region = ended(model, x, ball)
    return core_of(snapshot, region, intermediate_boxes(snapshot, region)), snapshot


def random_core(seed: int) -> tuple[Core, Snapshot]:
    """Core of a random problem whose least margin is about zero, so that no bound is trivial."""
    model, x, _, ball = random_problem(seed)
    core, snapshot = cored(model, x, LinfBall(min(2 * ball.eps, 0.4)))
    return core, snapshot


STEMS = (2, 5, 6)
"""Numbers of cores with a stem and neurons behind it; number 5 has leaky ReLUs in its stem."""


def stem_problem(seed: int) -> tuple[nn.Sequential, Tensor, LinfBall]:
    """A convolutional network whose deep neurons read the input through fewer values than it has pixels."""
    torch.manual_seed(seed)
    front = [nn.Conv2d(1, 2, 3, stride=2), nn.LeakyReLU(0.1 * (seed % 2)), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*front, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= 2.0
    return model, torch.rand(1, 1, 9, 9), LinfBall(0.1)


def stem_core(seed: int) -> tuple[Core, Snapshot]:
    """Core of such a network, in float64."""
    core, snapshot = cored(*stem_problem(seed))
    assert isinstance(core.input_weight, Chained)
    return core, snapshot


def some_core(name: str) -> Core:
    """`random_core` or `stem_core` of a name like "random 3"."""
    kind, seed = name.split()
    return {"random": random_core, "stem": stem_core}[kind](int(seed))[0]


def small_core(blocks: list, seed: int, ball: Ball) -> tuple[Core, Snapshot]:
    """Core of one of the networks of the other property tests."""
    return cored(network(blocks, seed, gain=2.0), torch.rand(1, 2, 5, 5), ball)


def units(core: Core, count: int, generator: torch.Generator) -> Tensor:
    """Points u `[M, D]` of a box region, half of them corners."""
    u = torch.rand(core.input_weight.shape[1], count, generator=generator, dtype=torch.float64) * 2 - 1
    u[:, ::2] = u[:, ::2].sign()
    return u


def before(core: Core, u: Tensor) -> tuple[Tensor, Tensor]:
    """(values before activation, values after it) `[N, D]` at u, in the plainest way."""
    a = core.evaluate(u)
    z = core.bias.repeat(1, u.shape[1])
    z[: core.input_weight.shape[0]] += core.input_weight.whole @ u
    for layer in core.layers:
        z[layer.part] += layer.weight.whole @ a[layer.reads]
    return z, a


def whole(core: Core, count: int = 1) -> Domains:
    """The root domain, `count` times, without a bound."""
    zeros = core.lb.new_zeros((len(core), count))
    none = core.lb.new_full((count,), -torch.inf)
    lb, ub = core.lb.expand(-1, count).clone(), core.ub.expand(-1, count).clone()
    alpha = Relaxation.on(core, lb, ub).default()
    return Domains(lb, ub, zeros, none, alpha, zeros.clone(), zeros.clone(), zeros.clone())


def random_domains(core: Core, count: int, generator: torch.Generator, share: float = 0.4) -> Domains:
    """Domains with randomly split neurons, and random dual variables."""
    domains = whole(core, count)
    if not len(core):
        return domains
    splits = (torch.rand(domains.lb.shape, generator=generator) < share) & (domains.lb < 0) & (domains.ub > 0)
    splits &= core.splittable
    side = torch.where(torch.rand(domains.lb.shape, generator=generator) < 0.5, 1.0, -1.0).double()
    sign = side * splits
    return replace(
        domains,
        lb=torch.where(sign > 0, 0.0, domains.lb),
        ub=torch.where(sign < 0, 0.0, domains.ub),
        sign=sign,
        alpha=torch.rand(domains.lb.shape, generator=generator).double(),
        beta=torch.rand(domains.lb.shape, generator=generator).double() * sign.abs(),
    )


def evaluated(core: Core, domains: Domains, output: Affine, iterations: int = 0) -> Domains:
    """The domains with their bounds after some steps of ascent."""
    task = Task(output, sign=domains.sign)
    found = ascend(core, domains.relaxation(core), task, Point(domains.alpha, domains.beta), iterations)
    assert found.point.beta is not None
    return replace(
        domains,
        low=found.low,
        alpha=found.point.alpha,
        beta=found.point.beta,
        A=found.A,
        z=found.z,
    )


def inside(domains: Domains, z: Tensor) -> Tensor:
    """Which points obey the splits of which domains: bool `[D, points]`."""
    return (domains.sign.unsqueeze(2) * z.unsqueeze(1) >= 0).all(0)
