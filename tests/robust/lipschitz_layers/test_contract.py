"""Every 1-Lipschitz layer: its Jacobian, its certified norm, its capture, its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from certify.bounds.global_l2 import lipschitz_constants
from certify.tracing import capture
from robust.l2_net import L2Net
from robust.lipschitz_layer import LIPSCHITZ_LAYERS
from robust.min_max import MinMax

CHANNELS, SIZE = 4, (5, 5)
KINDS = ("dense", "conv", "wide_kernel")
# What BRO's ridge and LOT's last Newton step leave of an orthogonal matrix where V is badly conditioned.
SHORT_OF_ONE = {"bro": 1e-2, "lot": 1e-2}
# Zero padding cuts these off at the image's border, and what is cut has norms from 0 to 1.
CUT_AT_THE_BORDER = {"bcop"}


@pytest.fixture(params=LIPSCHITZ_LAYERS.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, kind: str, seed: int = 0, scale: float = 1.0) -> tuple[nn.Module, tuple[int, ...]]:
    """(a layer in evaluation mode with weights `scale` times random ones, shape of its input), float64."""
    method = LIPSCHITZ_LAYERS.parse(name)
    if kind == "dense":
        layer, shape = method.dense(12), (12,)
    else:
        layer, shape = method.conv(CHANNELS, 3 if kind == "conv" else 5, SIZE), (CHANNELS, *SIZE)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return layer.double().eval(), shape


def jacobian(layer: nn.Module, x: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(lambda v: layer(v.unsqueeze(0)).squeeze(0), x)
    return found.reshape(x.numel(), x.numel())


@pytest.mark.parametrize(
    ("kind", "scale"), [("dense", 0.03), ("dense", 30.0), ("conv", 0.03), ("conv", 30.0), ("wide_kernel", 1.0)]
)
def test_singular_values_are_at_most_one_and_one_where_it_is_orthogonal(name: str, kind: str, scale: float) -> None:
    layer, shape = build(name, kind, 0, scale)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(jacobian(layer, x))
    assert values.max() <= 1 + 1e-9
    if LIPSCHITZ_LAYERS[name].orthogonal and not (kind != "dense" and name in CUT_AT_THE_BORDER):
        assert values.min() >= 1 - SHORT_OF_ONE.get(name, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_certified_norm_of_the_captured_layer_is_not_below_any_jacobian(name: str, kind: str) -> None:
    layer, shape = build(name, kind)
    net = nn.Sequential(layer, nn.Flatten())
    nodes = capture(net, torch.zeros(1, *shape, dtype=torch.float64)).snapshot().nodes
    (*_, constant) = lipschitz_constants(nodes)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = float(torch.linalg.svdvals(jacobian(layer, x)).max())
    assert exact * (1 - 1e-13) <= float(constant) <= 1 + 1e-6


def test_gradients_are_finite_and_reach_every_parameter_in_single_precision(name: str) -> None:
    for kind in KINDS:
        layer, shape = build(name, kind)
        layer.float().train()
        layer(torch.randn(3, *shape)).square().sum().backward()
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_starting_weights_come_from_the_generator_alone(name: str) -> None:
    for kind in ("dense", "conv"):
        layer, shape = build(name, kind)
        net = L2Net(layer.float(), nn.Flatten(), nn.Linear(int(torch.Size(shape).numel()), 2))
        other = copy.deepcopy(net)
        for parameter in other[0].parameters():
            parameter.data = torch.full_like(parameter, 0.1) if parameter.dim() > 1 else parameter.data
        for model in (net, other):
            model.start_(torch.Generator().manual_seed(3))
        assert all(torch.equal(a, b) for a, b in zip(net[0].parameters(), other[0].parameters(), strict=True))


def test_state_dicts_carry_the_layer(name: str) -> None:
    layer, shape = build(name, "conv", 0)
    other, _ = build(name, "conv", 1)
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert not torch.allclose(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_block_convolution_is_orthogonal_where_nothing_is_cut() -> None:
    layer, _ = build("bcop", "conv")
    ring = nn.functional.pad(layer.weight, (0, 4, 0, 4))
    symbols = torch.fft.fft2(ring).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(torch.linalg.svdvals(symbols), torch.ones(49, CHANNELS, dtype=torch.float64))


def test_min_max_sorts_pairs() -> None:
    x = torch.tensor([[1.0, 5.0, 4.0, 2.0]])
    assert MinMax()(x).tolist() == [[4.0, 5.0, 1.0, 2.0]]
