"""Capture of a user's `nn.Module` as a graph of ops: the only file that knows how a model is traced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from certify.graph import INPUT, Graph, Step
from certify.op import RULES, Call, Op, Traced, UnsupportedOp
from certify.rewrites import rewrite
from certify.swish import join_swish


class CaptureError(ValueError):
    """A model whose forward cannot be written as a graph; the message says where and what to do."""


def capture(model: nn.Module, example: Tensor) -> Graph:
    """The graph of `model` for inputs shaped like `example`.

    Args:
        model: any module whose forward is made of supported layers and functions; it is traced in evaluation mode and
            left as it was. Of what DataParallel and torch.compile have made, the module inside is read.
        example: a batch `[B, *shape]` (B >= 1) on the model's device; its values do not matter.

    Raises:
        UnsupportedOp: a layer or function without a bound rule; names it and lists the rules that exist.
        CaptureError: control flow that depends on values, mixing of examples, or a forward that the graph does not
            reproduce.
    """
    model = _inside(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward to read; give the module that it was made from")
    if example.dim() < 2:
        raise CaptureError(f"example must be a batch [B, ...], got shape {tuple(example.shape)}")
    probe = torch.rand((3, *example.shape[1:]), dtype=example.dtype, device=example.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        graph = _Capture(model, probe).graph
        _check(graph, model, probe)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape = tuple(probe.shape)
        raise CaptureError(
            f"{type(model).__name__}: the forward pass fails on a batch of shape {shape}: {error}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return graph


def _check(graph: Graph, model: nn.Module, probe: Tensor) -> None:
    """Compare graph and model on another batch size, so that no batch-dependent constant goes unnoticed."""
    with torch.no_grad():
        x = torch.cat([probe, probe.flip(0) / 2])[:5]
        noise = _noise_of(x.device)
        expected = model(x)
        if any(not torch.equal(before, after) for before, after in zip(noise, _noise_of(x.device), strict=True)):
            raise CaptureError(
                "the model's forward draws random numbers, also in evaluation mode; remove the randomness"
            )
        got = graph.snapshot()(x)
    # Where the model itself gives nan the graph must too: what it means is for the caller to say.
    scale = expected.abs().nan_to_num(posinf=0.0).max().clamp(min=1).item()
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
        raise CaptureError(
            "the captured graph does not reproduce the model's forward; does it use the batch size or randomness?"
        )


def _noise_of(device: torch.device) -> list[Tensor]:
    """States of the generators that a forward pass on the device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _inside(module: nn.Module) -> nn.Module:
    """The module itself, without what computes the same in another way around it.

    What is read inside is also what the graph is compared with, so only torch's own wrappers count: none of a subclass,
    of a hook, or of a forward that was put in the place of theirs.
    """
    while True:
        if module._forward_hooks or module._forward_pre_hooks:
            return module
        if type(module) in (nn.DataParallel, nn.parallel.DistributedDataParallel) and "forward" not in vars(module):
            module = module.module  # type: ignore[assignment]
        elif (type(module).__module__, type(module).__name__) == ("torch._dynamo.eval_frame", "OptimizedModule"):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


class _Tracer(torch.fx.Tracer):
    """Stops at every module that has a rule or that is a layer of torch.nn, so that messages name layers."""

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inside = _inside(m)
        return super().call_module(m, forward, args, kwargs) if inside is m else inside(*args, **kwargs)

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
            self._append(node, lambda: INPUT, ())
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
            f"no bound rule for {layer} (node {node.name!r}). Rules exist for: {', '.join(RULES.names())}. "
            "The verifier auto_lirpa has rules of its own"
        )
