"""Capture of a user's `nn.Module` as a graph of ops: the only file that knows how a model is traced.

`capture` gives a Graph, which holds references to the model's live parameters. `Graph.snapshot` gives the ops with the
weights of this moment, BatchNorm resolved: that is what bounds are computed on, and it is differentiable with respect
to the parameters.
"""

from __future__ import annotations

import operator
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
from certify.op import RULES, AffineOp, Call, Op, Traced, UnsupportedOp
from certify.ops.affine import Conv2d, Linear
from certify.ops.batch_norm import BatchNorm, Statistics
from certify.rewrites import rewrite
from certify.swish import join_swish


class CaptureError(ValueError):
    """A model whose forward cannot be written as a graph; the message says where and what to do."""


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

    def without_gradient(self) -> Snapshot:
        """The same ops with all tensors detached from the parameters."""
        return Snapshot(tuple(Node(n.name, _map_tensors(n.op, Tensor.detach), n.inputs, n.shape) for n in self.nodes))

    def to(self, dtype: torch.dtype) -> Snapshot:
        """The same ops with floating-point tensors of another precision."""
        return Snapshot(tuple(Node(n.name, cast_tensors(n.op, dtype), n.inputs, n.shape) for n in self.nodes))


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
            op = ops.get(place, _INPUT)
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
                op = _map_tensors(op, Tensor.detach) if constant else op
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


_INPUT = _Input()


