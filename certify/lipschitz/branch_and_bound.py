"""Branch and bound on local Lipschitz constants: ReLUs and inputs are split, empty cells are recognised.

A domain is a part of the region where some ReLUs have a sign, in a box of inputs that is cut to it. What a split says
is used at every step: the signs' half-spaces, linear in the input by CROWN, cut the box; bounds before the activations
and of gradients are computed again in it. A domain in which every sign is known is a cell with a constant
Jacobian: a linear program says whether it has an interior, and then its value is attained. So the method ends at the
exact constant of a ReLU network, unlike Shi et al. 2022, who count cells that are empty.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.bounds.crown import Boxes, Rows, backward, intermediate_boxes
from certify.bounds.jacobian import row_norms
from certify.graph import Snapshot
from certify.lipschitz.cells import THINNEST, HalfSpaces, deepest_points
from certify.lipschitz.linear import States, select, state_boxes
from certify.lipschitz.problem import Problem
from certify.lipschitz.search import proven_norms
from certify.op import Box
from certify.ops.relu import ReLU
from certify.region import Region

Signs = dict[int, Tensor]
"""+1, -1, or 0 where it is open, of the inputs of ReLUs, by place: int8 `[N, *shape]`."""


@dataclass(frozen=True)
class Domains:
    """N parts of regions.

    Attributes:
        owner: the row that each belongs to, `[N]` in 0 .. B * R - 1.
        ub: bound of its norm over the part, `[N]`.
        lo, hi: box of inputs `[N, *shape]`.
        boxes: of the inputs of nonlinear ops.
        signs: those that splits decided.
        score: how much a ReLU's sign may change the bound, by place `[N, *shape]`; not positive where it is known.
    """

    owner: Tensor
    ub: Tensor
    lo: Tensor
    hi: Tensor
    boxes: Boxes
    signs: Signs
    score: dict[int, Tensor]

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, index: Tensor) -> Domains:
        """Some of the domains, by number or by mask."""
        return Domains(
            self.owner[index],
            self.ub[index],
            self.lo[index],
            self.hi[index],
            select(self.boxes, index),
            {place: sign[index] for place, sign in self.signs.items()},
            {place: score[index] for place, score in self.score.items()},
        )

    @classmethod
    def join(cls, parts: Sequence[Domains]) -> Domains:
        """All domains of the parts."""
        first = parts[0]

        def cat(read: Callable[[Domains], Tensor]) -> Tensor:
            return torch.cat([read(part) for part in parts])

        return cls(
            cat(lambda d: d.owner),
            cat(lambda d: d.ub),
            cat(lambda d: d.lo),
            cat(lambda d: d.hi),
            {p: Box(cat(lambda d: d.boxes[p].lb), cat(lambda d: d.boxes[p].ub)) for p in first.boxes},  # noqa: B023
            {p: cat(lambda d: d.signs[p]) for p in first.signs},  # noqa: B023
            {p: cat(lambda d: d.score[p]) for p in first.score},  # noqa: B023
        )


@dataclass
class State:
    """Bounds of all rows `[B * R]` at some moment, and the domains that may still hold more than is attained."""

    problem: Problem
    rows: Tensor
    lb: Tensor
    closed: Tensor
    """Greatest bound of the domains that are done with."""
    open: Domains
    tolerance: float


def branch_and_bound(
    problem: Problem,
    states: States = "crown",
    *,
    iterations: int | None = None,
    timeout: float = 60.0,
    batch_size: int = 256,
    tolerance: float = 1e-7,
    split: str = "relu",
    on_bound: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """(upper, attained lower bounds) `[B, R]`, equal to within `tolerance` (relative) where the time sufficed.

    Args:
        states, iterations: bounds before the activations at the root, as for the linear methods.
        timeout: seconds for the whole batch, looked at between rounds.
        batch_size: domains that are split in a round, over all rows.
        split: "relu": signs first, inputs where no ReLU is left; "input": inputs only, for few of them.
        on_bound: called with both bounds `[B, R]` after every round; they are valid at any time.
    """
    if split not in ("relu", "input"):
        raise ValueError(f'split must be "relu" or "input", got {split!r}')
    deadline = time.perf_counter() + timeout
    search = _start(problem, state_boxes(problem, states, iterations), tolerance)
    shape = problem.rows.shape[:2]
    while True:
        _close(search)
        if on_bound is not None:
            on_bound(_upper(search).view(shape), search.lb.view(shape))
        if not len(search.open) or time.perf_counter() >= deadline:
            return _upper(search).view(shape), search.lb.view(shape)
        _round(search, batch_size, split)


def _start(problem: Problem, boxes: Boxes, tolerance: float) -> State:
    batch, count = problem.rows.shape[:2]
    rows = problem.rows.flatten(0, 1)
    example = torch.arange(batch, device=rows.device).repeat_interleave(count)
    region = problem.region.select(example)
    lo, hi = region.center - region.radius, region.center + region.radius
    signs = {
        node.inputs[0]: torch.zeros(len(rows), *node.shape, dtype=torch.int8, device=rows.device)
        for node in problem.snapshot.nodes
        if isinstance(node.op, ReLU)
    }
    domains = Domains(
        torch.arange(len(rows), device=rows.device),
        torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device),
        lo,
        hi,
        select(boxes, example),
        signs,
        {},
    )
    lb = problem.attained().flatten()
    search = State(problem, rows, lb, lb.clone(), domains, tolerance)
    search.open = _bounded(search, domains)
    return search


def _upper(search: State) -> Tensor:
    return search.closed.scatter_reduce(0, search.open.owner, search.open.ub, "amax")


def _close(search: State) -> None:
    """Take out the domains that cannot hold more than is attained; those of one cell that has an interior included."""
    domains = search.open
    finished = domains.ub <= search.lb[domains.owner] * (1 + search.tolerance)
    search.closed.scatter_reduce_(0, domains.owner[finished], domains.ub[finished], "amax")
    search.open = domains.select(~finished)


def _round(search: State, batch_size: int, split: str) -> None:
    """Split the domains with the greatest bounds, of each row equally many."""
    domains = search.open
    chosen = torch.zeros(len(domains), dtype=torch.bool, device=domains.ub.device)
    chosen[_ranks(domains).topk(min(batch_size, len(domains)), largest=False).indices] = True
    some, rest = domains.select(chosen), domains.select(~chosen)
    best = _best_relu(some) if split == "relu" else None
    by_sign = torch.zeros(len(some), dtype=torch.bool, device=domains.ub.device) if best is None else best.score > 0
    parts = []
    if best is not None and bool(by_sign.any()):
        parts += _split_signs(some.select(by_sign), best.index[by_sign])
    if not bool(by_sign.all()):
        parts += _split_inputs(some.select(~by_sign))
    children = _bounded(search, _nonempty(search, _tightened(search.problem, Domains.join(parts))))
    search.open = Domains.join([rest, _without_cells(search, children)])


def _ranks(domains: Domains) -> Tensor:
    """Place of each domain among those of its row, from the greatest bound on: `[N]`."""
    order = domains.ub.argsort(descending=True)
    order = order[domains.owner[order].argsort(stable=True)]
    owner = domains.owner[order]
    place = torch.arange(len(order), device=owner.device)
    first = torch.where(owner.diff(prepend=owner[:1] - 1) != 0, place, 0).cummax(0).values
    return torch.empty_like(place).scatter(0, order, place - first)


@dataclass(frozen=True)
class _Best:
    """The greatest score `[N]` and its neuron's number `[N]` among all places, one after the other."""

    score: Tensor
    index: Tensor


