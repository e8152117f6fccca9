"""The linear program of a domain: no point of the domain escapes it, and no dual bound exceeds it."""

from __future__ import annotations

import math

import pytest
import torch

from certify.bab.domains import Domains
from certify.bab.triangle import Minimum, Triangle
from certify.bab.unstable_core import Affine, Core
from tests.certify.bab.cores import before, evaluated, inside, random_core, random_domains, units

RELU, LEAKY = (0, 1, 2, 3, 5), (10, 16, 28)
"""Numbers of random cores that have unstable neurons; number 10 and every sixth after it have leaky ones."""


def minima(core: Core, domains: Domains, output: Affine) -> list[Minimum]:
    triangle = Triangle(core, output)
    ends = zip(domains.lb.T.numpy(), domains.ub.T.numpy(), strict=True)
    return [triangle.minimum(lb, ub) for lb, ub in ends]


@pytest.mark.parametrize("seed", RELU + LEAKY)
def test_no_point_of_a_domain_is_below_the_program(seed: int) -> None:
    core, _ = random_core(seed)
    assert bool((core.slope > 0).any()) == (seed in LEAKY)
    generator = torch.Generator().manual_seed(seed)
    u = units(core, 4000, generator)
    z, a = before(core, u)
    domains = random_domains(core, 30, generator, share=0.25)
    met = inside(domains, z)
    for output in core.outputs:
        least = torch.where(met, output(u, a), math.inf).amin(1).tolist()
        for found, value in zip(minima(core, domains, output), least, strict=True):
            assert found.low <= value + 1e-9 * (1 + abs(value))
    assert met.any(1).sum() > 5


@pytest.mark.parametrize("seed", RELU + LEAKY)
def test_the_program_is_at_least_what_the_ascent_reaches(seed: int) -> None:
    core, _ = random_core(seed)
    domains = random_domains(core, 30, torch.Generator().manual_seed(seed), share=0.1)
    for output in core.outputs:
        ascended = evaluated(core, domains, output, iterations=100).low.tolist()
        for found, value in zip(minima(core, domains, output), ascended, strict=True):
            assert found.low >= value - 1e-5 * (1 + abs(value))


@pytest.mark.parametrize("seed", RELU + LEAKY)
def test_the_minimiser_is_in_the_region_and_what_it_attains_is_no_less(seed: int) -> None:
    core, _ = random_core(seed)
    domains = random_domains(core, 10, torch.Generator().manual_seed(seed), share=0.0)
    for output in core.outputs:
        for found in minima(core, domains, output):
            assert found.u is not None and bool((found.u.abs() <= 1).all())
            assert float(output(found.u, core.evaluate(found.u))) >= found.low - 1e-9
            assert core.lb[found.neuron] < 0 < core.ub[found.neuron]
