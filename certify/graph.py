"""A model as a graph of ops.

A Graph, which `certify.tracing.capture` makes, holds references to the model's live parameters. `Graph.snapshot` gives
the ops with the weights of this moment, BatchNorm resolved: that is what bounds are computed on, and it is
differentiable with respect to the parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from certify.batch_statistics import batch_norm
from certify.op import AffineOp, Op
from certify.ops.affine import Conv2d, Linear
from certify.ops.batch_norm import BatchNorm, Statistics


@dataclass(frozen=True)
class Node:
    """One op of a snapshot. `inputs` are places in the snapshot's list of nodes; `shape` is per example."""

    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """Ops in topological order with the weights of one moment. Node 0 is the input (its op is never called).

    Calling a snapshot evaluates it: `[B, *input] -> [B, K]`, like the model in evaluation.
    """

    nodes: tuple[Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.evaluate([x])[-1]

    def evaluate(self, start: Sequence[Any], rule: str = "forward") -> list[Any]:
        """Values of all nodes, by the ops' rule "forward" or "interval"; a value is dropped after its last use.

        Args:
            start: a one-element list with the input's value.
        """
        values: list[Any] = [start[0]]
        last_use = self.last_uses()
        for place, node in enumerate(self.nodes[1:], 1):
            values.append(getattr(node.op, rule)(*(values[i] for i in node.inputs)))
            for i in node.inputs:
                if last_use[i] == place:
                    values[i] = None
        return values

    def last_uses(self) -> dict[int, int]:
        """Place of the last node that reads each node."""
        return {i: place for place, node in enumerate(self.nodes) for i in node.inputs}

    def with_spec(self, spec: Tensor) -> Snapshot:
        """The network followed by the rows of `spec` `[B, R, K]`, merged into its last layer where that is dense."""
        *front, last = self.nodes
        if spec.shape[-1:] != last.shape:
            raise ValueError(f"spec has {spec.shape[-1]} columns, the model has outputs of shape {last.shape}")
        shape = (spec.shape[1],)
        readers = [node for node in self.nodes if len(self.nodes) - 1 in node.inputs]
        if isinstance(last.op, Linear) and last.op.weight.dim() == 2 and not readers:
            return Snapshot((*front, Node("spec", last.op.rows(spec), last.inputs, shape)))
        return Snapshot((*self.nodes, Node("spec", Linear(spec), (len(self.nodes) - 1,), shape)))

    def select(self, index: Tensor) -> Snapshot:
        """The network for members of the batch, with repetitions, where layers have rows per example."""
        nodes = (replace(n, op=n.op.select(index)) if isinstance(n.op, Linear) else n for n in self.nodes)
        return Snapshot(tuple(nodes))

    def changed(self, change: Callable[[Op], Op]) -> Snapshot:
        """The network with what `change` makes of each op in its place."""
        return Snapshot(tuple(replace(node, op=change(node.op)) for node in self.nodes))

    def without_gradient(self) -> Snapshot:
        """The same ops with all tensors detached from the parameters."""
        return self.changed(_constant)

    def to(self, dtype: torch.dtype) -> Snapshot:
        """The same ops with floating-point tensors of another precision."""
        return self.changed(lambda op: cast_tensors(op, dtype))


@dataclass(frozen=True)
class Graph:
    """A model as steps that build ops from live parameters (see the module's docstring), and the model itself.

    Attributes:
        group: processes that have a part of every training batch each; BatchNorm's batch statistics are then those of
            the whole. None for one process.
    """

    steps: tuple[Step, ...]
    model: nn.Module
    group: dist.ProcessGroup | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.steps[0].shape

    @cached_property
    def has_batch_norm(self) -> bool:
        """Whether any step is a BatchNorm layer."""
        return bool(self.batch_norm_layers())

    def batch_norm_layers(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The model's BatchNorm layers, in the order of the steps."""
        ops = [step.build() for step in self.steps[1:]]
        return [op.layer for op in ops if isinstance(op, BatchNorm)]

    def snapshot(self, statistics: Mapping[int, Statistics] | None = None) -> Snapshot:
        """Ops with today's weights; every BatchNorm becomes affine and is folded into a preceding convolution.

        Args:
            statistics: batch statistics by step, as `forward_train` returns them; running statistics where None.
        """
        ops = {place: step.build() for place, step in enumerate(self.steps) if place}
        readers = Counter(place for step in self.steps for place in set(step.inputs))
        nodes: list[Node] = []
        where: dict[int, int] = {}
        for place, step in enumerate(self.steps):
            inputs = tuple(where[i] for i in step.inputs)
            op = ops.get(place, INPUT)
            if isinstance(op, BatchNorm):
                chosen = None if statistics is None else statistics[place]
                source = ops.get(step.inputs[0])
                if isinstance(source, Conv2d) and readers[step.inputs[0]] == 1:
                    folded = op.fold_into(source, chosen)
                    nodes[inputs[0]] = Node(step.name, folded, nodes[inputs[0]].inputs, step.shape)
                    where[place] = inputs[0]
                    continue
                op = op.resolve(chosen)
            where[place] = len(nodes)
            nodes.append(Node(step.name, op, inputs, step.shape))
        return Snapshot(tuple(nodes))

    def constant(self, change: Callable[[Op], Op]) -> Graph:
        """The network with today's weights as constants, in the ops that `change` makes of today's.

        BatchNorm layers stay the model's: `forward_train` normalises with each batch's statistics.
        """

        def built(op: Op) -> Callable[[], Op]:
            made = op if isinstance(op, BatchNorm) else change(_constant(op))
            return lambda: made

        return replace(self, steps=(self.steps[0], *(replace(s, build=built(s.build())) for s in self.steps[1:])))

    def forward_train(self, x: Tensor, constant: bool = False) -> tuple[Tensor, dict[int, Statistics]]:
        """Training-mode forward pass: (logits, differentiable batch statistics by step).

        BatchNorm updates its running statistics as in the model's own training mode; Dropout does nothing.

        Args:
            constant: take the parameters as constants, so that gradients flow to x alone (attacks).
        """
        values: list[Any] = [x]
        statistics: dict[int, Statistics] = {}
        last_use = {i: place for place, step in enumerate(self.steps) for i in step.inputs}
        for place, step in enumerate(self.steps[1:], 1):
            op = step.build()
            if isinstance(op, BatchNorm):
                value, statistics[place] = batch_norm(op.layer, values[step.inputs[0]], constant, self.group)
            else:
                op = _constant(op) if constant else op
                value = op.forward(*(values[i] for i in step.inputs))
            values.append(value)
            for i in step.inputs:
                if last_use[i] == place:
                    values[i] = None
        return values[-1], statistics


@dataclass(frozen=True)
class Step:
    """One step of a Graph: `build()` makes its op from the parameters as they are now."""

    name: str
    build: Callable[[], Op]
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


class _Input(AffineOp):
    """Place holder of the input node."""


INPUT = _Input()


def cast_tensors(op: Op, dtype: torch.dtype) -> Op:
    """The op with its floating-point tensors in another precision."""
    return _map_tensors(op, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _constant(op: Op) -> Op:
    return _map_tensors(op, Tensor.detach)


def _map_tensors(op: Op, function: Callable[[Tensor], Tensor]) -> Op:
    changes = {name: function(value) for name, value in vars(op).items() if isinstance(value, Tensor)}
    return type(op)(**{**vars(op), **changes}) if changes else op
