"""What an op is: its forward, interval and backward (CROWN) rules, and the tables that map a model's layers to ops.

Shape letters of this package: B examples, R rows (linear functions being bounded), K logits.
`A` is `[R, B, *shape]`, the coefficients of a linear lower bound with respect to a node's value; its
constant is `[R, B]`.
Only lower bounds are propagated: an upper bound of a row is minus the lower bound of the negated row.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attacks.constant_convolution import computes_as_its_class
from certify.interval import BoxesAndPoints, Interval


class Box(NamedTuple):
    """Elementwise bounds, each `[B, *shape]`."""

    lb: Tensor
    ub: Tensor


AnyBox = Box | Interval
"""Elementwise bounds in either form; both have `lb` and `ub`."""


class Lines(NamedTuple):
    """Two linear functions that enclose an activation on a box.

    Slopes and intercepts are `[B, *shape]` or `[R, B, *shape]`.

    An intercept that is zero everywhere may be None.
    """

    lower_slope: Tensor
    lower_intercept: Tensor | None
    upper_slope: Tensor
    upper_intercept: Tensor | None


class Op:
    """One step of a network. Subclasses are frozen dataclasses that hold the tensors of this moment."""

    is_linear: ClassVar[bool] = False

    def forward(self, *inputs: Tensor) -> Tensor:
        """Value `[B, *out]` at the inputs `[B, *in]`."""
        raise NotImplementedError

    def interval(self, *inputs: Interval) -> Interval:
        """Box that contains the op's value for every point of the input boxes."""
        raise NotImplementedError

    def interval_and_points(self, *inputs: BoxesAndPoints) -> BoxesAndPoints:
        """`interval` of the boxes and `forward` of the points."""
        if self.is_linear:  # the radius has no part in the centre, nor the centre in the radius
            out = self.interval(*(Interval(i.values, i.radius) for i in inputs))
            return BoxesAndPoints(out.center, out.radius)
        return BoxesAndPoints.of(self.interval(*(i.boxes for i in inputs)), self.forward(*(i.points for i in inputs)))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Rows `A . op(v)` bounded below by `sum_i A_i . v_i + constant` for all v in the boxes.

        Args:
            A: `[R, B, *out]`.
            boxes: bounds of each input; an affine op ignores them.
            alpha: free parameters of the relaxation `[free, R or 1, B, *in]`; the default choice where None.

        Returns:
            (A per input, each `[R, B, *in]`; constant `[R, B]`).
        """
        raise NotImplementedError

    def loose(self, box: AnyBox) -> Tensor:
        """Numbers of an input for which tighter bounds would tighten this op; bool `[B, *in]`. Affine ops have none."""
        return box.ub > box.lb

    def carried(self, *sizes: Tensor) -> Tensor:
        """For a nonlinear op: by how much its value can change when its inputs change by no more than `sizes`."""
        return sizes[0]

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        """For each input, the op that maps the gradient in this op's value `[B, *out]` to that in the input.

        It encloses every element of Clarke's generalised Jacobian at every point of the boxes: what is not fixed there
        is a Gate (or another op) with a range of factors.
        """
        raise UnsupportedOp(f"{type(self).__name__} has no rule for the bounds of its derivative")

    def lipschitz(self, norm: str) -> float:
        """Greatest ||op(v) - op(w)|| / ||v - w|| of a nonlinear op of one input, in "linf", "l2" or "l1"."""
        raise UnsupportedOp(f"{type(self).__name__} has no rule for its Lipschitz constant")


class AffineOp(Op):
    """An affine map of one input: `forward`, `transpose` (A W), `constant` (A b), `linear_part` and `absolute_part`."""

    is_linear = True

    def absolute(self, radius: Tensor) -> Tensor:
        """The linear part with absolute weights, applied to a radius `[B, *in]`."""
        return self.absolute_part().forward(radius)

    def transpose(self, A: Tensor) -> Tensor:
        """`A W`, `[R, B, *in]`."""
        raise NotImplementedError

    def constant(self, A: Tensor) -> Tensor:
        """`A b`, `[R, B]`; zero for a linear map."""
        return A.new_zeros(A.shape[:2])

    def each(self, rows: Tensor) -> Tensor:
        """The values `[R, B, *out]` of R inputs per example, `[R, B, *in]`."""
        return self.forward(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])

    def linear_part(self) -> AffineOp:
        """The op without its shift."""
        raise UnsupportedOp(f"{type(self).__name__} has no rule for the bounds of its derivative: no linear_part")

    def absolute_part(self) -> AffineOp:
        """The linear part with absolute weights."""
        raise UnsupportedOp(f"{type(self).__name__} has no rule for intervals: no absolute_part")

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval(self.forward(box.center), self.absolute(box.radius))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        return [self.transpose(A)], self.constant(A)

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        return [Adjoint(self.linear_part(), self.absolute_part())]


class NonNegativeOp(AffineOp):
    """A linear map without shift and without negative weights: subclasses give `forward` and `transpose`."""

    def linear_part(self) -> AffineOp:
        return self

    def absolute_part(self) -> AffineOp:
        return self


@dataclass(frozen=True)
class Adjoint(AffineOp):
    """The transpose of a linear map, as an op: `g -> W^T g`, which carries gradients back.

    Attributes:
        map: the linear map W.
        magnitude: |W|.
    """

    map: AffineOp
    magnitude: AffineOp

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.map.transpose(inputs[0].unsqueeze(0)).squeeze(0)

    def absolute(self, radius: Tensor) -> Tensor:
        return self.magnitude.transpose(radius.unsqueeze(0)).squeeze(0)

    def transpose(self, A: Tensor) -> Tensor:
        return self.map.each(A)

    def gradient(self, boxes: Sequence[AnyBox | None]) -> list[Op]:
        return [self.map]


class Activation(Op):
    """An elementwise function: subclasses give `forward` and `lines`, and `interval` where it is not monotone."""

    free: ClassVar[int] = 0
    """Free parameters per neuron that alpha-CROWN may choose, each in [0, 1]."""

    def lines(self, box: AnyBox, alpha: Tensor | None = None) -> Lines:
        """Enclosing lines on the box; `alpha` `[free, ...]` picks among the sound ones."""
        raise NotImplementedError

    def default_alpha(self, box: AnyBox) -> Tensor:
        """The choice that `lines` makes without `alpha`, `[free, B, *shape]`."""
        raise NotImplementedError

    def interval(self, *inputs: Interval) -> Interval:
        (box,) = inputs
        return Interval.from_box(self.forward(box.lb), self.forward(box.ub))

    def backward(
        self, A: Tensor, boxes: Sequence[AnyBox | None], alpha: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        box = boxes[0]
        assert box is not None
        lines = self.lines(box, alpha)
        positive = A >= 0
        constant = A.new_zeros(A.shape[:2])
        for intercept, part in ((lines.lower_intercept, A.clamp(min=0)), (lines.upper_intercept, A.clamp(max=0))):
            if intercept is not None:
                constant = constant + (part * intercept).flatten(2).sum(-1)
        return [A * torch.where(positive, lines.lower_slope, lines.upper_slope)], constant


class UnsupportedOp(ValueError):
    """A layer for which the suite has no bound rule; the message names the node, the layer and the rules that exist."""


@dataclass(frozen=True)
class Traced:
    """Stands for the value of graph node `index` in the arguments of a call; `shape` is per example."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A call as a rule sees it: constants are the live values, tensors that depend on the input are `Traced`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out_shape: tuple[int, ...]
    name: str

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """Argument given by position or by keyword."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(keyword, default)

    def refuse(self, reason: str) -> UnsupportedOp:
        """The error for a form of this call that no rule covers."""
        return UnsupportedOp(f"node {self.name!r}: {reason}")


ModuleRule = Callable[[Any, Call], Op]
FunctionRule = Callable[[Call], Op]


class Rules:
    """Which op stands for which layer, function or tensor method. Files of `certify.ops` fill it."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleRule] = {}
        self._functions: dict[Any, FunctionRule] = {}
        self._loaded = False

    def module(self, *types: type | str) -> Callable[[ModuleRule], ModuleRule]:
        """Decorator for a function `(layer, call) -> Op`; a type may be named by its dotted path, without import."""

        def add(build: ModuleRule) -> ModuleRule:
            for kind in types:
                self._modules[kind if isinstance(kind, str) else _dotted(kind)] = build
            return build

        return add

    def function(self, *targets: Any) -> Callable[[FunctionRule], FunctionRule]:
        """Decorator for a function `Call -> Op`; targets are functions or names of tensor methods."""

        def add(build: FunctionRule) -> FunctionRule:
            for target in targets:
                self._functions[target] = build
            return build

        return add

    def for_module(self, module: nn.Module) -> ModuleRule | None:
        """Rule of a layer: of its own class, or of the nearest base class whose computation it keeps."""
        self._load()
        for kind in type(module).__mro__:
            if _dotted(kind) in self._modules:
                return self._modules[_dotted(kind)] if _computes_as(module, kind) else None
        return None

    def for_function(self, target: Any) -> FunctionRule | None:
        """Rule of a function or of a tensor method's name."""
        self._load()
        return self._functions.get(target)

    def names(self) -> list[str]:
        """Layers that have a rule, by short name."""
        self._load()
        return sorted({name.rsplit(".", 1)[-1] for name in self._modules})

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        folder = importlib.import_module("certify.ops")
        for found in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"certify.ops.{found.name}")


RULES = Rules()


def _computes_as(module: nn.Module, kind: type) -> bool:
    """Whether the module has the methods of `kind` that say what a layer computes."""
    names = ("forward", "_conv_forward", "__call__", "_call_impl")
    return (
        computes_as_its_class(module)
        and not {*names[1:]} & vars(module).keys()
        and all(getattr(type(module), name, None) is getattr(kind, name, None) for name in names)
    )


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