def capture(model: nn.Module, example: Tensor) -> Graph:
    """The graph of `model` for inputs shaped like `example`.

    Args:
        model: any module whose forward is made of supported layers and functions; it is traced in evaluation mode and
            left as it was.
        example: a batch `[B, *shape]` (B >= 1) on the model's device; its values do not matter.

    Raises:
        UnsupportedOp: a layer or function without a bound rule; names it and lists the rules that exist.
        CaptureError: control flow that depends on values, mixing of examples, or a forward that the graph does not
            reproduce.
    """
    if example.dim() < 2:
        raise CaptureError(f"example must be a batch [B, ...], got shape {tuple(example.shape)}")
    probe = torch.rand((3, *example.shape[1:]), dtype=example.dtype, device=example.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        graph = _Capture(model, probe).graph
        _check(graph, model, probe)
    finally:
        for module, training in modes.items():
            module.training = training
    return graph


def _check(graph: Graph, model: nn.Module, probe: Tensor) -> None:
    """Compare graph and model on another batch size, so that no batch-dependent constant goes unnoticed."""
    with torch.no_grad():
        x = torch.cat([probe, probe.flip(0) / 2])[:5]
        expected, got = model(x), graph.snapshot()(x)
    # Where the model itself gives nan the graph must too: what it means is for the caller to say.
    scale = expected.abs().nan_to_num(posinf=0.0).max().clamp(min=1).item()
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
        raise CaptureError(
            "the captured graph does not reproduce the model's forward; does it use the batch size or randomness?"
        )


class _Tracer(torch.fx.Tracer):
    """Stops at every module that has a rule or that is a layer of torch.nn, so that messages name layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return RULES.for_module(m) is not None or super().is_leaf_module(m, module_qualified_name)


IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class _Capture:
    """Walks the traced graph once with a probe batch and turns every call that depends on the input into a step."""

    def __init__(self, model: nn.Module, probe: Tensor) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.traced: dict[torch.fx.Node, int] = {}
        self.values: dict[torch.fx.Node, Any] = {}
        self.sizes: set[torch.fx.Node] = set()
        """Nodes that depend on the input's shape only: constants from here on."""
        try:
            graph = _Tracer().trace(model)
        except (torch.fx.proxy.TraceError, TypeError, RuntimeError) as error:
            raise CaptureError(
                f"{type(model).__name__}: the forward pass cannot be traced ({error}); "
                "control flow must not depend on tensor values"
            ) from error
        rewrite(graph)
        join_swish(graph, model.get_submodule)
        with torch.no_grad():
            for node in graph.nodes:
                self._visit(node, probe)
        self.graph = Graph(tuple(self.steps), model)

    def _visit(self, node: torch.fx.Node, probe: Tensor) -> None:
        if node.op == "placeholder":
            if self.steps:
                if node.args:
                    self.values[node] = node.args[0]
                    return
                raise CaptureError(f"the model takes more than one input ({node.name!r}); only images are supported")
            self.values[node] = probe
            self._append(node, lambda: _INPUT, ())
        elif node.op == "output":
            self._finish(node)
        elif any(source in self.traced for source in node.all_input_nodes):
            self._call(node, probe)
        elif any(source in self.sizes for source in node.all_input_nodes):
            self.values[node] = self._run(node)
            self.sizes.add(node)
        else:
            self.values[node] = self._constant(node)

    def _call(self, node: torch.fx.Node, probe: Tensor) -> None:
        value = self._run(node)
        self.values[node] = value
        if not isinstance(value, Tensor):
            if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
                raise UnsupportedOp(f"node {node.name!r}: a layer with several outputs is not supported")
            self.sizes.add(node)
            return
        self._check_in_place(node)
        if not value.is_floating_point() or value.dim() < 2 or len(value) != len(probe):
            raise CaptureError(
                f"node {node.name!r}: its value of shape {tuple(value.shape)} is no batch of numbers, one per example"
            )
        if node.op == "call_module":
            layer = self.model.get_submodule(str(node.target))
            module_rule = RULES.for_module(layer)
            if module_rule is None:
                raise self._unsupported(node, f"nn.{type(layer).__name__} at {node.target}")
            chosen = module_rule
            call = self._as_call(node, tuple(value.shape[1:]))
            build: Callable[[], Op] = lambda: chosen(layer, call)  # noqa: E731
        else:
            function_rule = RULES.for_function(node.target)
            if function_rule is None:
                raise self._unsupported(node, getattr(node.target, "__name__", str(node.target)))
            rule, shape = function_rule, tuple(value.shape[1:])
            build = lambda: rule(self._as_call(node, shape))  # noqa: E731
        try:
            build()
        except UnsupportedOp:
            raise
        except ValueError as error:
            raise UnsupportedOp(f"node {node.name!r}: {error}") from error
        inputs = tuple(self.traced[source] for source in self._tensor_sources(node))
        self._append(node, build, inputs)

    def _append(self, node: torch.fx.Node, build: Callable[[], Op], inputs: tuple[int, ...]) -> None:
        self.traced[node] = len(self.steps)
        self.steps.append(Step(node.name, build, inputs, tuple(self.values[node].shape[1:])))

    def _finish(self, node: torch.fx.Node) -> None:
        (result,) = node.args
        if not isinstance(result, torch.fx.Node) or result not in self.traced:
            raise CaptureError("the model must return one tensor of logits")
        place = self.traced[result]
        # Steps after the returned one are dead code.
        del self.steps[place + 1 :]
        if len(self.steps[-1].shape) != 1:
            raise CaptureError(
                f"the model must return logits [B, K], got shape [B, {', '.join(map(str, self.steps[-1].shape))}]"
            )

    def _run(self, node: torch.fx.Node) -> Any:
        args = torch.fx.map_arg(node.args, self.values.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, self.values.__getitem__)
        # In-place calls would overwrite the values that other nodes still need to see.
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _constant(self, node: torch.fx.Node) -> Any:
        """Live value of a node that does not depend on the input."""
        if node.op == "get_attr":
            value: Any = self.model
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        args = torch.fx.map_arg(node.args, self._constant)
        kwargs = torch.fx.map_arg(node.kwargs, self._constant)
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _as_call(self, node: torch.fx.Node, out_shape: tuple[int, ...]) -> Call:
        def read(source: torch.fx.Node) -> Any:
            if source in self.traced:
                return Traced(self.traced[source], tuple(self.values[source].shape[1:]))
            if source in self.sizes:
                return self.values[source]
            return self._constant(source) if source.op != "placeholder" else self.values[source]

        args = torch.fx.map_arg(node.args, read)
        kwargs = torch.fx.map_arg(dict(node.kwargs), read)
        return Call(tuple(args), kwargs, out_shape, node.name)

    def _check_in_place(self, node: torch.fx.Node) -> None:
        """Refuse a call that overwrites a value which is read again later: the graph keeps the old value."""
        overwritten = node.all_input_nodes[0]
        order = {other: place for place, other in enumerate(node.graph.nodes)}
        if self._is_in_place(node) and any(order[user] > order[node] for user in overwritten.users):
            raise CaptureError(
                f"node {node.name!r} changes the value of {overwritten.name!r} in place, and a later step reads it; "
                "use the form that is not in place"
            )

    def _is_in_place(self, node: torch.fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.model.get_submodule(str(node.target)), "inplace", False))
        name = node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))
        by_name = name.endswith("_") and not name.endswith("__")
        return by_name or node.target in IN_PLACE or bool(node.kwargs.get("inplace", False))

    def _tensor_sources(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Traced tensors among the arguments, in order and with repetitions (x + x reads x twice)."""
        found: list[torch.fx.Node] = []
        torch.fx.map_arg((node.args, node.kwargs), lambda s: found.append(s) if s in self.traced else None)
        return found

    def _unsupported(self, node: torch.fx.Node, layer: str) -> UnsupportedOp:
        return UnsupportedOp(
            f"no bound rule for {layer} (node {node.name!r}). Rules exist for: {', '.join(RULES.names())}"
        )


def cast_tensors(op: Op, dtype: torch.dtype) -> Op:
    """The op with its floating-point tensors in another precision."""
    return _map_tensors(op, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _map_tensors(op: Op, function: Callable[[Tensor], Tensor]) -> Op:
    changes = {name: function(value) for name, value in vars(op).items() if isinstance(value, Tensor)}
    return type(op)(**{**vars(op), **changes}) if changes else op