def _best_relu(domains: Domains) -> _Best | None:
    if not domains.score:
        return None
    scores = torch.cat([domains.score[place].flatten(1) for place in sorted(domains.score)], 1)
    return _Best(*scores.max(1))


def _split_signs(domains: Domains, index: Tensor) -> list[Domains]:
    """Both halves of each domain, for the sign of one neuron of each."""
    halves = []
    for sign in (1, -1):
        boxes, signs = dict(domains.boxes), dict(domains.signs)
        begin = 0
        for place in sorted(domains.score):
            box, known = boxes[place], signs[place].clone()
            size = known[0].numel()
            here = (index >= begin) & (index < begin + size)
            which = here.nonzero().flatten()
            known.flatten(1)[which, index[which] - begin] = sign
            signs[place] = known
            decided = known == sign
            boxes[place] = (
                Box(torch.where(decided, box.lb.clamp(min=0), box.lb), box.ub)
                if sign == 1
                else Box(box.lb, torch.where(decided, box.ub.clamp(max=0), box.ub))
            )
            begin += size
        halves.append(replace(domains, boxes=boxes, signs=signs))
    return halves


def _split_inputs(domains: Domains) -> list[Domains]:
    """Both halves of each domain's box, across its longest side."""
    lo, hi = domains.lo.flatten(1), domains.hi.flatten(1)
    longest = (hi - lo).argmax(1, keepdim=True)
    middle = ((lo + hi) / 2).gather(1, longest)
    below = replace(domains, hi=hi.scatter(1, longest, middle).view_as(domains.hi))
    above = replace(domains, lo=lo.scatter(1, longest, middle).view_as(domains.lo))
    return [below, above]


