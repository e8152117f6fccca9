"""Attacks of training steps pass through layers in another form, and find the same points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust.attacked_layers
from attacks.threat import LinfBall
from attacks.winograd import Winograd
from certify.ops.affine import Conv2d, Linear
from certify.ops.relu import ReLU
from certify.tracing import capture
from robust.attacked_layers import AttackedConv2d, layers_for
from robust.training_attack import attacked_network
from robust.views import Views


def wide_net(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1),
        nn.BatchNorm2d(256),
        activation(),
        nn.Conv2d(256, 256, 3, padding=1, bias=False),
        nn.BatchNorm2d(256),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def views_of(model: nn.Module) -> Views:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(16, 3, 8, 8, generator=generator)
    return Views(capture(model, x[:1]), x, torch.arange(16) % 5, LinfBall(8 / 255))


def input_gradient(network, views: Views) -> Tensor:
    x = views.x.clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(network(x), views.y), x)
    return found


def test_wide_convolutions_take_fewer_multiplications_where_an_attack_passes_through_them_often():
    ops = [node.op for node in views_of(wide_net()).frozen.nodes[1:]]
    kinds = [type(layers_for(10, "float32", 16)(op)) for op in ops]
    assert [type(op) for op in ops[:4]] == [Conv2d, ReLU, Conv2d, ReLU]
    assert kinds[:4] == [Conv2d, ReLU, AttackedConv2d, ReLU]
    assert AttackedConv2d not in {type(layers_for(1, "float32", 16)(op)) for op in ops}
    assert AttackedConv2d not in {type(layers_for(10, "float32", 2)(op)) for op in ops}


def test_a_coarser_arithmetic_has_its_weights_converted_once():
    ops = [layers_for(10, "bfloat16", 16)(node.op) for node in views_of(wide_net()).frozen.nodes[1:]]
    assert {op.weight.dtype for op in ops if isinstance(op, Conv2d | Linear)} == {torch.bfloat16}


def test_logits_and_gradients_are_the_networks_with_any_statistics(monkeypatch):
    for statistics in ("batch", "running", "eval", "train", "train_frozen"):
        # Smooth: a ReLU that rounding turns on or off would move the pixels that it reads.
        plain, views = views_of(wide_net(nn.Tanh)), views_of(wide_net(nn.Tanh))
        expected = attacked_network(plain, statistics)
        made: list[Tensor] = []
        monkeypatch.setattr(robust.attacked_layers, "Winograd", _noting(made))
        network = attacked_network(views, statistics, passes=10)
        assert len(made) == 1
        torch.testing.assert_close(network(views.x), expected(plain.x), rtol=1e-4, atol=1e-5)
        gradient, wanted = input_gradient(network, views), input_gradient(expected, plain)
        assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert len(made) == 1, "the weights' sums are made once for all passes"
        for mine, theirs in zip(views.graph.model.buffers(), plain.graph.model.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_weights_that_a_step_has_changed_are_those_of_the_next_attack():
    model = wide_net()
    before = attacked_network(views_of(model), "train", passes=10)(views_of(model).x)
    with torch.no_grad():
        model[3].weight.mul_(-1.0)
    views = views_of(model)
    after = attacked_network(views, "train", passes=10)(views.x)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, attacked_network(views_of(model), "train")(views.x), rtol=1e-4, atol=1e-5)


def test_an_attack_leaves_no_gradient_on_the_weights():
    views = views_of(wide_net())
    network = attacked_network(views, "train", passes=10)
    assert not network(views.x).requires_grad
    input_gradient(network, views)
    assert all(parameter.grad is None for parameter in views.graph.model.parameters())


def _noting(made: list[Tensor]) -> type:
    class Noting:
        @staticmethod
        def of(weight: Tensor, bias: Tensor | None) -> Winograd:
            made.append(weight)
            return Winograd.of(weight, bias)

    return Noting
