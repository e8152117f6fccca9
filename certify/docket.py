"""The bookkeeping that verifiers share: which targets of which examples are still open."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks.attack import Attack
from attacks.threat import Ball
from certify.bab.max_pool import splits
from certify.bounds.crown import Boxes
from certify.checks import check_problem, checked_logits
from certify.graph import Snapshot
from certify.op import Box
from certify.precision import Precision, exact_arithmetic, proves, rounding_size
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import CaptureError, capture
from certify.verdict import Verdict, falsified, logits_of, refutes

NORMS = ("linf", "l2", "l1")


class Request(NamedTuple):
    """What a bound is asked for, besides the network and the region.

    Attributes:
        wanted: rows that count, bool `[B, R]`; the others are padding and repeat a row that counts.
        enough: whether lower bounds and their scale, each `[B, R]`, prove all rows that count, or the time is up.
        deadline: reading of time.perf_counter() after which no more work is begun.
        keep: takes bounds of the hidden neurons that later methods may begin with.
    """

    wanted: Tensor
    enough: Callable[[Tensor, Tensor], bool]
    deadline: float = math.inf
    keep: Callable[[Boxes], None] = lambda boxes: None


BoundMethod = Callable[[Snapshot, Region, Request], tuple[Tensor, Tensor]]
"""(network that ends in its specification, region, request) -> (lower bounds, scale of rounding), each `[B, R]`."""

Arithmetic = Callable[[Snapshot, Region], Tensor]
"""(network that ends in its specification, region) -> what a bound's rounding can do to each row, `[B, R]`."""


class Problem(NamedTuple):
    """What is left to decide of one example.

    Attributes:
        snapshot: network that ends in the open margins; region: of the example, a batch of one.
        size: rounding size of the margins, `[R]`.
        known: best lower bounds so far, float64 `[R]` on the CPU.
        boxes: bounds of the hidden neurons, if a stage before kept them.
        deadline: reading of time.perf_counter() after which nothing new is begun.
    """

    snapshot: Snapshot
    region: Region
    size: Tensor
    known: Tensor
    boxes: Boxes | None
    deadline: float


class Finding(NamedTuple):
    """The answer to a Problem.

    Attributes:
        low: lower bounds of the margins, float64 `[R]` on the CPU; proven: which are proven positive, bool `[R]`.
        witness: a point `[*shape]` that may be misclassified.
        domains: subproblems that were bounded.
        doubtful: whether rounding alone kept a margin from being decided.
    """

    low: Tensor
    proven: Tensor
    witness: Tensor | None
    domains: int
    doubtful: bool


@dataclass
class Case:
    """What is known about one example.

    Attributes:
        best: best lower bound of each margin, float64 `[K - 1]`, targets ascending; -inf where there is none.
        proven: targets that are shown to be out of reach, bool `[K - 1]`.
        domains: subproblems bounded so far.
        boxes: bounds of the hidden neurons, in the precision of the examples.
    """

    best: Tensor
    proven: Tensor
    seconds: float = 0.0
    precision: Precision = "float32"
    domains: int = 0
    boxes: Boxes | None = None
    verdict: Verdict | None = None


