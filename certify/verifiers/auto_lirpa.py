"""Bounds of the auto_LiRPA package, for networks that the suite has no rule for, and to compare with."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import math
import sys
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy
import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.checks import check_problem, checked_logits
from certify.constant_arithmetic import without_broadcasts
from certify.op import UnsupportedOp
from certify.precision import exact_arithmetic, proves, rounding_size
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import CaptureError, capture
from certify.verdict import SoundnessError, Verdict, evaluation, logits_of
from certify.verifier import VERIFIERS, check_fields

ALLOWANCE = 1e-6
"""Share of the sizes of logits and bounds that a float64 bound must exceed: 2^-53 times some 10^10."""

SAMPLES = 8
"""Random points per example that must respect the bounds before one of them is believed."""


@VERIFIERS.register("auto_lirpa")
@dataclass(frozen=True)
class AutoLiRPA:
    """Bounds of the margins by auto_LiRPA's own trace and relaxations, in float64.

    Needs: a network that package can trace; extra package auto_LiRPA. Returns: certified or unknown, for correctly
    classified examples. How: bounds in float64 on a box or ball that rounding has not shrunk, of the network with its
    arithmetic with constants written as the package takes it (`without_broadcasts`). A margin counts as proven
    if it exceeds ALLOWANCE, and where the suite can capture the network also its own allowance for float64. Bounds
    that a sampled point of the ball contradicts are a SoundnessError, never an answer. Sound as far as that package is,
    not complete. Source: Xu et al. (2020), "Automatic perturbation analysis".

    Args:
        method: the package's name of the bound.
        batch_size: examples bounded at a time.
    """

    method: Literal["IBP", "CROWN-IBP", "CROWN"] = "CROWN"
    batch_size: int = 16

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = False
    falsifies: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        check_problem(model, x, y, ball, self.norms)
        x = x.detach().contiguous()
        verdicts: list[Verdict] = []
        for rows in torch.arange(len(x), device=x.device).split(self.batch_size):
            begin = time.perf_counter()
            logits = checked_logits(model, x[rows], y[rows])
            low, proven = self._bounds(model, x[rows], y[rows], ball.select(rows), logits)
            seconds = (time.perf_counter() - begin) / len(rows)
            right = (logits.argmax(1) == y[rows]) & logits.isfinite().all(1)
            for ok, certified, margin in zip(right.tolist(), proven.tolist(), low.tolist(), strict=True):
                status: Literal["certified", "unknown", "misclassified"]
                status = ("certified" if certified else "unknown") if ok else "misclassified"
                known = margin if ok else -math.inf
                verdicts.append(Verdict(status, known, "auto_lirpa", seconds, precision="float64"))
        return verdicts

    @torch.no_grad()
    def _bounds(self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(smallest lower bound of the margins, whether all are proven positive), each `[B]`."""
        with evaluation(model):
            double = copy.deepcopy(model).double()
        points, spec = x.double(), margin_spec(y, logits.shape[1], torch.float64)
        _refuse_mixing(double, points)
        with _float64(), exact_arithmetic():
            low, high = self._package_bounds(double, points, ball, spec)
        _refuse_escapes(double, points, ball, spec, low, high)
        sizes = torch.cat([low.abs(), high.abs(), logits.double().abs()], 1).amax(1, keepdim=True)
        proven = low.isfinite() & (low > ALLOWANCE * sizes)
        try:
            snapshot = capture(double, points[:1]).snapshot().with_spec(spec)
        except (UnsupportedOp, CaptureError):
            return low.amin(1), proven.all(1)
        size = rounding_size(snapshot, Region.around(points, ball))
        return low.amin(1), (proven & proves(low, sizes.expand_as(low), size)).all(1)

    def _package_bounds(self, model: nn.Module, x: Tensor, ball: Ball, spec: Tensor) -> tuple[Tensor, Tensor]:
        package = _package()
        eps = ball.eps_of(x)
        if ball.norm == "linf":
            lo, hi = x - eps, x + eps
            lo = torch.nextafter(lo, torch.full_like(lo, -math.inf))
            hi = torch.nextafter(hi, torch.full_like(hi, math.inf))
            if ball.pixel_range is not None:
                lo, hi = lo.clamp(min=ball.pixel_range[0]), hi.clamp(max=ball.pixel_range[1])
            perturbation = package.PerturbationLpNorm(norm=numpy.inf, eps=float(eps.max()), x_L=lo, x_U=hi)
        else:
            # The pixel range does not cut the ball here, and the largest radius serves all: a larger set.
            perturbation = package.PerturbationLpNorm(norm=2, eps=float(eps.max()) * (1 + 1e-12))
        start = package.BoundedTensor(x, perturbation)
        written = without_broadcasts(model, x)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", torch.jit.TracerWarning)
                bounded = package.BoundedModule(written, x, device=x.device)
            _refuse_frozen_values(caught)
            if ball.norm != "linf" and not _starts_linear(bounded):
                bounded = package.BoundedModule(nn.Sequential(_identity(x), written), x, device=x.device)
            low, high = bounded.compute_bounds(x=(start,), C=spec, method=self.method)
        except (CaptureError, torch.cuda.OutOfMemoryError):
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            # A network beyond the package ends in whatever its code runs into, often an assertion without a word.
            raise UnsupportedOp(
                f"auto_LiRPA cannot bound the network either ({type(e).__name__}: {str(e) or 'without a message'}); "
                "write its forward with the layers of torch.nn that have bound rules, or judge it with robust attack"
            ) from e
        return low.detach(), high.detach()


