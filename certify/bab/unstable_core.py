"""The core of a network on a region: the affine maps between its unstable neurons, everything else folded away.

On one region most neurons are stable. What stands between the unstable ones is affine, whatever layers it is made of,
so branch and bound needs neither convolutions nor a graph: a bound of many domains is one product with a matrix per
layer of unstable neurons. Convolutional nets give matrices that are mostly zero; those are stored sparse.

Shape letters of this package: D domains (columns), N unstable neurons in topological order, M inputs, S stable neurons
of the first activation, R rows of the specification. Tensors are feature-major, `[N, D]`: a layer is a contiguous
block, and sparse products want it so. The input is written `center + radius * u`; for an l_inf ball, u is any point of
[-1, 1]^M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from certify.bab.matrix import SPARSE_BELOW, Chained, Matrix
from certify.bounds.crown import Boxes, row_budget
from certify.graph import Node, Snapshot
from certify.op import Activation, Box, Lines, UnsupportedOp
from certify.ops.affine import Linear
from certify.ops.relu import ReLU
from certify.precision import ALLOWANCES, rounding_sizes
from certify.region import Region


@dataclass(frozen=True)
class Affine:
    """A function `x . u + a . (values after activation) + constant`: `[M, 1]`, `[N, 1]`, `[1]`."""

    x: Tensor
    a: Tensor
    constant: Tensor

    def __call__(self, u: Tensor, a: Tensor) -> Tensor:
        """Values `[D]` at `u` `[M, D]` and `a` `[N, D]`."""
        return (self.x.T @ u)[0] + (self.a.T @ a)[0] + self.constant


@dataclass(frozen=True)
class Layer:
    """The unstable neurons of one activation.

    Attributes:
        place: node of the activation in the snapshot; op: the activation.
        index: flat numbers of the neurons, `[n]`.
        part: their rows among all N neurons; reads: those of the neurons before them that they depend on.
        weight: `[n, size of reads]`, of the values after activation.
    """

    place: int
    op: Activation
    index: Tensor
    part: slice
    reads: slice
    weight: Matrix


@dataclass(frozen=True)
class Core:
    """See the module's docstring. One example. Before activation, z = input_weight u + weight a + bias, layer by layer.

    Attributes:
        region: of the input.
        input_weight: `[n, M]` of the first n neurons, which alone read the input itself; bias: `[N, 1]`.
        lb, ub: bounds of z, `[N, 1]`.
        slack: by how much the z of the network may differ from those that this core computes, `[N, 1]`.
        slope: slope of each neuron where its input is negative (0 for ReLU), `[N, 1]`.
        fixed: lines of the neurons that are no (leaky) ReLUs and cannot be split, each `[N, 1]`; None where all can.
        splittable: bool `[N, 1]`.
        outputs: the rows of the specification.
    """

    region: Region
    layers: tuple[Layer, ...]
    input_weight: Matrix | Chained
    bias: Tensor
    lb: Tensor
    ub: Tensor
    slack: Tensor
    slope: Tensor
    fixed: Lines | None
    splittable: Tensor
    outputs: tuple[Affine, ...]

    def __len__(self) -> int:
        return len(self.lb)

    @cached_property
    def prefixes(self) -> tuple[Core, ...]:
        """Cores of the first 1, 2, ... layers, without outputs."""
        return tuple(self._prefix(count) for count in range(1, len(self.layers) + 1))

    def _prefix(self, count: int) -> Core:
        end = self.layers[count - 1].part.stop
        fixed = None if self.fixed is None else Lines(*(t[:end] for t in self.fixed if t is not None))
        return replace(
            self,
            layers=self.layers[:count],
            input_weight=self.input_weight.top(min(end, self.input_weight.shape[0])),
            fixed=fixed,
            outputs=(),
            **{name: getattr(self, name)[:end] for name in ("bias", "lb", "ub", "slack", "slope", "splittable")},
        )

    def evaluate(self, u: Tensor, fed: Tensor | None = None) -> Tensor:
        """The network itself: values after activation `[N, D]` at `u` `[M, D]`.

        Args:
            fed: `input_weight u`, where it is known.
        """
        values = self.bias.repeat(1, u.shape[1])
        values[: self.input_weight.shape[0]] += self.input_weight.times(u) if fed is None else fed
        for layer in self.layers:
            z = values[layer.part] + layer.weight.times(values[layer.reads])
            values[layer.part] = layer.op.forward(z)
        return values

    def pixels(self, u: Tensor) -> Tensor:
        """The input `[D, *shape]` that `u` `[M, D]` stands for."""
        center, radius = self.region.center, self.region.radius
        return center + radius * u.T.reshape(-1, *center.shape[1:])

    def inside(self, u: Tensor) -> Tensor:
        """The points moved into the ball, where the region is one: corners of its box lie outside."""
        region = self.region
        if region.ball is None:
            return u
        ball = region.ball.select(torch.zeros(u.shape[1], dtype=torch.int64, device=u.device))
        points = ball.project(self.pixels(u), region.x.expand(u.shape[1], *region.x.shape[1:]))
        moved = (points - region.center) / torch.where(region.radius > 0, region.radius, 1.0)
        return moved.flatten(1).T.contiguous()


def obstacle(snapshot: Snapshot) -> Node | None:
    """The first node whose op can neither be folded nor has neurons to split; None where branch and bound applies."""
    return next((n for n in snapshot.nodes[1:] if not (n.op.is_linear or isinstance(n.op, Activation))), None)


def core_of(snapshot: Snapshot, region: Region, boxes: Boxes) -> Core:
    """The core of a network that ends in its specification.

    Args:
        snapshot: ends in rows for one example.
        region: of that example.
        boxes: bounds of every node that a nonlinear op reads.

    Raises:
        UnsupportedOp: a nonlinear op that is no function of single numbers.
    """
    if (node := obstacle(snapshot)) is not None:
        raise UnsupportedOp(
            f"node {node.name!r}: branch and bound splits elementwise activations and MaxPool2d; "
            f"it has no rule for {type(node.op).__name__}"
        )
    builder = _Builder(snapshot, region, boxes)
    for place, node in enumerate(snapshot.nodes[1:], 1):
        if isinstance(node.op, Activation):
            builder.add(place)
    return builder.core()


@dataclass(frozen=True)
class _Stem:
    """Stable neurons of the first activation that the neurons behind it read the input through.

    Attributes:
        place: node of the activation; index: flat numbers of its neurons, `[S]`.
        slope: of the activation there, `[S]`.
        weight: `[S, M]`; bias: `[S, 1]`: what they are of the input, before activation.
    """

    place: int
    index: Tensor
    slope: Tensor
    weight: Tensor
    bias: Tensor


class _Builder:
    def __init__(self, snapshot: Snapshot, region: Region, boxes: Boxes) -> None:
        self.snapshot, self.region, self.boxes = snapshot, region, boxes
        self.sizes = rounding_sizes(snapshot, region)
        self.inputs = region.center[0].numel()
        self.layers: dict[int, Layer] = {}
        self.through: dict[int, Tensor] = {}
        """Slope of the stable neurons of an activation, 0 at the unstable ones; `[*shape]`."""
        self.stem: _Stem | None = None
        self.weights: list[Tensor] = []
        """Of the input and of the stem, `[n, M + S]` for each layer."""
        self.biases: list[Tensor] = []
        self.count = 0

    def add(self, place: int) -> None:
        node = self.snapshot.nodes[place]
        assert isinstance(node.op, Activation)
        (source,) = node.inputs
        box = Box(self.boxes[source].lb, self.boxes[source].ub)
        kept = node.op.loose(box)[0]
        slopes = node.op.lines(box).lower_slope[0]
        if not isinstance(node.op, ReLU):
            # What is stable here has a point for a box; its line is the constant through it.
            kept = torch.ones_like(kept)
        elif isinstance(self.snapshot.nodes[source].op, Linear):
            active = box.lb[0] >= 0
            if int(active.sum()) < self.loose_after(place):
                # To fold these few away would give every neuron behind them a dense row of inputs of its own.
                kept = kept | active
        index = kept.flatten().nonzero().flatten()
        self.through[place] = torch.where(kept, torch.zeros_like(slopes), slopes)
        weight, bias = self.rows(source, index)
        part = slice(self.count, self.count + len(index))
        hidden = weight[:, self.front :]
        read = hidden.count_nonzero(0).nonzero().flatten()
        reads = slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, 0)
        is_first = not self.layers
        self.layers[place] = Layer(place, node.op, index, part, reads, Matrix(hidden[:, reads].contiguous()))
        self.weights.append(weight[:, : self.front])
        self.biases.append(bias)
        self.count += len(index)
        if is_first:
            self.stem = self.stem_at(place)

    @property
    def front(self) -> int:
        """Columns before those of the neurons: the input's and the stem's."""
        return self.inputs + (0 if self.stem is None else len(self.stem.index))

    def stem_at(self, place: int) -> _Stem | None:
        """The stable neurons of the first activation, unless it is as cheap to fold them into the rows behind."""
        slope = self.through[place].flatten()
        index = slope.nonzero().flatten()
        saved = self.loose_after(place) * (self.inputs - len(index))
        if saved <= 0 or not len(index):
            return None
        weight, bias = self.rows(self.snapshot.nodes[place].inputs[0], index)
        added = min(weight.numel(), int(weight.count_nonzero()) / SPARSE_BELOW)
        return _Stem(place, index, slope[index], weight[:, : self.inputs], bias) if saved > added else None

    def loose_after(self, place: int) -> int:
        """Unstable neurons of the activations behind a node."""
        count = 0
        for node in self.snapshot.nodes[place + 1 :]:
            if isinstance(node.op, Activation):
                box = self.boxes[node.inputs[0]]
                count += int(node.op.loose(Box(box.lb, box.ub)).sum())
        return count

    def rows(self, start: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """(weight `[n, M + S + N so far]`, bias `[n, 1]`) of neurons of a node."""
        shape = self.snapshot.nodes[start].shape
        width = math.prod(shape)
        widest = max(math.prod(node.shape) for node in self.snapshot.nodes[: start + 1])
        step = max(1, row_budget(index.device) // (2 * widest))
        weights, biases = [], []
        for some in index.split(step):
            A = torch.zeros(len(some), 1, width, dtype=self.region.center.dtype, device=index.device)
            A[:, 0].scatter_(1, some.unsqueeze(1), 1.0)
            weight, bias = self.walk(start, A.view(len(some), 1, *shape))
            weights.append(weight)
            biases.append(bias)
        if not weights:
            empty = self.region.center.new_zeros((0, self.front + self.count))
            return empty, empty[:, :1]
        return torch.cat(weights), torch.cat(biases)

    def walk(self, start: int, A: Tensor) -> tuple[Tensor, Tensor]:
        """Follow rows `A` `[n, 1, *shape of start]` back to the input, stopping at unstable neurons and at the stem."""
        rows = len(A)
        weight = A.new_zeros((rows, self.front + self.count))
        constant = A.new_zeros((rows, 1))
        pending = {start: A}
        for place in range(start, 0, -1):
            if place not in pending:
                continue
            node, coefficients = self.snapshot.nodes[place], pending.pop(place)
            if place in self.layers:
                layer = self.layers[place]
                columns = slice(self.front + layer.part.start, self.front + layer.part.stop)
                weight[:, columns] = coefficients.flatten(1)[:, layer.index]
                if self.stem is not None and place == self.stem.place:
                    weight[:, self.inputs : self.front] = coefficients.flatten(1)[:, self.stem.index] * self.stem.slope
                    continue
                sources = [coefficients * self.through[place]]
            else:
                sources, added = node.op.backward(coefficients, [None] * len(node.inputs))
                constant = constant + added
            for i, source in zip(node.inputs, sources, strict=True):
                pending[i] = pending[i] + source if i in pending else source
        weight[:, : self.inputs] = pending[0].flatten(1) if 0 in pending else 0.0
        return weight, constant

    def core(self) -> Core:
        last = len(self.snapshot.nodes) - 1
        (rows,) = self.snapshot.nodes[last].shape
        weight, bias = self.rows(last, torch.arange(rows, device=self.region.center.device))
        outputs = [
            Affine(x.unsqueeze(1), a.unsqueeze(1), c)
            for x, a, c in zip(self.of_unit(weight), weight[:, self.front :], self.at_center(weight, bias), strict=True)
        ]
        layers = tuple(self.layers.values())
        ends = [self.ends(layer) for layer in layers]
        lb, ub, slack, slope, splittable = (self.column([e[i] for e in ends]) for i in range(5))
        splittable = splittable.bool()
        fixed = None
        if not bool(splittable.all()):
            lines = [self.lines(layer) for layer in layers]
            fixed = Lines(*(self.column([some[i] for some in lines]) for i in range(4)))
        empty = self.region.center.new_zeros((0, self.front))
        weight = torch.cat([*(F.pad(w, (0, self.front - w.shape[1])) for w in self.weights), empty])
        reading = weight.count_nonzero(1).nonzero().flatten()
        return Core(
            self.region,
            layers,
            self.input_map(weight[: int(reading[-1]) + 1 if len(reading) else 0]),
            self.at_center(weight, torch.cat([*self.biases, empty[:, :1]])),
            lb,
            ub,
            slack,
            slope,
            fixed,
            splittable,
            tuple(outputs),
        )

    def of_unit(self, weight: Tensor) -> Tensor:
        """Weights of u, `[n, M]`, for weights `[n, >= M + S]` of the input and the stem."""
        direct = weight[:, : self.inputs]
        if self.stem is not None:
            direct = direct + weight[:, self.inputs : self.front] @ self.stem.weight
        return direct * self.region.radius.flatten()

    def input_map(self, weight: Tensor) -> Matrix | Chained:
        """The same as a matrix, multiplied out only where a neuron behind the stem reads the input past it."""
        direct, through = weight[:, : self.inputs], weight[:, self.inputs : self.front]
        near = int(direct.count_nonzero(1).nonzero().max()) + 1 if bool(direct.any()) else 0
        if self.stem is None or near == len(weight) or bool(through[:near].any()):
            return Matrix(self.of_unit(weight))
        front = torch.cat([direct[:near], self.stem.weight]) * self.region.radius.flatten()
        return Chained(Matrix(front), near, Matrix(through[near:].contiguous()))

    def at_center(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The bias `[n, 1]` that belongs to u, for the same weights and their bias."""
        # Summed in float64: the centre's share is a constant of the network, and rounding it once is enough.
        center = self.region.center.double().view(-1, 1)
        if self.stem is not None:
            center = torch.cat([center, self.stem.weight.double() @ center + self.stem.bias])
        return (weight[:, : self.front].double() @ center + bias).to(bias.dtype)

    def column(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([*parts, self.region.center.new_zeros(0)]).unsqueeze(1)

    def ends(self, layer: Layer) -> tuple[Tensor, ...]:
        """(lb, ub, slack, slope, splittable) of a layer's neurons, `[n]` each."""
        (source,) = self.snapshot.nodes[layer.place].inputs
        box = self.boxes[source]
        lb, ub = box.lb.flatten()[layer.index], box.ub.flatten()[layer.index]
        slack = self.sizes[source].flatten()[layer.index] * ALLOWANCES[lb.dtype][1]
        relu = isinstance(layer.op, ReLU)
        slope = layer.op.negative_slope if isinstance(layer.op, ReLU) else 0.0
        return lb, ub, slack, torch.full_like(lb, slope), torch.full_like(lb, float(relu))

    def lines(self, layer: Layer) -> list[Tensor]:
        box = self.boxes[self.snapshot.nodes[layer.place].inputs[0]]
        lines = layer.op.lines(Box(box.lb, box.ub))
        filled = [torch.zeros_like(box.lb) if line is None else line for line in lines]
        return [line.flatten()[layer.index] for line in filled]
