"""Gradients that go a way of their own are the library's, and the model is itself again afterwards."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.constant_convolution import ConstantConvolution, faster_input_gradients
from attacks.mode import attack_mode

CONVS = {
    "plain": nn.Conv2d(1, 8, 3, padding=1),
    "strided": nn.Conv2d(2, 8, (4, 3), stride=(2, 3), padding=(1, 0), bias=False),
    "dilated": nn.Conv2d(3, 12, 3, padding=2, dilation=2),
    # With strides and more channels than an image has; the last pixels are in no window of the second one.
    "wide": nn.Conv2d(9, 6, 4, stride=2, padding=1),
    "unreached": nn.Conv2d(6, 5, (2, 3), stride=(2, 3)),
    "filled": nn.Conv2d(3, 16, 5, stride=2, padding=2),
    "one output": nn.Conv2d(5, 1, (4, 6), stride=(4, 2), padding=(2, 3), bias=False),
    # Pixels between two kernels are in no window.
    "point": nn.Conv2d(40, 30, 1, stride=2),
    "gaps": nn.Conv2d(5, 6, (2, 4), stride=(3, 2), padding=(1, 2)),
    "turned": nn.Conv2d(12, 6, 4, padding=(1, 3)),
    "turned and dilated": nn.Conv2d(16, 3, 4, padding=2, dilation=(2, 1)),
}


def gradient(conv: nn.Conv2d, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((conv(leaf) ** 3).sum(), leaf)
    return found


def node(conv: nn.Conv2d, x: Tensor) -> str:
    return str(conv(x.clone().requires_grad_()).grad_fn)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONVS)
def test_the_gradient_is_the_librarys(name, layout):
    conv = copy.deepcopy(CONVS[name]).double()
    x = torch.rand(5, conv.in_channels, 9, 11, dtype=torch.float64).contiguous(memory_format=layout)
    expected, outputs = gradient(conv, x), conv(x)
    with attack_mode(conv):
        assert "ConstantConvolution" in node(conv, x)
        assert torch.equal(conv(x), outputs)
        torch.testing.assert_close(gradient(conv, x), expected)
    assert "forward" not in vars(conv) and "ConstantConvolution" not in node(conv, x)
    with pytest.raises(ZeroDivisionError), attack_mode(conv):
        _ = 1 / 0
    assert "forward" not in vars(conv)


def test_it_is_used_where_it_gains_and_weights_are_constant_only():
    x = torch.rand(2, 4, 6, 6)
    wide, grouped = nn.Conv2d(8, 64, 3), nn.Conv2d(4, 16, 3, groups=2)
    others = [nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(17, 8, 4, stride=2), nn.Conv2d(8, 8, 4, stride=2, dilation=2)]
    others += [nn.Conv2d(17, 4, 4), nn.Conv2d(8, 8, 4, padding=4), nn.Conv2d(17, 8, 2, stride=3)]
    others += [wide, grouped, nn.Conv2d(4, 16, 3, padding_mode="circular", padding=1), nn.Conv2d(4, 15, 3)]
    others.append(nn.Conv2d(4, 16, 3, padding="same"))
    for conv in others:
        with faster_input_gradients(conv):
            assert "forward" not in vars(conv)
    conv = nn.Conv2d(4, 16, 3)
    with faster_input_gradients(conv):
        assert "ConstantConvolution" not in node(conv, x)
        conv(x).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.any()


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 2)])
def test_gradients_of_gradients_and_of_maps_over_images_exist(size, stride):
    weight, x = torch.rand(8, 2, size, size, dtype=torch.float64), torch.rand(3, 2, 5, 5, dtype=torch.float64)
    settings = (None, (stride, stride), (1, 1), (1, 1), 1)

    def own(x: Tensor) -> Tensor:
        return ConstantConvolution.apply(x, weight, *settings).pow(3).sum()

    assert torch.autograd.gradgradcheck(own, x.requires_grad_())
    found = torch.func.vmap(torch.func.grad(lambda one: own(one[None])))(x)
    leaf = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(leaf, weight, *settings).pow(3).sum(), leaf)
    torch.testing.assert_close(found, expected)


class Residual(nn.Module):
    """Strided and plain convolutions with batch normalisation around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.BatchNorm2d(12), nn.Softplus())
        self.down = nn.Sequential(nn.Conv2d(12, 12, 4, stride=2, padding=1), nn.BatchNorm2d(12))
        self.short = nn.Conv2d(12, 12, 2, stride=2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.down(x) + self.short(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_networks_give_the_same_values_gradients_and_statistics_in_every_mode(mode, dtype):
    net = Residual().to(dtype)
    for norm in (net.stem[1], net.down[1]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    net.stem[1].eval()
    x = torch.rand(6, 3, 17, 16, dtype=dtype)
    plain = copy.deepcopy(net)
    for conv in plain.modules():
        if isinstance(conv, nn.Conv2d):
            conv.forward = functools.partial(nn.Conv2d.forward, conv)  # which keeps our own away
    results = []
    for model in (net, plain):
        with attack_mode(model, mode):
            leaf = x.clone().requires_grad_()
            logits = model(leaf)
            (found,) = torch.autograd.grad(logits.square().sum(), leaf)
        results.append((logits, found, dict(model.named_buffers())))
    torch.testing.assert_close(*results)


def test_weights_that_change_between_passes_change_the_gradient():
    conv, x = nn.Conv2d(6, 8, 4, stride=2).double(), torch.rand(2, 6, 8, 8, dtype=torch.float64)
    for _ in range(2):
        with attack_mode(conv):
            found = gradient(conv, x)
            with torch.no_grad():
                conv.weight.mul_(-2.0)
            moved = gradient(conv, x)
        torch.testing.assert_close(moved, gradient(conv, x))
        assert not torch.allclose(moved, found)


def test_pixels_keep_their_precision_under_autocast():
    conv, x = nn.Conv2d(6, 8, 4, stride=2), torch.rand(2, 6, 8, 8)
    expected = gradient(conv, x)
    with attack_mode(conv), torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(conv, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02 * expected.abs().max().item())
