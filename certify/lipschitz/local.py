"""`local_lipschitz`: how fast the outputs of a network can change within a ball, as a proof."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.bounds.bound import Bounds
from certify.graph import Graph, Snapshot
from certify.lipschitz import linear
from certify.lipschitz.branch_and_bound import branch_and_bound
from certify.lipschitz.enumeration import exact
from certify.lipschitz.problem import posed
from certify.lipschitz.search import Search
from certify.precision import exact_arithmetic


class LipschitzBound(NamedTuple):
    """Bounds of local Lipschitz constants in float64.

    Attributes:
        ub: proven, `[B, R]`: |c . f(x') - c . f(x'')| <= ub * ||x' - x''|| for all x', x'' of the ball, per row c.
        lb: attained, `[B, R]`: the row's derivative has this size somewhere in the ball.
        seconds: for the whole batch.
    """

    ub: Tensor
    lb: Tensor
    seconds: float


def local_lipschitz(
    model: nn.Module | Graph | Snapshot,
    x: Tensor,
    ball: Ball,
    method: str = "crown",
    spec: Tensor | None = None,
    *,
    norm: str | None = None,
    search: Search | None = None,
    **options: Any,
) -> LipschitzBound:
    """Local Lipschitz constants of the logits, or of rows of a spec, over the ball around each example.

    With distances of inputs measured in `norm`, the constant of a row is the greatest dual norm that the row's gradient
    has in the ball: the sum of |J_j| for linf, the Euclidean norm for l2, the greatest |J_j| for l1. The linf constant
    of the logits as a whole is the greatest of the rows'. Sound for the network as a function of real numbers with the
    weights that it has, up to float64's rounding of a sum of products, some 1e-12 of the bound.

    Args:
        model: a module (captured in evaluation mode), its Graph, or a Snapshot.
        x: examples `[B, *shape]` in the pixel range of the ball.
        ball: the inputs over which the constant holds.
        method: "interval": interval arithmetic. "recurjac": linear bounds with constant lines for what has no known
            sign. "crown": linear bounds. "bab": branch and bound, exact in the limit, valid at any time. "exact":
            enumeration of linear pieces, for small ReLU networks.
        spec: rows `[B, R, K]`, such as `margin_spec(y, K)`; the logits themselves where None.
        norm: "linf", "l2" or "l1"; the ball's own where None.
        search: how to look for the lower bound; `Search(samples=0)` for none.
        options: of the method: `states` ("interval", "crown" or "alpha_crown": bounds before the activations) and
            `iterations` (of "alpha_crown") for the first three, those of `branch_and_bound` and `enumerate_cells` for
            the others.

    Raises:
        ValueError: an unknown method, norm or option, or a combination that the method does not have.
        UnsupportedOp, CaptureError: a network without the rules.
    """
    begin = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"no method {method!r} for local Lipschitz constants; known: {', '.join(METHODS)}")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    for option in set(options) - set(known):
        raise ValueError(f"method {method!r} has no option {option!r}; options: {', '.join(known)}")
    problem = posed(model, x, ball, spec, norm, search or Search())
    with torch.no_grad(), exact_arithmetic():
        ub, lb = METHODS[method](problem, **options)
    # Bounds that meet but for rounding: the attained one gives way, so that nobody reads a contradiction.
    return LipschitzBound(ub, torch.minimum(lb, ub), time.perf_counter() - begin)


METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "interval": linear.interval,
    "recurjac": linear.recurjac,
    "crown": linear.crown,
    "bab": branch_and_bound,
    "exact": exact,
}
"""Methods: (problem, **options) -> (upper bounds, attained lower bounds), each `[B, R]`."""


def jacobian_bounds(
    model: nn.Module | Graph | Snapshot,
    x: Tensor,
    ball: Ball,
    method: linear.Propagation = "crown",
    spec: Tensor | None = None,
    **options: Any,
) -> Bounds:
    """Bounds of every entry of the Jacobian over the ball, each `[B, R, *shape]` in float64.

    Arguments and errors as in `local_lipschitz`; `method` is "interval", "recurjac" or "crown".
    """
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    for option in set(options) - set(known):
        raise ValueError(f"method {method!r} has no option {option!r}; options: {', '.join(known)}")
    problem = posed(model, x, ball, spec, None, Search())
    with torch.no_grad(), exact_arithmetic():
        return Bounds(*linear.entries(problem, method, **options))


def monotone_features(
    model: nn.Module | Graph | Snapshot,
    x: Tensor,
    ball: Ball,
    method: linear.Propagation = "crown",
    spec: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """+1 where an output provably does not decrease in a feature anywhere in the ball, -1 where it does not increase.

    0 where neither is proven; +1 where the output does not depend on the feature at all. `[B, R, *shape]`, int8.
    Arguments as in `jacobian_bounds`. To let some features vary only, give a box around x as `LinfBall` with the
    model's other inputs fixed. Source: Shi et al. 2022, section 4.3 (their monotonicity analysis).
    """
    bounds = jacobian_bounds(model, x, ball, method, spec, **options)
    return torch.where(bounds.lb >= 0, 1, torch.where(bounds.ub <= 0, -1, 0)).to(torch.int8)