class Docket:
    """The examples of one call of a verifier, from the clean prediction to their verdicts.

    `prove` and `falsify` see only the examples that are not decided and, of these, the targets that are not proven.
    What is found for an example does not depend on its neighbours in the batch, apart from rounding, time limits, and
    the margin (not the status) of an example that is proven while the bound of its batch is still being improved.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        index: Tensor | None = None,
        timeout: float = math.inf,
    ) -> None:
        """Predict and capture; arguments and errors as `Verifier.__call__`. `timeout` is in seconds per example."""
        check_problem(model, x, y, ball, NORMS)
        x = x.detach().contiguous()  # images may come with their channels side by side
        self.model, self.x, self.y, self.ball, self.timeout = model, x, y, ball, timeout
        self.index = torch.arange(len(x)) if index is None else index
        self._networks: dict[torch.dtype, Snapshot | None] = {}
        self.cases: list[Case] = []
        if not len(x):
            return
        begin = time.perf_counter()
        logits = checked_logits(model, x, y)
        self.classes = logits.shape[1]
        self._network(x.dtype)
        seconds = (time.perf_counter() - begin) / len(x)
        for row, label in zip(logits.cpu(), y.tolist(), strict=True):
            best = torch.full((self.classes - 1,), -math.inf, dtype=torch.float64)
            case = Case(best, torch.zeros(self.classes - 1, dtype=torch.bool), seconds)
            if not bool(torch.isfinite(row).all()):
                case.verdict = Verdict("unknown", -math.inf, "clean", seconds)
            elif int(row.argmax()) != label:
                case.verdict = Verdict("misclassified", -math.inf, "clean", seconds)
            self.cases.append(case)

    def open(self) -> list[int]:
        """Examples without a verdict that have time left."""
        return [i for i, case in enumerate(self.cases) if case.verdict is None and case.seconds < self.timeout]

    def prove(self, method: str, bound: BoundMethod, batch_size: int, arithmetic: Arithmetic = rounding_size) -> None:
        """Bound the open margins; an example whose last target is proven is certified by `method`."""
        for index in _chunks(self.open(), batch_size):
            with self._timed(index), exact_arithmetic(), torch.no_grad():
                self._prove(index, bound, arithmetic)
            for case in (self.cases[i] for i in index):
                if bool(case.proven.all()):
                    margin = float(case.best.min())
                    case.verdict = Verdict("certified", margin, method, case.seconds, precision=case.precision)

    def falsify(self, method: str, attack: Attack, batch_size: int) -> None:
        """Try the points that an attack proposes; an example with a witness among them is falsified by `method`.

        An attack that is still at work when the time of its examples is up has proposed nothing.
        """
        for index in _chunks(self.open(), batch_size):
            x, y, ball = self._select(index)
            with self._timed(index):
                try:
                    with exact_arithmetic(), _until(self.model, self._deadline(index)):
                        points = attack(self.model, x, y, ball, index=self.index[index])
                except _TimeUp:
                    continue
                wrong = (logits_of(self.model, points).argmax(1) != y).tolist()
            # As they are: an attack whose points leave the ball is at fault, and its points are no witnesses.
            for i, point, suspected in zip(index, points, wrong, strict=True):
                if suspected:
                    self._falsify(i, point, method)

    def splits(self) -> bool:
        """Whether branch and bound can split the network's nonlinear ops."""
        network = self._networks.get(self.x.dtype)
        return network is None or splits(network)

    def decide(self, method: str, decider: Callable[[Problem], Finding]) -> None:
        """Let a complete method decide the open examples, one by one.

        What float32 leaves in doubt is decided again in float64, as far as the example's time allows.
        """
        for i in self.open():
            case = self.cases[i]
            for dtype in dict.fromkeys((self.x.dtype, torch.float64)):
                if self._network(dtype) is None or case.seconds >= self.timeout:
                    break
                targets = (~case.proven).nonzero().flatten()
                with self._timed([i]), exact_arithmetic(), torch.no_grad():
                    found = decider(self._problem(i, targets, dtype))
                case.domains += found.domains
                case.best[targets] = torch.where(found.proven, found.low, torch.maximum(case.best[targets], found.low))
                case.proven[targets] |= found.proven
                if dtype is not self.x.dtype:
                    case.precision = "float64"
                if found.witness is not None:
                    (x, _, ball) = self._select([i])
                    self._falsify(i, ball.project(found.witness.to(x).unsqueeze(0), x)[0], method)
                # A witness that the model's own forward pass does not confirm is a doubt, too.
                if case.verdict is not None or not (found.doubtful or found.witness is not None):
                    break
            if case.verdict is None and bool(case.proven.all()):
                case.verdict = Verdict(
                    "certified",
                    float(case.best.min()),
                    method,
                    case.seconds,
                    precision=case.precision,
                    domains=case.domains,
                )

    def _problem(self, i: int, targets: Tensor, dtype: torch.dtype) -> Problem:
        case, (x, y, ball), network = self.cases[i], self._select([i]), self._network(dtype)
        assert network is not None
        spec = margin_spec(y, self.classes, dtype)[:, targets.to(x.device)]
        snapshot, region = network.with_spec(spec), Region.around(x.to(dtype), ball)
        deadline = self._deadline([i])
        boxes = case.boxes if dtype is x.dtype else None
        return Problem(snapshot, region, rounding_size(snapshot, region)[0], case.best[targets], boxes, deadline)

    def verdicts(self, method: str) -> list[Verdict]:
        """Verdicts in order; whoever is still open is unknown, by `method`."""
        return [
            case.verdict
            or Verdict(
                "unknown",
                float(case.best.min()),
                method,
                case.seconds,
                precision=case.precision,
                domains=case.domains,
            )
            for case in self.cases
        ]

    def _falsify(self, i: int, point: Tensor, method: str) -> None:
        case, (x, y, ball) = self.cases[i], self._select([i])
        # Among its batch a point may look misclassified by a rounding error; alone it must be.
        if refutes(self.model, point, x[0], y[0], ball):
            margin = float(case.best.min())
            case.verdict = falsified(
                self.model,
                point,
                x[0],
                y[0],
                ball,
                method=method,
                seconds=case.seconds,
                margin_lb=margin,
                domains=case.domains,
            )

    def _prove(self, index: list[int], bound: BoundMethod, arithmetic: Arithmetic) -> None:
        asked, deadline = ~torch.stack([self.cases[i].proven for i in index]), self._deadline(index)
        low, proven = self._margins(index, asked, bound, arithmetic, self.x.dtype, deadline)
        doubtful = asked & ~proven & (low > 0)
        # Dearer arithmetic only where it can decide: an example with a target far from proven stays open anyway.
        decisive = doubtful.any(1) & (proven | doubtful | ~asked).all(1)
        some = decisive.nonzero().flatten().tolist()
        if some and self.x.dtype is not torch.float64 and self._network(torch.float64) is not None:
            few = [index[p] for p in some]
            fine, sure = self._margins(few, doubtful[some], bound, arithmetic, torch.float64, deadline)
            low[some] = torch.where(doubtful[some], fine, low[some])
            proven[some] |= sure
            for place, needed in zip(some, sure.any(1).tolist(), strict=True):
                if needed:
                    self.cases[index[place]].precision = "float64"
        for place, i in enumerate(index):
            case = self.cases[i]
            # A proven target takes the bound that proved it: an earlier, greater one may owe its value to rounding.
            case.best = torch.where(proven[place], low[place], torch.maximum(case.best, low[place]))
            case.proven = case.proven | proven[place]

    def _margins(
        self,
        index: list[int],
        asked: Tensor,
        bound: BoundMethod,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
        deadline: float,
    ) -> tuple[Tensor, Tensor]:
        """(lower bounds, whether they prove their margin) of the margins asked for, `[B, K - 1]` on the CPU.

        Where nothing was asked or the bound is nan: -inf and False.
        """
        x, y, ball = self._select(index)
        network = self._network(dtype)
        assert network is not None
        targets, wanted = _padded(asked)
        spec = margin_spec(y, self.classes, dtype)
        rows = targets.to(x.device).unsqueeze(2).expand(-1, -1, self.classes)
        snapshot, region = network.with_spec(spec.gather(1, rows)), Region.around(x.to(dtype), ball)
        size, counts = arithmetic(snapshot, region), wanted.to(x.device)

        def enough(low: Tensor, scale: Tensor) -> bool:
            return time.perf_counter() >= deadline or bool((proves(low, scale, size) | ~counts).all())

        def keep(boxes: Boxes) -> None:
            if dtype is self.x.dtype:
                for place, i in enumerate(index):
                    self.cases[i].boxes = {
                        node: Box(box.lb[place : place + 1], box.ub[place : place + 1]) for node, box in boxes.items()
                    }

        low, scale = bound(snapshot, region, Request(counts, enough, deadline, keep))
        proven = (proves(low, scale, size) & counts).cpu()
        values = torch.where(low.isnan() | ~counts, -math.inf, low.double()).cpu()
        full = torch.full(asked.shape, -math.inf, dtype=torch.float64).scatter_reduce(1, targets, values, "amax")
        return full, torch.zeros_like(asked, dtype=torch.uint8).scatter_reduce(1, targets, proven.byte(), "amax").bool()

    def _deadline(self, index: list[int]) -> float:
        """Reading of time.perf_counter() at which the time of some examples, taken together, is up."""
        return time.perf_counter() + sum(self.timeout - self.cases[i].seconds for i in index)

    def _select(self, index: list[int]) -> tuple[Tensor, Tensor, Ball]:
        which, ball = torch.tensor(index, device=self.x.device), self.ball
        if isinstance(ball.eps, Tensor):
            ball = ball.select(which.to(ball.eps.device))
        return self.x[which], self.y[which], ball

    def _network(self, dtype: torch.dtype) -> Snapshot | None:
        """The network in the precision of `dtype`; None for a wider one that the model cannot be evaluated in."""
        if dtype not in self._networks:
            self._networks[dtype] = _captured(self.model, self.x, dtype)
        return self._networks[dtype]

    @contextmanager
    def _timed(self, index: list[int]) -> Iterator[None]:
        """Share the time that the context takes equally among the cases."""
        begin = time.perf_counter()
        yield
        seconds = (time.perf_counter() - begin) / len(index)
        for i in index:
            self.cases[i].seconds += seconds


