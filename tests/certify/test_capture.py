from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify.op import UnsupportedOp
from certify.tracing import CaptureError, capture
from tests.certify.networks import INPUT, KINDS, Apply, network

EXAMPLE = torch.zeros(1, *INPUT)


def model_of(function: object) -> nn.Module:
    """Convolution, then `function`, then a dense layer."""
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Apply(function), nn.Flatten(), nn.Linear(50, 3))  # type: ignore[arg-type]


def test_a_layer_without_a_rule_is_named_with_its_node_and_the_known_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(18, 3))
    with pytest.raises(
        UnsupportedOp, match=r"no bound rule for nn\.GELU at 1 \(node '_?1'\)\. Rules exist for: .*ReLU.*auto_lirpa"
    ):
        capture(model, EXAMPLE)


def test_a_function_without_a_rule_is_named() -> None:
    with pytest.raises(UnsupportedOp, match=r"no bound rule for softplus \(node 'softplus'\)"):
        capture((model_of(F.softplus)), EXAMPLE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x, "product of two values"),
        (lambda x: 1 / x, "division of a constant"),
        (lambda x: x + torch.ones(3, 2, 5, 5), "batch axis"),
        (lambda x: x.mean(), "no batch of numbers|all axes"),
        (lambda x: x - x.mean(0, keepdim=True), "no batch|batch axis"),
        (lambda x: x.transpose(0, 1).transpose(0, 1), "no batch|batch axis"),
        (lambda x: torch.cat([x, x], 0), "no batch|batch axis"),
        (lambda x: F.conv2d(x, torch.zeros(2, 2, 2, 2), padding="same"), "uneven"),
        (lambda x: F.leaky_relu(x, 1.5), "0 <= negative_slope < 1"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "several outputs|no bound rule"),
        (lambda x: x[: len(x)], "'len' is not supported"),
        (lambda x: x[1:], "one example to another|no batch"),
        (lambda x: x[[2, 0, 1]], "one example to another|no batch"),
        (lambda x: x.flip(0), "one example to another|no batch"),
        (lambda x: x.roll(1, 0), "one example to another|no batch"),
        (lambda x: torch.roll(x, 1), "one example to another|no batch"),
        (lambda x: x.split(1, 0)[0], "one example to another|no batch"),
        (lambda x: x.chunk(3)[1], "one example to another|no batch"),
        (lambda x: x[:, :, x.argmax()], "one example to another|no batch"),
        (lambda x: torch.index_select(x, 1, torch.relu(x).flatten(0)), "no batch|depend on the input"),
    ],
)
def test_forms_that_cannot_be_bounded_are_refused_with_a_reason(function: object, reason: str) -> None:
    with pytest.raises((UnsupportedOp, CaptureError), match=reason):
        capture((model_of(function)), EXAMPLE)


def test_control_flow_on_values_is_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="control flow"):
        capture((model_of(forward)), EXAMPLE)


def test_a_model_that_returns_several_values_or_images_is_refused() -> None:
    pair = Apply(lambda x, f: (f(x.flatten(1)), x), nn.Linear(50, 3))
    with pytest.raises(CaptureError, match="one tensor of logits"):
        capture(pair, EXAMPLE)
    with pytest.raises(CaptureError, match=r"logits \[B, K\]"):
        capture(nn.Conv2d(2, 2, 3), EXAMPLE)


def test_a_model_that_returns_its_input_or_a_constant_is_refused() -> None:
    with pytest.raises(CaptureError):
        capture(Apply(lambda x: torch.zeros(3, 4)), EXAMPLE)


def test_randomness_in_evaluation_is_noticed() -> None:
    with pytest.raises((CaptureError, UnsupportedOp)):
        capture((model_of(lambda x: F.dropout(x, 0.5, training=True))), EXAMPLE)
    small = Apply(lambda x, f: f(x.flatten(1)) + 1e-5 * torch.rand(3), nn.Linear(50, 3))
    with pytest.raises(CaptureError, match="draws random numbers"):  # however small: the next pass is another function
        capture(small, EXAMPLE)
    own = torch.Generator().manual_seed(0)
    noisy = Apply(lambda x, f: f(x.flatten(1)) + 1e-3 * torch.rand(3, generator=own), nn.Linear(50, 3))
    with pytest.raises(CaptureError, match="another result for the same input"):
        capture(noisy, EXAMPLE)


def test_a_forward_for_one_size_of_batch_is_refused_in_words() -> None:
    fixed = Apply(lambda x, f: f(x.view(2, 2, 5, 5).flatten(1)), nn.Linear(50, 3))
    with pytest.raises(CaptureError, match=r"fails on a batch of shape \(3, "):
        capture(fixed, EXAMPLE)


def test_a_value_changed_in_place_and_read_again_is_refused_by_name() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.relu_()
        return y + x

    with pytest.raises(CaptureError, match=r"node 'add' reads '_0', which an earlier step changed in place"):
        capture((model_of(forward)), EXAMPLE)
    layered = Apply(lambda x, f: f(x) + x, nn.ReLU(inplace=True))
    with pytest.raises(CaptureError, match="in place"):
        capture(nn.Sequential(nn.Conv2d(2, 2, 3), layered, nn.Flatten(), nn.Linear(18, 3)), EXAMPLE)


