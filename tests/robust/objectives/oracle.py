"""Small networks in float64, and slow bounds of them that share no code with the suite.

The oracle writes a sequential network as dense matrices, one per stretch between two ReLUs, by feeding unit vectors
through its layers. Everything else (boxes, CROWN, losses) is matrix arithmetic on these, differentiable by autograd.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from attacks.threat import Ball, LinfBall
from certify.tracing import capture
from robust.active import RunFacts, begin
from robust.normalize import Normalize
from robust.objective import OBJECTIVES
from robust.views import Views

CLASSES = 4
SHAPE = (2, 5, 5)
Stats = dict[int, tuple[Tensor, Tensor]]


FITTING = {"gat": {"sections": 1, "permutations": 1, "turns": 1}}
"""Fields of objectives that cannot treat images of 5 by 5 pixels at their defaults."""


def small_net(batch_norm: bool = False, seed: int = 0, hidden: int = 2) -> nn.Sequential:
    """Normalize, two convolutions, `hidden` - 2 dense layers and the logits, with random (also negative) BatchNorm."""
    torch.manual_seed(seed)

    def norm(layer: nn.Module) -> list[nn.Module]:
        return [layer] if batch_norm else []

    layers: list[nn.Module] = [Normalize((0.3, 0.6), (0.25, 0.5))]
    layers += [nn.Conv2d(2, 3, 3, 2, 1), *norm(nn.BatchNorm2d(3)), nn.ReLU()]
    layers += [nn.Conv2d(3, 4, 2, 1, 0, bias=not batch_norm), *norm(nn.BatchNorm2d(4)), nn.ReLU(), nn.Flatten()]
    width = 16
    for _ in range(hidden - 2):
        layers += [nn.Linear(width, 7), *norm(nn.BatchNorm1d(7)), nn.ReLU()]
        width = 7
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # Fresh weights are so small that boxes hardly differ from points.
                layer.weight *= 2
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for value in (layer.weight, layer.bias, layer.running_mean):
                    value.normal_()
                layer.running_var.uniform_(0.5, 2.0)
    return model.train()


def images(batch: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random images of which a third of the pixels are exactly 0 or 1, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((batch, *SHAPE), generator=generator, dtype=torch.float64) * 1.5 - 0.25
    return x.clamp(0, 1), torch.randint(CLASSES, (batch,), generator=generator)


def views_of(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, seed: int = 0, **options) -> Views:
    """Views of one batch at radius `eps`, noise from a fresh generator."""
    return Views(capture(model, x), x, y, LinfBall(eps), torch.Generator().manual_seed(seed), **options)


def objective(name: str, **changes: Any) -> Any:
    """The registered objective, fit for small images; checkpoints that it needs are named after their fields."""
    kind = OBJECTIVES[name]
    return kind(**required(kind), **FITTING.get(name, {}), **changes)


def required(kind: type) -> dict[str, Any]:
    """Values for the fields without a default: names of checkpoints."""
    needed = [f for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return {f.name: (f"{f.name}.safetensors",) if "tuple" in str(f.type) else f"{f.name}.safetensors" for f in needed}


def begun(method: Any, model: nn.Module, epochs: int = 300) -> Any:
    """The method as a run of `model` uses it: other small networks stand for checkpoints and for networks it builds."""
    dtype = next(model.parameters()).dtype

    def another(text: Any) -> nn.Module:
        return small_net(batch_norm=True, seed=len(str(text))).to(dtype)

    def load(path: Any, network: None) -> SimpleNamespace:
        return SimpleNamespace(model=another(path).eval(), settings={"input_shape": SHAPE, "classes": CLASSES})

    run = RunFacts(model, SHAPE, CLASSES, 6, epochs, 1, another, LinfBall(0.05))
    with mock.patch.multiple("robust.auxiliary", load=load, named_network=lambda path: "cnn3"):
        return begin(method, run)


def loss_of(terms: dict[str, Tensor]) -> Tensor:
    """What a trainer minimises."""
    return torch.stack([term.mean() for term in terms.values()]).sum()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Gradient of the loss in every parameter, zero where it does not depend on one."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_same_gradients(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def clean_pass(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Stats]:
    """(logits, mean and biased variance that each BatchNorm sees), differentiable through both."""
    stats: Stats = {}
    for place, layer in enumerate(model):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            axes = [axis for axis in range(x.dim()) if axis != 1]
            mean = x.mean(axes)
            var = (x - _per_channel(mean, x)).square().mean(axes)
            stats[place] = (mean, var)
        x = _apply(layer, x, stats.get(place))
    return x, stats


def logits(model: nn.Sequential, x: Tensor, stats: Stats | None = None) -> Tensor:
    """Logits with the given statistics, running ones where None."""
    for place, layer in enumerate(model):
        x = _apply(layer, x, None if stats is None else stats.get(place))
    return x


def segments(model: nn.Sequential, stats: Stats | None = None) -> list[tuple[Tensor, Tensor]]:
    """(matrix [out, in], offset [out]) of every affine stretch between ReLUs."""
    found, stretch, shape = [], [], SHAPE
    for place, layer in [*enumerate(model), (-1, nn.ReLU())]:
        if not isinstance(layer, nn.ReLU):
            stretch.append((place, layer))
            continue
        size = int(torch.Size(shape).numel())
        value = torch.cat([torch.eye(size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)])
        value = value.view(-1, *shape)
        for at, part in stretch:
            value = _apply(part, value, None if stats is None else stats.get(at))
        shape, value = tuple(value.shape[1:]), value.flatten(1)
        found.append(((value[:-1] - value[-1]).T, value[-1]))
        stretch = []
    return found


def pixel_box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (x - eps).clamp(min=0), (x + eps).clamp(max=1)


def hidden_boxes(
    stretches: list[tuple[Tensor, Tensor]], low: Tensor, high: Tensor, shrink: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """[(lower, upper) before every ReLU, ..., (lower, upper) of the last stretch's input], each [B, n]."""
    low, high = low.flatten(1), high.flatten(1)
    boxes = []
    for matrix, offset in stretches[:-1]:
        positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
        low, high = low @ positive.T + high @ negative.T + offset, high @ positive.T + low @ negative.T + offset
        boxes.append((low, high))
        cut = torch.where((low < 0) & (high > 0), shrink * high, high)
        low, high = low.relu(), cut.relu()
    return [*boxes, (low, high)]


def margin_bounds(
    stretches: list[tuple[Tensor, Tensor]], low: Tensor, high: Tensor, y: Tensor, shrink: float = 1.0
) -> Tensor:
    """Interval lower bounds of z_y - z_k, one class and one example at a time, 0 for k = y: [B, K]."""
    low, high = hidden_boxes(stretches, low, high, shrink)[-1]
    return _lowest_margins(stretches[-1], low, high, y)


def _lowest_margins(last: tuple[Tensor, Tensor], low: Tensor, high: Tensor, y: Tensor) -> Tensor:
    matrix, offset = last
    rows = []
    for b, label in enumerate(y.tolist()):
        row = matrix[label] - matrix
        rows.append(row.clamp(min=0) @ low[b] + row.clamp(max=0) @ high[b] + offset[label] - offset)
    return torch.stack(rows)


def crown_rows(
    stretches: list[tuple[Tensor, Tensor]], boxes: list[tuple[Tensor, Tensor]], low: Tensor, high: Tensor, rows: Tensor
) -> Tensor:
    """CROWN lower bound of rows [B, R, K] of the logits, neuron by neuron from given boxes before the ReLUs: [B, R]."""
    low, high = low.flatten(1), high.flatten(1)
    bounds = []
    for b in range(len(low)):
        A, c = rows[b], torch.zeros(rows.shape[1], dtype=torch.float64)
        for place in range(len(stretches) - 1, -1, -1):
            matrix, offset = stretches[place]
            c, A = c + A @ offset, A @ matrix
            if place:
                lb, ub = boxes[place - 1][0][b], boxes[place - 1][1][b]
                columns = []
                for n in range(len(lb)):
                    if lb[n] >= 0:
                        columns.append(A[:, n])
                    elif ub[n] <= 0:
                        columns.append(torch.zeros_like(A[:, n]))
                    else:
                        slope = ub[n] / (ub[n] - lb[n])
                        adaptive = 1.0 if ub[n] > -lb[n] else 0.0
                        columns.append(A[:, n].clamp(min=0) * adaptive + A[:, n].clamp(max=0) * slope)
                        c = c - A[:, n].clamp(max=0) * slope * lb[n]
                A = torch.stack(columns, 1)
        bounds.append(A.clamp(min=0) @ low[b] + A.clamp(max=0) @ high[b] + c)
    return torch.stack(bounds)


def margin_rows(y: Tensor) -> Tensor:
    """Rows e_y - e_k for every class k, [B, K, K]."""
    identity = torch.eye(CLASSES, dtype=torch.float64)
    return torch.stack([identity[label] - identity for label in y.tolist()])


def loss_of_margins(margins: Tensor, y: Tensor) -> Tensor:
    """log(1 + sum over the other classes of exp(-margin)), [B]."""
    others = torch.ones_like(margins).scatter(1, y[:, None], 0.0)
    return (1 + ((-margins).exp() * others).sum(1)).log()


def loss_of_logits(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per example, [B]."""
    return -(z.softmax(1).gather(1, y[:, None]).squeeze(1)).log()


@dataclass(frozen=True)
class Fixed:
    """An "attack" that always goes the same share of the way through the box, without noise and without gradients."""

    seed: int = 0
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __call__(self, model, x: Tensor, y: Tensor, ball: Ball, *, generator=None, index=None) -> Tensor:
        low, high = ball.box(x)
        return low + self.share(x) * (high - low)

    def share(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(x.shape[1:], generator=generator, dtype=torch.float64).round(decimals=1)


def _apply(layer: nn.Module, x: Tensor, stats: tuple[Tensor, Tensor] | None) -> Tensor:
    if isinstance(layer, Normalize):
        return (x - layer.mean) / layer.std
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        mean, var = (layer.running_mean, layer.running_var) if stats is None else stats
        scaled = (x - _per_channel(mean, x)) / _per_channel((var + layer.eps).sqrt(), x)
        return scaled * _per_channel(layer.weight, x) + _per_channel(layer.bias, x)
    return layer(x)


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (like.dim() - 2))
