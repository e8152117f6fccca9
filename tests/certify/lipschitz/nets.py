"""Random small networks and boxes, and slow oracles of their Jacobians."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.func import functional_call, vmap

from attacks.threat import Ball, LinfBall
from certify.graph import Snapshot
from certify.ops.affine import Linear
from certify.tracing import capture


def mlp(sizes: list[int], seed: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Dense network in float64; biases are small, so that kinks lie near the origin."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layer = nn.Linear(n, m).double()
        layer.weight.data = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
        layer.bias.data = 0.3 * torch.randn(m, generator=generator, dtype=torch.float64)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def difference_of_relus(sign: float) -> nn.Sequential:
    """x -> relu(x) + sign * relu(-x)."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    model[0].weight.data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    model[2].weight.data = torch.tensor([[1.0, sign]], dtype=torch.float64)
    return model


def box(sizes: list[int], seed: int) -> tuple[Tensor, LinfBall]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(1, sizes[0], generator=generator, dtype=torch.float64) * 0.5
    return x, LinfBall(float(torch.rand((), generator=generator)) * 0.6 + 0.05, None)


class Family(NamedTuple):
    """Networks of one architecture, each with a box of its own.

    Attributes:
        parameters: of all networks, by name, `[N, ...]`.
        together: one network that takes example i through network i.
        ball: its eps is `[N]`.
    """

    template: nn.Sequential
    parameters: dict[str, Tensor]
    together: Snapshot
    x: Tensor
    ball: LinfBall

    def __call__(self, points: Tensor) -> Tensor:
        """Outputs `[N, S, K]` at points `[N, S, d]`, by PyTorch's own layers."""
        return vmap(partial(functional_call, self.template))(self.parameters, points)

    def sample(self, count: int, seed: int) -> Tensor:
        """Points of each network's box, `[N, S, d]`."""
        many = torch.arange(len(self.x)).repeat_interleave(count)
        points = self.ball.select(many).sample(self.x[many], torch.Generator().manual_seed(seed))
        return points.unflatten(0, (-1, count))


def family(sizes: list[int], seeds: Iterable[int]) -> Family:
    """Random networks in random boxes, those that `mlp` and `box` give for the seeds."""
    models = [mlp(sizes, seed) for seed in seeds]
    x, balls = zip(*(box(sizes, seed) for seed in seeds), strict=True)
    parameters = {name: value.detach() for name, value in torch.func.stack_module_state(models)[0].items()}  # type: ignore[arg-type]
    nodes = capture(models[0], x[0]).snapshot().nodes
    rows = iter(parameters.values())
    together = [replace(n, op=Linear(next(rows), next(rows))) if isinstance(n.op, Linear) else n for n in nodes]
    eps = torch.tensor([float(ball.eps) for ball in balls], dtype=torch.float64)
    return Family(models[0], parameters, Snapshot(tuple(together)), torch.cat(x), LinfBall(eps, None))


def jacobians(model: nn.Module, points: Tensor, rows: Tensor) -> Tensor:
    """row . J at each point, `[S, R, *shape]`, by autograd."""
    points = points.detach().requires_grad_()
    logits = model(points)
    found = [torch.autograd.grad((logits * row).sum(), points, retain_graph=True)[0] for row in rows]
    return torch.stack(found, 1)


def cloud(x: Tensor, ball: Ball, count: int, seed: int = 0) -> Tensor:
    """Points of the ball around one example."""
    return ball.sample(x.expand(count, *x.shape[1:]), torch.Generator().manual_seed(seed))


def by_brute_force(model: nn.Sequential, x: Tensor, eps: float) -> Tensor:
    """Greatest sums of |J_cj| `[K]` over the sign patterns of a two-layer-or-so ReLU net whose cells have an interior.

    One linear program per pattern, with none of the suite's code.
    """
    affine = [layer for layer in model if isinstance(layer, nn.Linear)]
    counts = [layer.out_features for layer in affine[:-1]]
    best = torch.zeros(affine[-1].out_features, dtype=torch.float64)
    for pattern in itertools.product((0.0, 1.0), repeat=sum(counts)):
        signs = torch.tensor(pattern, dtype=torch.float64).split(counts)
        A, c = torch.eye(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64)
        lines, limits = [], []
        for layer, sign in zip(affine[:-1], signs, strict=True):
            A, c = layer.weight.data @ A, layer.weight.data @ c + layer.bias.data
            # s z >= t, that is -s A x + t <= s c, for s = +-1.
            s = (2 * sign - 1).unsqueeze(1)
            lines.append(torch.cat([-s * A, torch.ones(len(A), 1)], 1))
            limits.append(s[:, 0] * c)
            A, c = sign.unsqueeze(1) * A, sign * c
        A = affine[-1].weight.data @ A
        bounds = [(v - eps, v + eps) for v in x[0].tolist()] + [(None, 1.0)]
        cost = [0.0] * x.shape[1] + [-1.0]
        found = linprog(cost, torch.cat(lines).numpy(), torch.cat(limits).numpy(), bounds=bounds)
        if found.status == 0 and -found.fun > 1e-9:
            best = torch.maximum(best, A.abs().sum(1))
    return best