class _TimeUp(Exception):
    """Raised out of an attack."""


@contextmanager
def _until(model: nn.Module, deadline: float) -> Iterator[None]:
    """Let the model's forward passes raise _TimeUp from the deadline on: attacks look at no clock."""

    def look(*_: object) -> None:
        if time.perf_counter() >= deadline:
            raise _TimeUp

    hook = model.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _captured(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Snapshot | None:
    if dtype is x.dtype:
        return capture(model, x[:1]).snapshot().without_gradient()
    # From widened parameters: what capture folds in float32 differs from the model by float32's rounding.
    try:
        return capture(copy.deepcopy(model).to(dtype), x[:1].to(dtype)).snapshot().without_gradient()
    except (CaptureError, RuntimeError):  # a forward that casts to float32 itself
        return None


def _chunks(index: list[int], size: int) -> Iterator[list[int]]:
    return (index[begin : begin + size] for begin in range(0, len(index), size))


def _padded(asked: Tensor) -> tuple[Tensor, Tensor]:
    """(columns, whether they count) `[B, R]`: the True columns of each row, padded with repetitions of the first."""
    count = int(asked.sum(1).max())
    columns = asked.byte().sort(dim=1, descending=True, stable=True).indices[:, :count]
    counts = asked.gather(1, columns)
    return torch.where(counts, columns, columns[:, :1]), counts
