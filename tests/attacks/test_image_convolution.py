"""Gradients in images by product and fold are the library's, and the model is itself again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.image_convolution import ImageConvolution, faster_image_gradients
from attacks.mode import attack_mode

CONVS = {
    "plain": nn.Conv2d(1, 8, 3, padding=1),
    "strided": nn.Conv2d(2, 8, (4, 3), stride=(2, 3), padding=(1, 0), bias=False),
    "dilated": nn.Conv2d(3, 12, 3, padding=2, dilation=2),
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
        assert "ImageConvolution" in node(conv, x)
        assert torch.equal(conv(x), outputs)
        torch.testing.assert_close(gradient(conv, x), expected)
    assert "forward" not in vars(conv) and "ImageConvolution" not in node(conv, x)
    with pytest.raises(ZeroDivisionError), attack_mode(conv):
        _ = 1 / 0
    assert "forward" not in vars(conv)


def test_it_is_used_for_images_and_constant_weights_only():
    x = torch.rand(2, 4, 6, 6)
    wide, grouped = nn.Conv2d(8, 64, 3), nn.Conv2d(4, 16, 3, groups=2)
    others = [wide, grouped, nn.Conv2d(4, 16, 3, padding_mode="circular", padding=1), nn.Conv2d(4, 15, 3)]
    others.append(nn.Conv2d(4, 16, 3, padding="same"))
    for conv in others:
        with faster_image_gradients(conv):
            assert "forward" not in vars(conv)
    conv = nn.Conv2d(4, 16, 3)
    with faster_image_gradients(conv):
        assert "ImageConvolution" not in node(conv, x)
        conv(x).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.any()


def test_gradients_of_gradients_and_of_maps_over_images_exist():
    weight, x = torch.rand(8, 2, 3, 3, dtype=torch.float64), torch.rand(3, 2, 5, 5, dtype=torch.float64)
    settings = (None, (1, 1), (1, 1), (1, 1))

    def own(x: Tensor) -> Tensor:
        return ImageConvolution.apply(x, weight, *settings).pow(3).sum()

    assert torch.autograd.gradgradcheck(own, x.requires_grad_())
    found = torch.func.vmap(torch.func.grad(lambda one: own(one[None])))(x)
    leaf = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(leaf, weight, *settings).pow(3).sum(), leaf)
    torch.testing.assert_close(found, expected)
