"""Capture of a user's `nn.Module` as a graph of ops: the only file that knows how a model is traced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attacks.constant_convolution import computes_as_its_class
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
    _refuse_hooks(model, "the model")
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


RECOMPUTES = (SpectralNorm, WeightNorm, BasePruningMethod)
"""Hooks of torch that only set a layer's weight before it is used, which the graph then reads."""


def _refuse_hooks(module: nn.Module, name: str) -> None:
    """CaptureError where hooks, or a forward put in the place of the class's, may change what a call computes."""
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, RECOMPUTES)]
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    if before or module._forward_hooks or everywhere:
        raise CaptureError(
            f"{name} has forward hooks, which may change its output and are in no graph; remove them, or write what "
            "they do into the forward"
        )
    if not computes_as_its_class(module):
        raise CaptureError(
            f"the forward of {name} was replaced on the object alone; write it into a class, or take the layer's own"
        )


def _check(graph: Graph, model: nn.Module, probe: Tensor) -> None:
    """Compare graph and model on another batch size, so that no batch-dependent constant goes unnoticed, and on values
    outside of the usual pixels, which reach more of a clipped or branched function.
    """
    with torch.no_grad():
        wide = 3 * torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe)
        x = torch.cat([probe, probe.flip(0)[1:] / 2, wide])
        noise = _noise_of(x.device)
        expected = model(x.clone())
        if any(not torch.equal(before, after) for before, after in zip(noise, _noise_of(x.device), strict=True)):
            raise CaptureError(
                "the model's forward draws random numbers, also in evaluation mode; remove the randomness"
            )
        if not _agree(expected, model(x.clone()), 1e-5):  # a generator of its own, or a state that moves on
            raise CaptureError("the model's forward gives another result for the same input; remove what changes it")
        got = graph.snapshot()(x)
    if not _agree(expected, got, 1e-3) and not _agree_in_float64(model, x):
        raise CaptureError(
            "the captured graph does not reproduce the model's forward; does it use the batch size or randomness?"
        )


def _agree(expected: Tensor, got: Tensor, tolerance: float) -> bool:
    """Whether every logit differs by no more than the share `tolerance` of its own largest value."""
    if expected.shape != got.shape:
        return False
    # Where the model itself gives nan or inf the graph must too: what it means is for the caller to say.
    scale = expected.abs().nan_to_num(nan=0.0, posinf=0.0).amax(0)
    near = (expected - got).abs() <= tolerance * scale
    return bool((near | (expected == got) | (expected.isnan() & got.isnan())).all())


def _agree_in_float64(model: nn.Module, x: Tensor) -> bool:
    """The same by a copy in float64: small logits of large terms may round by more than the tolerance."""
    try:
        precise = copy.deepcopy(model).double()
        expected = precise(x.double())
        got = _Capture(precise, x[:3].double()).graph.snapshot()(x.double())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # whatever a model says that is written for one dtype or cannot be copied: it does not agree
        return False
    return _agree(expected, got, 1e-6)


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

    def __init__(self) -> None:
        super().__init__()
        self.autocast = _autocast()

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _autocast() != self.autocast:
            raise CaptureError(
                "the forward switches torch.autocast itself, and bounds are for the function in full precision; take "
                "the autocast out of the forward"
            )
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inside = _inside(m)
        return super().call_module(m, forward, args, kwargs) if inside is m else inside(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return RULES.for_module(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _autocast() -> list[bool]:
    return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]


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
        written = copy.deepcopy(graph)
        rewrite(graph)
        join_swish(graph, model.get_submodule)
        with torch.no_grad():
            for node in graph.nodes:
                self._visit(node, probe)
        # Tensors of inference mode do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            self._refuse_overwritten(written, probe)
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
        if not value.is_floating_point() or value.dim() < 2 or len(value) != len(probe):
            raise CaptureError(
                f"node {node.name!r}: its value of shape {tuple(value.shape)} is no batch of numbers, one per example"
            )
        if node.op == "call_module":
            layer = self.model.get_submodule(str(node.target))
            _refuse_hooks(layer, str(node.target))
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
        return self._result(node, args, kwargs)

    def _result(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """What the call of a node gives for these arguments."""
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
        return self._result(node, args, torch.fx.map_arg(node.kwargs, self._constant))

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

    def _refuse_overwritten(self, graph: torch.fx.Graph, probe: Tensor) -> None:
        """Refuse a forward that reads a value after some step has changed it in place, itself or through a view: the
        graph keeps the old value.
        """
        values: dict[torch.fx.Node, Any] = {}
        versions: dict[torch.fx.Node, int] = {}
        for node in graph.nodes:
            for source in node.all_input_nodes:
                value = values[source]
                if isinstance(value, Tensor) and _version(value) != versions[source]:
                    raise CaptureError(
                        f"node {node.name!r} reads {source.name!r}, which an earlier step changed in place, perhaps "
                        "through a view; use the form that is not in place"
                    )
            if node.op == "placeholder":
                values[node] = node.args[0] if node.args else probe.clone()
            elif node.op == "get_attr":
                values[node] = self._constant(node)
            elif node.op != "output":
                args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = self._result(node, args, kwargs)
            if isinstance(values.get(node), Tensor):
                versions[node] = _version(values[node])

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