def _region(problem: Problem, domains: Domains) -> Region:
    region = problem.region
    whole = region.select(problem.examples(domains.owner))
    center = (domains.lo + domains.hi) / 2
    radius = torch.maximum(domains.hi - center, center - domains.lo)
    return Region(center, radius, center if whole.ball is None else whole.x, whole.ball)


def _tightened(problem: Problem, domains: Domains) -> Domains:
    """The domains that are not seen to be empty, with boxes that are cut by the half-spaces of their signs."""
    lo, hi, empty = _clipped(_half_spaces(problem, domains), domains)
    domains = replace(domains, lo=lo, hi=hi).select(~empty)
    boxes = intermediate_boxes(problem.network(domains.owner), _region(problem, domains), domains.boxes)
    empty = torch.zeros(len(domains), dtype=torch.bool, device=lo.device)
    for place, box in boxes.items():
        slack = THINNEST * (box.ub - box.lb).abs().flatten(1).amax(1)
        empty |= ((box.lb - box.ub).flatten(1) > slack.unsqueeze(1)).any(1)
        boxes[place] = Box(box.lb, torch.maximum(box.lb, box.ub))
    return replace(domains, boxes=boxes).select(~empty)


def _half_spaces(problem: Problem, domains: Domains) -> HalfSpaces:
    """What the signs say about the input: for a sign s, CROWN's line below -s z is at most 0."""
    snapshot, found = problem.network(domains.owner), []
    for place, sign in domains.signs.items():
        if bool(sign.any()):
            rows = Rows.of(sign != 0)
            signs = sign.flatten(1).gather(1, rows.index.T).T.to(domains.lo.dtype)
            A = torch.zeros(len(rows), *sign.flatten(1).shape, dtype=domains.lo.dtype, device=sign.device)
            A.scatter_(2, rows.index.unsqueeze(2), -signs.unsqueeze(2))
            linear = backward(snapshot, place, A.view(len(rows), *sign.shape), domains.boxes)
            found.append(HalfSpaces(linear.A.flatten(2), linear.constant, rows.keep))
    if not found:
        size = domains.lo.flatten(1).shape
        nothing = domains.lo.new_zeros(0, size[0])
        return HalfSpaces(domains.lo.new_zeros(0, *size), nothing, nothing.bool())
    return HalfSpaces(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _clipped(half_spaces: HalfSpaces, domains: Domains) -> tuple[Tensor, Tensor, Tensor]:
    """(lo, hi, whether a half-space misses the box); each bounds each coordinate, the others being at their best."""
    lo, hi = domains.lo.flatten(1), domains.hi.flatten(1)
    A, c, keep = half_spaces
    empty = torch.zeros(len(lo), dtype=torch.bool, device=lo.device)
    if not len(A):
        return domains.lo, domains.hi, empty
    for _ in range(2):
        least = torch.minimum(A * lo, A * hi)
        total = least.sum(2) + c
        size = (A.abs() * (hi - lo)).sum(2)
        empty |= (keep & (total > THINNEST * size)).any(0)
        # A_j x_j <= -(total - least_j), rounded outward.
        room = (least - total.unsqueeze(2)) + THINNEST * size.unsqueeze(2)
        limit = room / torch.where(A == 0, 1.0, A)
        usable = keep.unsqueeze(2) & (A != 0)
        hi = torch.minimum(hi, torch.where(usable & (A > 0), limit, torch.inf).amin(0))
        lo = torch.maximum(lo, torch.where(usable & (A < 0), limit, -torch.inf).amax(0))
        crossed = lo > hi
        lo, hi = torch.where(crossed, (lo + hi) / 2, lo), torch.where(crossed, (lo + hi) / 2, hi)
    return lo.view_as(domains.lo), hi.view_as(domains.hi), empty


def _bounded(search: State, domains: Domains) -> Domains:
    """The domains with their bounds and scores."""
    problem, rows = search.problem, search.rows[domains.owner]
    found = row_norms(problem.network(domains.owner), _strict(domains), rows, problem.norm, "crown")
    score = _scores(problem.snapshot, domains.signs, found.slack)
    return replace(domains, ub=torch.minimum(domains.ub, found.ub), score=score)


def _strict(domains: Domains) -> Boxes:
    """The boxes with ends at zero moved off it, so that they count as signs.

    Where z >= 0 on a domain, almost everywhere z > 0 or dz = 0: then any slope gives the same derivative.
    """
    tiny = torch.finfo(domains.ub.dtype).tiny
    boxes = dict(domains.boxes)
    for place, sign in domains.signs.items():
        lb, ub = boxes[place].lb, boxes[place].ub
        positive = (sign == 1) | ((lb >= 0) & (ub > 0))
        negative = (sign == -1) | ((ub <= 0) & (lb < 0))
        lb = torch.where(positive, lb.clamp(min=tiny), torch.where(negative, lb.clamp(max=-tiny), lb))
        ub = torch.where(positive, ub.clamp(min=tiny), torch.where(negative, ub.clamp(max=-tiny), ub))
        boxes[place] = Box(lb, ub)
    return boxes


def _scores(snapshot: Snapshot, signs: Signs, slack: dict[int, Tensor]) -> dict[int, Tensor]:
    """What deciding each open sign may gain, by the place of the ReLUs' input."""
    scores = {place: torch.zeros(sign.shape, dtype=torch.float64, device=sign.device) for place, sign in signs.items()}
    for place, node in enumerate(snapshot.nodes):
        if isinstance(node.op, ReLU):
            before = node.inputs[0]
            gain = slack.get(place, torch.zeros_like(scores[before]))
            scores[before] = torch.where(signs[before] == 0, scores[before] + gain, 0.0)
    return scores


def _nonempty(search: State, domains: Domains) -> Domains:
    """The domains without those whose half-spaces leave no interior; what is attained deepest in the others counts."""
    problem = search.problem
    half_spaces = _half_spaces(problem, domains)
    depth, point = deepest_points(half_spaces, domains.lo.flatten(1), domains.hi.flatten(1))
    domains, point = domains.select(depth > THINNEST), point[depth > THINNEST].view(-1, *domains.lo.shape[1:])
    example = problem.examples(domains.owner)
    # The box is rounded outward and may reach beyond an l2 or l1 ball; what holds at a point of the ball counts.
    point = problem.ball.select(example).project(point, problem.x[example])
    value = proven_norms(problem.snapshot.select(example), point, search.rows[domains.owner], problem.norm)
    search.lb.scatter_reduce_(0, domains.owner, value, "amax")
    return domains


def _without_cells(search: State, domains: Domains) -> Domains:
    """The domains without the cells of a constant Jacobian: they have an interior, so that their bound is attained."""
    if any(not node.op.is_linear and not isinstance(node.op, ReLU) for node in search.problem.snapshot.nodes[1:]):
        return domains
    scores = torch.cat([score.flatten(1) for score in domains.score.values()], 1)
    cells = ~(scores > 0).any(1)
    search.closed.scatter_reduce_(0, domains.owner[cells], domains.ub[cells], "amax")
    return domains.select(~cells)