def _refuse_mixing(model: nn.Module, x: Tensor) -> None:
    """CaptureError where an example's logits depend on the batch that it comes in: bounds are of each example alone."""
    logits, among_others = logits_of(model, x), logits_of(model, torch.cat([x, x.flip(0) / 2]))[: len(x)]
    if not torch.allclose(
        logits, among_others, rtol=1e-6, atol=1e-6 * max(1.0, float(logits.abs().max())), equal_nan=True
    ):
        raise CaptureError("the model's logits of an image depend on the batch that it comes in, or are random")


def _refuse_frozen_values(caught: Sequence[warnings.WarningMessage]) -> None:
    """CaptureError where torch warned that a trace holds for the traced example only: branches and numbers that depend
    on values are constants in it."""
    for warning in caught:
        if issubclass(warning.category, torch.jit.TracerWarning):
            words = str(warning.message).split(". ")[0]
            raise CaptureError(f"auto_LiRPA cannot trace the network, whose forward depends on values: {words}")


def _starts_linear(bounded: Any) -> bool:
    """Whether only linear layers read the input. Every other operation of the package takes an l2 ball for its centre
    when it computes intervals, and its bounds are then too tight."""

    def linear(node: Any) -> bool:
        readers = [bounded[name] for name in node.output_name]
        return bool(readers) and all(
            type(r).__name__ in ("BoundLinear", "BoundConv")
            or (type(r).__name__ in ("BoundFlatten", "BoundReshape") and linear(r))
            for r in readers
        )

    return all(linear(bounded[name]) for name in bounded.input_name)


def _identity(x: Tensor) -> nn.Module:
    """A linear layer that gives `x` back."""
    if x.dim() == 4:
        conv = nn.Conv2d(x.shape[1], x.shape[1], 1, bias=False).to(x)
        conv.weight.copy_(torch.eye(x.shape[1])[:, :, None, None])
        return conv
    numbers = x[0].numel()
    dense = nn.Linear(numbers, numbers, bias=False).to(x)
    dense.weight.copy_(torch.eye(numbers))
    return nn.Sequential(nn.Flatten(), dense, nn.Unflatten(1, x.shape[1:]))


def _refuse_escapes(model: nn.Module, x: Tensor, ball: Ball, spec: Tensor, low: Tensor, high: Tensor) -> None:
    """SoundnessError where margins at points of the ball are outside of the bounds."""
    noise = torch.Generator().manual_seed(0)
    slack = 1e-9 * (1 + low.abs() + high.abs())
    for number in range(SAMPLES):
        points = x if number == 0 else ball.sample(x, noise)
        margins = (spec @ logits_of(model, points).unsqueeze(2)).squeeze(2)
        if bool(((margins < low - slack) | (margins > high + slack)).any()):
            raise SoundnessError("auto_LiRPA's bounds do not hold at a point of the ball; its answer is not used")


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """The package makes some of its constants in the default precision; what it warns of is its own affair."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def _package() -> Any:
    """auto_LiRPA; its release 0.3 asks numpy and torch for three names that they no longer have, and overrides a method
    of torch's modules that has gained a parameter."""
    if not hasattr(numpy.lib, "arraysetops"):
        stand_in: Any = types.ModuleType("numpy.lib.arraysetops")
        stand_in.isin = numpy.isin
        sys.modules.setdefault("numpy.lib.arraysetops", stand_in)
    helper: Any = importlib.import_module("torch.onnx.symbolic_helper")
    if not hasattr(helper, "_set_opset_version"):
        helper._set_opset_version = lambda version: None
    node: Any = torch._C.Node
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, name: getattr(self, self.kindOf(name))(name)
    try:
        package: Any = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise ValueError(
            f"the verifier auto_lirpa needs that package ({error}): pip install --no-deps auto-LiRPA==0.3 appdirs "
            "(its metadata pins torch below 1.13)"
        ) from None
    members = package.BoundedModule._named_members
    if "remove_duplicate" not in inspect.signature(members).parameters:

        def named_members(self: Any, get: Any, prefix: str = "", recurse: bool = True, **options: Any) -> Any:
            return members(self, get, prefix, recurse)

        package.BoundedModule._named_members = named_members
    return package
