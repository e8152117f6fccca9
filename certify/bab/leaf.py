"""Domains in which every neuron is decided: a linear program has the exact answer."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from certify.bab.domains import Domains
from certify.bab.unstable_core import Affine, Core
from certify.leaf import relaxed_minimum
from certify.program import Program


def solve_leaf(core: Core, domain: Domains, output: Affine) -> tuple[float, Tensor | None]:
    """(minimum of the property on the domain, inf where it is empty; a minimiser `[M, 1]`, if there is one).

    Args:
        domain: one column in which no neuron is unstable.
        output: the property.
    """
    inputs = core.input_weight.shape[1]
    # Every value as an affine function of u: columns [u; 1].
    z = np.zeros((len(core), inputs + 1))
    z[: core.input_weight.shape[0], :inputs] = _array(core.input_weight.whole)
    z[:, inputs:] = _array(core.bias)
    a = np.zeros_like(z)
    slope = np.where(_array(domain.lb) >= 0, 1.0, _array(core.slope))
    for layer in core.layers:
        part = layer.part
        z[part] += _array(layer.weight.whole) @ a[layer.reads]
        a[part] = slope[part] * z[part]
    row = (_array(output.a).T @ a)[0]
    row[:inputs] += _array(output.x)[:, 0]
    row[inputs] += float(output.constant)
    # Also for neurons that are stable by their box alone: tightened boxes hold on possible counterexamples only.
    constraints = np.where(_array(domain.lb) >= 0, -z, z)
    program = Program(
        rows=sp.csr_array(row[None, :-1]),
        constants=row[-1:],
        matrix=sp.csr_array(constraints[:, :-1]),
        limit=-constraints[:, -1],
        lb=np.full(inputs, -1.0),
        ub=np.ones(inputs),
        binary=np.zeros(inputs, dtype=bool),
    )
    low, point = relaxed_minimum(program, 0)
    if point is None:
        return low, None
    return low, torch.from_numpy(point[:inputs]).to(output.x).clamp(-1, 1).unsqueeze(1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
