"""Lipschitz bounds of stored networks against stored values (see the README beside them)."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.lipschitz.global_constant import global_lipschitz
from certify.lipschitz.local import jacobian_bounds, local_lipschitz
from certify.lipschitz.operator_norm import operator_norm_bound, power_iteration
from certify.lipschitz.search import Search, gradient_norms
from certify.ops.affine import Linear, conv2d
from tests.golden import lipschitz_networks
from tests.golden.lipschitz_networks import FOLDER, NotIncluded, network, values

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"no reference values in {FOLDER}")

NO_SEARCH = Search(samples=0)
STORED = 1e-9
"""Relative tolerance: values are stored with ten digits."""
LINEAR = {
    "linear_bounds": ("crown", {}),
    "recurjac": ("recurjac", {}),
    "interval_product_crown_states": ("interval", {"states": "crown"}),
    "interval_product": ("interval", {}),
}


INSTANCES = [(name, key) for name, net in values().items() for key in net["instances"]]


def instance(name: str, key: str) -> tuple[nn.Sequential, Tensor, LinfBall, dict[str, Any]]:
    try:
        return lipschitz_networks.instance(name, key)
    except NotIncluded as error:
        pytest.skip(str(error))


def of(entry: dict[str, Any], key: str) -> Tensor:
    return torch.tensor(entry[key], dtype=torch.float64)


def close(found: Tensor, stored: Tensor, tolerance: float = STORED) -> bool:
    return torch.allclose(found, stored, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("name", "key"), INSTANCES)
def test_linear_methods_and_the_global_product(name: str, key: str):
    model, x, ball, entry = instance(name, key)
    rows = torch.eye(values()[name]["outputs"], dtype=torch.float64)
    assert close(gradient_norms(model, x, rows.unsqueeze(0), "linf")[0], of(entry, "at_center"))
    for stored, (method, options) in LINEAR.items():
        if stored in entry and not (name == "mlp_tanh" and stored == "linear_bounds"):
            found = local_lipschitz(model, x, ball, method, search=NO_SEARCH, **options).ub[0]
            assert close(found, of(entry, stored)), stored
    if "norm_product" in entry:
        assert close(global_lipschitz(model, x, "linf"), of(entry, "norm_product"))


@pytest.mark.parametrize(("name", "key"), INSTANCES)
def test_the_order_of_all_bounds(name: str, key: str):
    model, x, ball, entry = instance(name, key)
    crown = local_lipschitz(model, x, ball)
    chain = [crown.lb[0], crown.ub[0]]
    chain += [local_lipschitz(model, x, ball, m, search=NO_SEARCH, **o).ub[0] for m, o in list(LINEAR.values())[1:]]
    chain.append(global_lipschitz(model, x, "linf"))
    for less, more in itertools.pairwise(chain):
        assert bool((less <= more * (1 + STORED)).all())
    assert bool((of(entry, "lower") <= crown.ub[0] * (1 + STORED)).all())
    # Random search is no match for the stored one, but never above what is proven to be the maximum.
    assert bool((crown.lb[0] >= of(entry, "at_center") * (1 - STORED)).all())
    if entry["exact"] is not None:
        assert bool((crown.lb[0] <= of(entry, "exact") * (1 + STORED)).all())


@pytest.mark.parametrize(("name", "key"), INSTANCES)
def test_entry_bounds(name: str, key: str):
    model, x, ball, _ = instance(name, key)
    stored = network(name).arrays
    if f"jac_lower_{key}" not in stored or name == "mlp_tanh":
        pytest.skip("no bounds of entries are stored, or by another relaxation")
    bounds = jacobian_bounds(model, x, ball)
    assert np.allclose(bounds.lb[0].flatten(1).numpy(), stored[f"jac_lower_{key}"], rtol=0, atol=1e-12)
    assert np.allclose(bounds.ub[0].flatten(1).numpy(), stored[f"jac_upper_{key}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in INSTANCES if n != "mlp_tanh"])
def test_optimised_slopes_are_as_good_as_the_stored_ones(name: str, key: str):
    model, x, ball, entry = instance(name, key)
    if "linear_bounds_alpha" not in entry:
        pytest.skip("none stored")
    found = local_lipschitz(model, x, ball, "crown", states="alpha_crown", search=NO_SEARCH).ub[0]
    # The stored slopes were optimised for each output by itself, these for the hidden bounds.
    assert bool((found <= of(entry, "linear_bounds") * (1 + STORED)).all())
    assert bool((found <= of(entry, "linear_bounds_alpha") * 1.2).all())
    assert bool((found >= of(entry, "lower") * (1 - STORED)).all())


QUICK = {("mlp_3x8", k) for k in ("0_0", "0_1", "0_2", "1_0", "1_1", "1_2")}
QUICK |= {("mlp_16", "0_0"), ("mlp_16", "1_1"), ("mlp_4layer", "0_0"), ("mlp_4layer", "1_1"), ("cnn_8x8", "0_1")}


def _slow_unless_quick(pair: tuple[str, str]) -> Any:
    return pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "key"), [_slow_unless_quick(pair) for pair in INSTANCES if pair[0] != "mlp_tanh"])
def test_branch_and_bound_is_exact_where_the_exact_value_is_known(name: str, key: str):
    model, x, ball, entry = instance(name, key)
    found = local_lipschitz(model, x, ball, "bab", timeout=60.0)
    assert bool((of(entry, "lower") <= found.ub[0] * (1 + STORED)).all())
    if entry["exact"] is not None:
        assert close(found.ub[0], of(entry, "exact"), 1e-6) and close(found.lb[0], of(entry, "exact"), 1e-6)
    if "bab" in entry:
        # The stored search was run in float32.
        assert bool((found.ub[0] <= torch.tensor(entry["bab"]["value"], dtype=torch.float64) * (1 + 1e-6)).all())


@pytest.mark.parametrize(("name", "key"), sorted(QUICK))
def test_enumeration_is_exact(name: str, key: str):
    model, x, ball, entry = instance(name, key)
    assert close(local_lipschitz(model, x, ball, "exact").ub[0], of(entry, "exact"), 1e-7)


@pytest.mark.parametrize("key", ["0_0", "0_1"])
def test_smooth_activations(key: str):
    # The stored linear bounds relax tanh' jointly in the gradient and the input. Ours know the gradient only: they lie
    # above what is attained, below intervals, and up to 40 % above the stored ones.
    model, x, ball, entry = instance("mlp_tanh", key)
    found = local_lipschitz(model, x, ball, "crown", search=NO_SEARCH).ub[0]
    assert bool((found >= of(entry, "lower") * (1 - STORED)).all())
    assert bool((found <= of(entry, "interval_product") * (1 + STORED)).all())
    assert bool((found <= 1.4 * of(entry, "linear_bounds")).all())


def test_spectral_norms():
    stored = json.loads((FOLDER / "gloro.json").read_text())["liresnet_small"]
    arrays = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / "liresnet_small.npz").items()}
    identity = torch.zeros(8, 8, 3, 3, dtype=torch.float64)
    identity[range(8), range(8), 1, 1] = 1
    layers = {
        "stem.0.Conv2d": conv2d(arrays["stem_w"], None, 2, 2, 1, 1, (3, 32, 32)),
        "neck.0.Conv2d": conv2d(arrays["neck_conv_w"], None, 4, 0, 1, 1, (8, 16, 16)),
        "neck.3.Linear": Linear(arrays["neck_lin_w"]),
    }
    for i in range(3):
        scale = arrays[f"block{i}_identity_scale"] * arrays[f"block{i}_affine"]
        layers[f"backbone.{2 * i}.LinearRes"] = conv2d(
            identity + scale * arrays[f"block{i}_weight"], None, 1, 1, 1, 1, (8, 16, 16)
        )
    for name, op in layers.items():
        truth, bound = stored["spectral_norm_svd"][name], float(operator_norm_bound(op))
        assert truth <= bound <= stored["circular_upper_bound"].get(name, truth) * (1 + 1e-9)
        if name in stored["gram_iteration_upper_bounds_1_to_5"]:
            assert bound == pytest.approx(stored["circular_upper_bound"][name], rel=1e-9)
            gram = [float(operator_norm_bound(op, gram_iterations=k)) for k in range(1, 6)]
            theirs = stored["gram_iteration_upper_bounds_1_to_5"][name]
            # A row sum is below Frobenius' norm in some of the first steps.
            assert all(g <= t * (1 + 1e-9) for g, t in zip(gram, theirs, strict=True))
            assert gram[1:] == pytest.approx(theirs[1:], rel=1e-9)
    op = layers["backbone.0.LinearRes"]
    start = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert power_iteration(op, start, 3000).value == pytest.approx(
        stored["spectral_norm_power_iteration"]["backbone.0.LinearRes"], rel=1e-5
    )
