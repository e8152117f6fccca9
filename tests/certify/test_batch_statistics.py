"""`Graph.forward_train` against `nn.BatchNorm` in training mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from certify.batch_statistics import batch_norm
from certify.tracing import capture


def normalised(momentum: float | None = 0.1, affine: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, momentum=momentum, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 6),
        nn.BatchNorm1d(6, momentum=momentum, affine=affine),
        nn.ReLU(),
        nn.Linear(6, 3),
    ).double()
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and affine:
            module.weight.data.normal_()
            module.bias.data.normal_()
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randn(5, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
def test_training_mode_gives_the_layers_outputs_gradients_and_running_statistics(
    momentum: float | None, affine: bool
) -> None:
    ours, theirs = normalised(momentum, affine), normalised(momentum, affine).train()
    graph = capture(ours, batch()[:1])
    for step in range(3):
        x = batch(step)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, _ = graph.forward_train(mine)
        expected = theirs(other)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-9)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-8, msg=name)
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_under_autocast_training_mode_is_that_of_the_layer(affine: bool, layout: torch.memory_format) -> None:
    ours, theirs = (normalised(affine=affine).float().train() for _ in range(2))
    x = batch().float().contiguous(memory_format=layout)
    graph, results = capture(ours, x[:1]), []
    for model, run in ((ours, lambda x: graph.forward_train(x, constant=True)[0]), (theirs, theirs)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(leaf := x.clone().requires_grad_())
        (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf)
        results.append((out.float(), gradient, dict(model.named_buffers())))
    assert results[0][1].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=0.02 * float(results[1][1].abs().max()))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False)])
def test_gradients_flow_through_the_returned_statistics(layer: nn.BatchNorm1d) -> None:
    layer = layer.double().train()
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, statistics = batch_norm(layer, x)
        return out, statistics.mean, statistics.var

    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()), eps=1e-6, atol=1e-6)


def test_the_returned_statistics_are_those_of_the_batch() -> None:
    x = batch()
    _, statistics = batch_norm(nn.BatchNorm2d(2).double(), x)
    torch.testing.assert_close(statistics.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(statistics.var, x.var((0, 2, 3), unbiased=False))


def test_a_snapshot_with_the_batchs_statistics_reproduces_the_training_pass() -> None:
    graph = capture(normalised(), batch()[:1])
    out, statistics = graph.forward_train(batch())
    torch.testing.assert_close(graph.snapshot(statistics)(batch()), out, rtol=1e-9, atol=1e-9)


def test_bounds_on_batch_statistics_pass_their_gradient_to_the_clean_images() -> None:
    model = normalised()
    graph = capture(model, batch()[:1])

    def value(weight: Tensor) -> Tensor:
        _, statistics = graph.forward_train(batch())
        return graph.snapshot(statistics)(batch(7)).square().sum()

    saved = copy.deepcopy(model.state_dict())
    assert torch.autograd.gradcheck(value, (model[0].weight,), eps=1e-6, atol=1e-4, rtol=1e-4)
    model.load_state_dict(saved)


def test_one_number_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        batch_norm(nn.BatchNorm1d(3), torch.zeros(1, 3))
