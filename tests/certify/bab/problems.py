"""Random small problems that an exact method can decide: an image, its label, a network and a ball."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks.threat import LinfBall

KINDS = ("dense", "deep", "conv", "residual", "leaky_relu", "bottleneck")
CLASSES = 3


class Problem(NamedTuple):
    """One example `x` `[1, *shape]` with the label that the network predicts."""

    model: nn.Module
    x: Tensor
    y: Tensor
    ball: LinfBall


class Residual(nn.Module):
    """`x + f(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def layers(kind: str, activation: type[nn.Module] = nn.ReLU) -> tuple[nn.Sequential, tuple[int, ...]]:
    """(network, shape of its input): 2 to 6 inputs, or up to 60 activations."""
    inputs = int(torch.randint(2, 7, ()))
    width = int(torch.randint(3, 9, ()))
    if kind == "dense":
        width *= 2
        body = [nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation()]
        return nn.Sequential(*body, nn.Linear(width, CLASSES)), (inputs,)
    if kind == "deep":
        body = [nn.Linear(inputs, width), activation()]
        for _ in range(3):
            body += [nn.Linear(width, width), activation()]
        return nn.Sequential(*body, nn.Linear(width, CLASSES)), (inputs,)
    if kind == "conv":
        body = [nn.Conv2d(1, 3, 2, padding=1), activation(), nn.Conv2d(3, 2, 3, stride=2), activation(), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(8, width), activation(), nn.Linear(width, CLASSES)), (1, 4, 4)
    if kind == "residual":
        inner = nn.Sequential(nn.Linear(width, width), activation(), nn.Linear(width, width))
        body = [nn.Linear(inputs, width), activation(), Residual(inner), activation(), Residual(inner)]
        return nn.Sequential(*body, nn.Linear(width, CLASSES)), (inputs,)
    if kind == "leaky_relu":
        leaky = nn.LeakyReLU(0.2)
        body = [nn.Linear(inputs, width), leaky, nn.Linear(width, 2 * width), leaky]
        return nn.Sequential(*body, nn.Linear(2 * width, CLASSES)), (inputs,)
    assert kind == "bottleneck"
    body = [nn.Linear(inputs, 12), activation(), nn.Linear(12, 2), activation(), nn.Linear(2, 12), activation()]
    return nn.Sequential(*body, nn.Linear(12, CLASSES)), (inputs,)


def random_problem(seed: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Problem number `seed`; about as many are robust as not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, shape = layers(KINDS[seed % len(KINDS)])
        gain = 10 ** float(torch.empty(()).uniform_(0.0, 0.6))
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.data *= gain
        x = torch.rand(1, *shape)
        with torch.no_grad():
            logits = model(x)
            # Which class wins is up to the pixels, not to the biases.
            model[-1].bias -= 0.8 * logits[0] * float(torch.rand(()))
        eps = 10 ** float(torch.empty(()).uniform_(-1.7, -0.3))
    model, x = model.to(dtype).eval(), x.to(dtype)
    return Problem(model, x, model(x).argmax(1), LinfBall(eps))
