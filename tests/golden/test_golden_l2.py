"""Losses and a network of l2-certified training, against stored results of their authors' code (float64)."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify import capture, global_l2_radius
from certify.bounds.global_l2 import lipschitz_constants
from certify.lipschitz.operator_norm import power_iteration
from certify.ops.affine import Conv2d, Linear
from robust.l2_margins import L2Logits, row_distances
from robust.l2_net import L2Net, parametrizations, stored_weight
from robust.model import MODELS
from robust.objective import cross_entropy
from robust.objectives.emma import raised
from robust.objectives.gloro import with_bottom
from robust.objectives.gloro_trades import rejection
from robust.objectives.logit_annealing import LogitAnnealing
from tests.golden.networks import reference_folder

FOLDER = reference_folder() / "golden_lipschitz"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference values are not here; set ROBUST_REFERENCE to their folder"
)


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


@functools.cache
def values() -> Any:
    return json.loads((FOLDER / "gloro.json").read_text(encoding="utf-8"))


def cases() -> list[Any]:
    return list(enumerate(values()["losses"])) if FOLDER.is_dir() else []


def losses(name: str, found: L2Logits, y: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, logits that it reads) of a stored name."""
    if name.startswith("gloro_trades"):
        weight = float(name[-1])
        return (cross_entropy(found.logits, y) + weight * rejection(found)).mean(), with_bottom(found)
    adjusted = raised(found, y, 1.0 if name.startswith("emma_v1") else 0.01)
    if name.startswith("logit_annealing"):
        return LogitAnnealing().annealed(adjusted, y).mean(), adjusted
    return cross_entropy(adjusted, y).mean(), adjusted


@pytest.mark.parametrize("place, case", cases(), ids=lambda value: value["key"] if isinstance(value, dict) else "")
def test_a_loss_and_its_gradients_are_the_stored_ones(place: int, case: dict[str, Any]) -> None:
    stored = arrays("gloro_losses")
    if case["name"] == "certified_radius":
        check_radius(case)
        return
    features, head = (stored[key].clone().requires_grad_() for key in ("feat", "head_weight"))
    K = torch.tensor(case["K"], dtype=torch.float64, requires_grad=True)
    y = stored["labels"]
    weight = F.normalize(head, dim=1) if case["lln"] else head
    logits = features @ weight.T + stored["head_bias"]
    found = L2Logits(logits, torch.full((len(y),), case["eps"], dtype=torch.float64), K * row_distances(weight))
    loss, adjusted = losses(case["name"], found, y)
    expected = dict(rtol=1e-6, atol=1e-9) if case["name"].startswith("logit_annealing") else dict(rtol=1e-9, atol=1e-12)
    of_loss = torch.autograd.grad(loss, (K, features, head))
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"], dtype=torch.float64), **expected)
    torch.testing.assert_close(of_loss[0], torch.tensor(case["dK"], dtype=torch.float64), **expected)
    torch.testing.assert_close(of_loss[1], stored[f"dfeat_{place}"], **expected)
    torch.testing.assert_close(of_loss[2], stored[f"dhead_{place}"], **expected)
    # The stored logits of EMMA are those of the label's subtracted.
    origin = adjusted.gather(1, y.unsqueeze(1)) if "emma" in case["name"] else torch.zeros(())
    before = stored[f"adjusted_logits_{place}"]
    shift = before.gather(1, y.unsqueeze(1)) if "emma" in case["name"] else torch.zeros(())
    torch.testing.assert_close((adjusted - origin).detach(), before - shift, rtol=1e-9, atol=1e-12)


def check_radius(case: dict[str, Any]) -> None:
    """The stored radii are those of a trunk of constant K: K times the features as inputs of a scaling layer."""
    stored = arrays("gloro_losses")
    last = nn.Linear(12, 6).double()
    weight = F.normalize(stored["head_weight"], dim=1) if case["lln"] else stored["head_weight"]
    last.weight.data, last.bias.data = weight, stored["head_bias"]
    trunk = nn.Linear(12, 12, bias=False).double()
    trunk.weight.data = case["K"] * torch.eye(12, dtype=torch.float64)
    radius, prediction = global_l2_radius(nn.Sequential(trunk, last), stored["feat"] / case["K"])
    expected = torch.tensor(case["value"], dtype=torch.float64)
    assert prediction.tolist() == case["pred"]
    assert bool((radius <= expected).all())
    torch.testing.assert_close(radius, expected, rtol=1e-6, atol=0)


@functools.cache
def liresnet() -> L2Net:
    stored = arrays("liresnet_small")
    model = MODELS.parse("liresnet:depth=3,width=8,hidden=32")((3, 32, 32), 10, (0.0,) * 3, (1.0,) * 3).double()
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    names = ("stem", "block0", "block1", "block2", "neck_conv", "neck_lin", "head")
    with torch.no_grad():
        for layer, name in zip(layers, names, strict=True):
            if name.startswith("block"):
                (residual,) = parametrizations(layer)
                assert float(stored[f"{name}_identity_scale"]) == pytest.approx(residual.scale, rel=1e-12)
                residual.gain.copy_(stored[f"{name}_affine"])
                stored_weight(layer).copy_(stored[f"{name}_weight"])
                layer.bias.copy_(stored[f"{name}_bias"])
            else:
                stored_weight(layer).copy_(stored[f"{name}_w"])
                layer.bias.copy_(stored.get(f"{name}_b", torch.zeros_like(layer.bias)))
    return model.eval()


def test_liresnet_computes_the_stored_values() -> None:
    stored, model = arrays("liresnet_small"), liresnet()
    value = stored["x"]
    with torch.no_grad():
        for place, layer in enumerate(model):
            value = layer(value)
            name = {2: "stem_out", 8: "backbone_out", 13: "feat", 14: "logits"}.get(place)
            if name is not None:
                torch.testing.assert_close(value, stored[name], rtol=1e-10, atol=1e-12)


def test_norms_of_liresnet_lie_where_the_stored_ones_do() -> None:
    expected = values()["liresnet_small"]
    exact, below = expected["spectral_norm_svd"], expected["spectral_norm_power_iteration"]
    rings = expected["circular_upper_bound"]
    nodes = capture(liresnet(), arrays("liresnet_small")["x"]).snapshot().nodes
    layers = [node for node in nodes if isinstance(node.op, Conv2d | Linear)][:-1]
    constants = lipschitz_constants(nodes)
    for node, name in zip(layers, exact, strict=True):
        norm = float(constants[nodes.index(node)] / constants[node.inputs[0]])
        assert norm >= exact[name]
        # The stored bound of the stem is of a ring one block larger than it needs to be.
        upper = rings.get(name, exact[name])
        assert norm <= upper if name.startswith("stem") else norm == pytest.approx(upper, rel=1e-9)
        # Our iterate: attained, so never above the exact norm, and as far as the stored one came.
        start = torch.ones(1, *nodes[node.inputs[0]].shape, dtype=torch.float64)
        start = start + torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        value = float(power_iteration(node.op, start, 1000).value)
        assert below[name] * (1 - 1e-4) <= value <= exact[name] * (1 + 1e-12)


def test_the_training_estimate_of_liresnet_is_the_stored_constant() -> None:
    model = liresnet().train()
    estimate = float(model.trunk_lipschitz(600).detach())
    assert estimate == pytest.approx(values()["liresnet_small"]["sub_lipschitz"], rel=1e-4)
    model.eval()
