"""Branch and bound for one property of one example: plain where it is quick, with tightened boxes where it is not.

Plain branch and bound splits neurons and bounds many children in one pass, on boxes inherited from the root. It is
quick where some hundred splits suffice. Elsewhere the number of splits grows exponentially, while tightening the boxes
of a domain on its possible counterexamples (`certify.bab.tighten`) closes most of the gap for the price of some hundred
children. So every node is first given to plain search with a budget worth two tightenings; if that does not finish, its
boxes are tightened, and it is split into two nodes, which inherit the tighter boxes.

A node with few unstable neurons is finished by linear programs (`certify.bab.triangle`) instead: they take as long as
some children of plain search, reach the bound that ascent converges to, and see that a domain is empty.

Open domains never exceed the budget of one plain search plus the depth of the tree plus one tree of linear programs.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from certify.bab.branching import Branching
from certify.bab.domains import Domains, bounded
from certify.bab.dual import Dual
from certify.bab.tighten import Memory, loose_neurons, tighten
from certify.bab.triangle import Triangle
from certify.bab.unstable_core import Affine, Core
from certify.precision import ALLOWANCES


@dataclass(frozen=True)
class Plan:
    """Hyper-parameters of a search.

    Attributes:
        branching: which neuron to split in plain search; node_branching: in a node of the tree, where a good choice
            may cost more.
        iterations: ascent steps per child in plain search; node_iterations: per node.
        tighten_iterations: ascent steps per neuron whose box is tightened, twice as many the first time; 0 leaves
            tightening out.
        rounds: most tightenings of one node.
        batch: children bounded in one pass.
    """

    branching: Branching
    node_branching: Branching
    iterations: int = 2
    node_iterations: int = 20
    tighten_iterations: int = 5
    rounds: int = 4
    batch: int = 128


@dataclass(frozen=True)
class Node:
    """A domain of the tree (one column).

    Attributes:
        memory: what tightening its boxes starts from.
        gain: share of the gap to zero that the last tightening above it closed.
    """

    domain: Domains
    memory: Memory
    gain: float = 1.0

    @property
    def patience(self) -> float:
        """By how much to prolong a search that would do without another tightening."""
        return min(max(FAIR_GAIN / max(self.gain, 1e-3), 1.0), PATIENCE)


@dataclass
class Result:
    """Outcome of a search.

    Attributes:
        low: a lower bound of the property on the whole region, -inf where a witness ended the search.
        domains: how many domains were bounded.
        witness: a `u` `[M, 1]` at which the core's property is <= 0, if one was met.
        doubtful: whether rounding alone kept a domain from being decided; that ends a search in float32.
    """

    low: float
    proven: bool = False
    domains: int = 0
    witness: Tensor | None = None
    doubtful: bool = False


PROGRAM_SIZE = 2**15
"""Most entries, neurons times variables, of a linear program that a node is given: such a one takes some 30 ms."""

PROGRAMS = 100
"""Linear programs that the first node may take; twice as many after every node that they did not finish."""

SPARE = 2.0**-10
"""Share of the rounding allowance by which a proof exceeds it: boxes that are empty prove no margin of their own."""

LEAF_ITERATIONS = 200
"""Ascent steps in a domain without unstable neurons where a linear program does not have the exact answer."""

UNEVEN = 2.0
"""Size of an uneven tree over that of the even one with the same average progress."""

FAIR_GAIN, PATIENCE = 0.2, 8.0
"""A tightening that closes less than this share of the gap makes plain search more patient, at most so many times."""


class Search:
    """One run of branch and bound."""

    def __init__(self, core: Core, output: Affine, size: float, plan: Plan, deadline: float) -> None:
        """
        Args:
            output: the property, to be shown positive.
            size: rounding size of the property (`certify.precision`).
            deadline: value of time.perf_counter() at which to give up.
        """
        self.core, self.plan, self.deadline = core, plan, deadline
        # A counterexample has output <= size * of_size in this arithmetic. All bounds are of output - threshold, and
        # lowered by what rounding can do to them (`certify.bab.dual`): a positive one proves its domain, and that the
        # network's own output is at least `spare` there.
        self.spare = size * ALLOWANCES[output.x.dtype][1] * SPARE
        self.threshold = self.spare * (1 / SPARE + 1)
        self.output = replace(output, constant=output.constant - self.threshold)
        self.result = Result(-math.inf)
        self.closed = math.inf
        """Least bound of the leaves so far."""
        self.seen = math.inf
        """Least value of the property at any point tried."""
        self.fine = output.x.dtype is torch.float64
        self.tightened = False
        self.order = itertools.count()
        self.programs = PROGRAMS
        self.stuck = False
        """Whether a domain was given up that no split helps to decide."""

    def run(self) -> Result:
        """Search until the property is proven, refuted, or the time is up."""
        stack = [Node(self.root(), {})]
        while stack and not self.over():
            node = stack.pop()
            if self.done(node.domain) or self.plain(node):
                continue
            if self.over():
                stack.append(node)
            elif self.few(node.domain) and not self.fine:
                # Linear programs are solved in float64 anyway: on a core of that precision they decide more.
                self.result.doubtful = True
                stack.append(node)
            elif self.few(node.domain) and self.linear(node):
                continue
            elif self.over():
                stack.append(node)
            elif (tighter := self.tighten(node)) is not None:
                stack += [tighter] if self.over() else self.split(tighter)
        result = self.result
        result.proven = not (stack or self.stuck or result.doubtful or result.witness is not None)
        if result.proven and self.seen <= 0:
            # The domains say that no point comes this low, and one did: rounding, in one of the two.
            result.proven, result.doubtful = False, True
        low = min([self.closed, *(float(node.domain.low) for node in stack)])
        # Boxes on possible counterexamples say nothing about points with output > 0.
        result.low = min(0.0 if self.tightened else math.inf, low, self.seen) + self.spare
        if result.witness is not None:
            result.low = -math.inf  # what plain search had open is not in the stack
        return result

    def split(self, node: Node) -> list[Node]:
        """The two children of a node; none where no neuron is left to split."""
        split = self.plan.node_branching(self.core, node.domain, self.output)
        if int(split.neurons) < 0:
            self.leaf(node.domain)
            return []
        children = self.bound(node.domain.halves(split.neurons), self.plan.node_iterations, split.dual)
        return [replace(node, domain=child) for child in (children[:1], children[1:])]

    def late(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self.deadline

    def over(self) -> bool:
        """Whether to end: refuted, out of time, or in need of a finer precision."""
        return self.result.witness is not None or self.late() or (self.result.doubtful and not self.fine)

    def root(self) -> Domains:
        core = self.core
        count = len(core)
        zeros = core.lb.new_zeros((count, 1))
        none = core.lb.new_full((1,), -math.inf)
        whole = Domains(
            core.lb.clone(), core.ub.clone(), zeros, none, zeros, zeros.clone(), zeros.clone(), zeros.clone()
        )
        start = Domains(**{**vars(whole), "alpha": whole.relaxation(core).default()})
        return self.bound(start, self.plan.node_iterations)

    def bound(self, domains: Domains, iterations: int, first: Dual | None = None) -> Domains:
        """Raise the bounds, `first` where they are known; the minimisers are tried as counterexamples."""
        self.result.domains += len(domains)
        raised, found = bounded(self.core, domains, self.output, iterations, 0.0, first)
        if found.u is not None:
            self.try_points(found.u, found.fed)
        return raised

    def try_points(self, u: Tensor, fed: Tensor | None = None) -> None:
        """Take the worst of the points `[M, D]` for a witness, if the property does not hold there."""
        inside = self.core.inside(u)
        exact = self.output(inside, self.core.evaluate(inside, fed if inside is u else None))
        worst = int(exact.argmin())
        self.seen = min(self.seen, float(exact[worst]))
        if float(exact[worst]) <= -self.threshold:
            self.result.witness = inside[:, worst : worst + 1]

    @staticmethod
    def proven(domains: Domains) -> Tensor:
        """Which domains hold no counterexample, bool `[D]`."""
        return torch.isfinite(domains.low) & (domains.low > 0)

    def close(self, low: Tensor) -> None:
        if len(low):
            self.closed = min(self.closed, float(low.min()))

    def done(self, node: Domains) -> bool:
        if bool(self.proven(node)):
            self.close(node.low)
            return True
        return False

    def plain(self, start: Node) -> bool:
        """Whether plain branch and bound closes the node within its budget."""
        plan, core, node = self.plan, self.core, start.domain
        budget = math.inf
        if plan.tighten_iterations:
            # Worth two tightenings, or more where the last one gained little.
            rows = 2 * int(loose_neurons(core, node).sum())
            worth = 2 * rows * plan.tighten_iterations / (plan.iterations + 3)
            budget = max(worth, 2 * plan.batch) * start.patience
        stack, spent, closed = [node], 0, math.inf
        while stack:
            if self.over() or self.hopeless(start.domain, stack, spent, budget):
                return False
            domains = stack.pop()
            while stack and len(domains) + len(stack[-1]) <= plan.batch // 2:
                domains = Domains.join([domains, stack.pop()])
            if len(domains) > plan.batch // 2:
                order = domains.low.argsort(descending=True)
                stack.append(domains[order[plan.batch // 2 :]])
                domains = domains[order[: plan.batch // 2]]
            split = plan.branching(core, domains, self.output)
            for leaf in (split.neurons < 0).nonzero().flatten():
                self.leaf(domains[leaf : leaf + 1])
            rest = (split.neurons >= 0).nonzero().flatten()
            if not len(rest):
                continue
            children = self.bound(domains[rest].halves(split.neurons[rest]), plan.iterations, split.dual)
            if self.result.witness is not None:
                return True
            spent += len(children)
            proven = self.proven(children)
            if proven.any():
                closed = min(closed, float(children.low[proven].min()))
            open_ = (~proven).nonzero().flatten()
            if len(open_):
                stack.append(children[open_])
        self.closed = min(self.closed, closed)
        return True

    def hopeless(self, start: Domains, stack: list[Domains], spent: int, budget: float) -> bool:
        """Whether a search that has bounded `spent` children will not end near its budget.

        A domain whose d splits raised its bound from l to l' < 0 is taken to need d l' / (l - l') more, in both halves.
        """
        if spent < min(self.plan.batch, budget):
            return False
        low = torch.cat([domains.low for domains in stack])
        splits = torch.cat([domains.sign.abs().sum(0) for domains in stack]) - start.sign.abs().sum()
        needed = splits * low / (start.low - low).clamp(max=-1e-12)
        return spent + float((UNEVEN * 2.0 ** (needed + 1)).sum()) > budget

    def tighten(self, node: Node) -> Node | None:
        """The node with tighter boxes; None if it holds no counterexample."""
        for _ in range(self.plan.rounds if self.plan.tighten_iterations else 0):
            tighter = self.tightened_once(node)
            if tighter is None or self.late():
                return tighter
            node = tighter
            if node.gain < FAIR_GAIN:
                break
        return node

    def tightened_once(self, node: Node) -> Node | None:
        plan, domain = self.plan, node.domain
        self.tightened = True
        iterations = plan.tighten_iterations * (1 if node.memory else 2)
        found = tighten(self.core, domain, self.output, iterations, node.memory, self.late)
        if found is None:
            self.close(domain.low.new_zeros(1))
            return None
        tighter = self.bound(replace(domain, lb=found.lb, ub=found.ub), plan.node_iterations)
        gain = float((tighter.low - domain.low) / domain.low.abs().clamp(min=1e-12))
        return None if self.done(tighter) else Node(tighter, found.memory, gain)

    def leaf(self, node: Domains) -> None:
        """Decide a domain that has nothing to split."""
        if self.is_linear:
            left: list[Linear] = []
            self.program(left, float(node.low), 1.0, *_ends(node))
            self.stuck |= bool(left)
            return
        # No linear program is exact in a ball or with smooth activations.
        deep = self.bound(node, LEAF_ITERATIONS)
        self.close(deep.low)
        self.stuck |= not bool(self.proven(deep))

    @cached_property
    def is_linear(self) -> bool:
        """Whether a linear program decides a domain without unstable neurons."""
        core = self.core
        finite = all(bool(torch.isfinite(t).all()) for t in (core.lb, core.ub, core.slack, self.output.constant))
        return finite and bool(core.splittable.all()) and core.region.ball is None

    @cached_property
    def triangle(self) -> Triangle:
        return Triangle(self.core, self.output)

    def few(self, node: Domains) -> bool:
        """Whether the linear programs of the node are small."""
        variables = self.core.input_weight.shape[1] + int(((node.lb < 0) & (node.ub > 0)).sum())
        return self.is_linear and len(self.core) * variables <= PROGRAM_SIZE

    def linear(self, node: Node) -> bool:
        """Whether branch and bound with linear programs, least bound first, closes the node within its budget."""
        heap: list[Linear] = []
        budget = self.programs if self.plan.tighten_iterations else math.inf
        self.program(heap, float(node.domain.low), 1.0, *_ends(node.domain))
        for spent in itertools.count(1, 2):
            if not heap:
                return True
            # As in plain search: what is open stands for its share of the tree.
            if self.over() or (spent > budget / 8 and spent > budget * (1 - sum(part[2] for part in heap))):
                self.programs *= 2
                return False
            low, _, share, lb, ub, neuron = heapq.heappop(heap)
            for end in (lb, ub):
                half = end.copy()
                half[neuron] = 0.0
                self.program(heap, low, share / 2, *((half, ub) if end is lb else (lb, half)))
        raise AssertionError

    def program(self, heap: list[Linear], above: float, share: float, lb: np.ndarray, ub: np.ndarray) -> None:
        """Solve a domain's linear program; what it leaves open goes to the heap, or is a doubt.

        Args:
            above: bound of the domain's parent.
            share: of the tree that the domain stands for.
        """
        self.result.domains += 1
        found = self.triangle.minimum(lb, ub, self.deadline - time.perf_counter())
        if found.u is not None:
            self.try_points(found.u)
        low = max(above, found.low)
        if found.low > 0:
            self.closed = min(self.closed, found.low)
        elif found.neuron < 0:
            self.close(self.output.x.new_tensor([low]))
            self.result.doubtful = True
        else:
            # What only the slack keeps open is for a finer precision to decide: splits take away none of it.
            self.result.doubtful |= found.exact > 0 and not self.fine
            heapq.heappush(heap, (low, next(self.order), share, lb, ub, found.neuron))


Linear = tuple[float, int, float, np.ndarray, np.ndarray, int]
"""An open domain of linear programs: bound, running number, share of the tree, lb and ub `[N]`, neuron to split."""


def _ends(node: Domains) -> tuple[np.ndarray, np.ndarray]:
    lb, ub = (end[:, 0].double().cpu().numpy() for end in (node.lb, node.ub))
    return lb, ub