def test_what_data_parallel_and_compile_have_made_is_read_inside() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    parts = nn.Sequential(nn.Identity(), nn.DataParallel(net[:2]), torch.compile(nn.DataParallel(net[2:])))  # type: ignore[arg-type]
    x = torch.rand(4, *INPUT)
    for wrapped in (nn.DataParallel(net), torch.compile(net), torch.compile(nn.DataParallel(net)), parts):
        torch.testing.assert_close(capture(wrapped, EXAMPLE).snapshot()(x), net(x))  # type: ignore[arg-type]


class Doubled(nn.DataParallel):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * self.module(x)


class Named(nn.Module):
    """Has what torch.compile calls a model's original, and computes something else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._orig_mod = net

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self._orig_mod(x)


def test_what_only_looks_like_a_wrapper_is_not_read_inside() -> None:
    """A graph of the module inside would certify another function, and nothing behind it could notice."""
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    hooked, patched, compiled = nn.DataParallel(net), nn.DataParallel(net), torch.compile(net)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled.register_forward_hook(lambda module, inputs, output: 2 * output)  # type: ignore[attr-defined]
    patched.forward = lambda x: 2 * net(x)  # type: ignore[method-assign]
    x = torch.rand(4, *INPUT)
    for model in (
        Doubled(net),
        Named(net),
        hooked,
        patched,
        compiled,
        nn.Sequential(Named(net)),
        nn.Sequential(hooked),
    ):
        try:
            graph = capture(model, EXAMPLE)  # type: ignore[arg-type]
        except (CaptureError, UnsupportedOp):
            continue
        torch.testing.assert_close(graph.snapshot()(x), 2 * net(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of TorchScript itself
def test_a_torchscript_module_is_refused_in_words() -> None:
    with pytest.raises(CaptureError, match="TorchScript module has no Python forward"):
        capture(torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(50, 3)), EXAMPLE), EXAMPLE)  # type: ignore[arg-type]


def test_a_model_with_two_inputs_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return x.flatten(1) + z.flatten(1)

    with pytest.raises(CaptureError, match="more than one input"):
        capture(Two(), EXAMPLE)


def test_an_example_without_a_batch_axis_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"\[B, \.\.\.\]"):
        capture(nn.Linear(3, 2), torch.zeros(3))


def test_a_subclass_that_overrides_forward_is_not_taken_for_its_base() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.relu(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3), Doubled()).eval()
    x = torch.rand(4, *INPUT)
    torch.testing.assert_close(capture(model, EXAMPLE).snapshot()(x), model(x))


def test_capture_leaves_flags_gradients_and_buffers_alone() -> None:
    model = network([KINDS["batch_norm_2d"], KINDS["dropout"], KINDS["relu"]], 0).train()
    model.body[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    capture(model, EXAMPLE)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UnsupportedOp):
        capture(nn.Sequential(model, nn.Softmax(1)).train(), EXAMPLE)
    assert model.training


@pytest.mark.parametrize("name", [name for name in KINDS if name != "constants"])
def test_the_next_snapshot_sees_a_change_of_the_weights(name: str) -> None:
    model = network([KINDS["relu"], KINDS[name], KINDS["relu"]], 0)
    graph = capture(model, EXAMPLE)
    x = torch.rand(5, *INPUT)
    torch.testing.assert_close(graph.snapshot()(x), model(x))
    before = graph.snapshot()(x)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.1)
    torch.testing.assert_close(graph.snapshot()(x), model(x))
    assert not torch.allclose(graph.snapshot()(x), before)


def test_a_snapshot_in_another_precision_and_with_a_spec_computes_the_same_function() -> None:
    model = network([KINDS["skip"], KINDS["max_pool"]], 0)
    x = torch.rand(5, *INPUT)
    snapshot = capture(model, EXAMPLE).snapshot()
    torch.testing.assert_close(snapshot.to(torch.float64)(x.double()), model(x).double(), rtol=1e-5, atol=1e-5)
    spec = torch.randn(5, 7, 4)
    torch.testing.assert_close(snapshot.with_spec(spec)(x), torch.einsum("brk,bk->br", spec, model(x)))
    with pytest.raises(ValueError, match="spec has 5 columns"):
        snapshot.with_spec(torch.randn(5, 7, 5))


def test_a_spec_after_a_last_layer_that_is_not_dense_is_a_layer_of_its_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3), nn.ReLU()).eval()
    x, spec = torch.rand(5, *INPUT), torch.randn(5, 2, 3)
    snapshot = capture(model, EXAMPLE).snapshot().with_spec(spec)
    torch.testing.assert_close(snapshot(x), torch.einsum("brk,bk->br", spec, model(x)))


def test_batch_norm_is_folded_into_a_convolution_that_nobody_else_reads() -> None:
    folded = capture(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)), EXAMPLE)
    assert len(folded.snapshot().nodes) == 4  # input, convolution, flatten, dense
