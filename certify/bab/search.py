"""Branch and bound for one property of one example: plain where it is quick, with tightened boxes where it is not.

Plain branch and bound splits neurons and bounds many children in one pass, on boxes inherited from the root. It is
quick where some hundred splits suffice. Elsewhere the number of splits grows exponentially, while tightening the boxes
of a domain on its possible counterexamples (`certify.bab.tighten`) closes most of the gap for the price of some hundred
children. So every node is first given to plain search with a budget worth one tightening; if that does not finish, its
boxes are tightened, and it is split into two nodes, which inherit the tighter boxes.

Open domains never exceed the budget of one plain search plus the depth of the tree: memory stays bounded.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.bab.branching import Branching
from certify.bab.domains import Domains, bounded
from certify.bab.leaf import solve_leaf
from certify.bab.tighten import Memory, loose_neurons, tighten
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


@dataclass
class Result:
    """Outcome of a search.

    Attributes:
        low: a lower bound of the property on the whole region, -inf where a witness ended the search.
        domains: how many domains were bounded.
        witness: a `u` `[M, 1]` at which the core's property is <= 0, if one was met.
        doubtful: whether rounding alone kept a domain from being decided.
    """

    low: float
    proven: bool = False
    domains: int = 0
    witness: Tensor | None = None
    doubtful: bool = False


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
        self.of_scale, of_size = ALLOWANCES[output.x.dtype]
        # A counterexample has output <= threshold: tightened boxes prove output > threshold, no more.
        self.threshold = size * of_size
        self.output = replace(output, constant=output.constant - self.threshold)
        self.result = Result(-math.inf)
        self.closed = math.inf
        """Least bound of the leaves so far."""
        self.seen = math.inf
        """Least value of the property at any point tried."""
        self.tightened = False

    def run(self) -> Result:
        """Search until the property is proven, refuted, or the time is up."""
        stack = [Node(self.root(), {})]
        while stack and self.result.witness is None and not self.late():
            node = stack.pop()
            if self.done(node.domain) or self.plain(node):
                continue
            tighter = node if self.late() else self.tighten(node)
            if tighter is not None:
                stack += [tighter] if self.late() else self.split(tighter)
        result = self.result
        result.proven = not stack and result.witness is None and not result.doubtful
        low = min([self.closed, *(float(node.domain.low) for node in stack)])
        # Boxes on possible counterexamples say nothing about points with output > 0.
        result.low = min(0.0 if self.tightened else math.inf, low, self.seen) + self.threshold
        if result.witness is not None:
            result.low = -math.inf  # what plain search had open is not in the stack
        return result

    def split(self, node: Node) -> list[Node]:
        """The two children of a node; none where no neuron is left to split."""
        neuron = self.plan.node_branching(self.core, node.domain, self.output)
        if int(neuron) < 0:
            self.leaf(node.domain)
            return []
        children = self.bound(node.domain.halves(neuron), self.plan.node_iterations)
        return [replace(node, domain=child) for child in (children[:1], children[1:])]

    def late(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self.deadline

    def root(self) -> Domains:
        core = self.core
        count = len(core)
        zeros = core.lb.new_zeros((count, 1))
        none = core.lb.new_full((1,), -math.inf)
        whole = Domains(
            core.lb.clone(), core.ub.clone(), zeros, none, none, zeros, zeros.clone(), zeros.clone(), zeros.clone()
        )
        start = Domains(**{**vars(whole), "alpha": whole.relaxation(core).default()})
        return self.bound(start, self.plan.node_iterations)

    def bound(self, domains: Domains, iterations: int) -> Domains:
        """Raise the bounds; the minimisers are tried as counterexamples."""
        self.result.domains += len(domains)
        raised, found = bounded(self.core, domains, self.output, iterations, self.enough(domains))
        self.try_points(found.u)
        return raised

    def try_points(self, u: Tensor) -> None:
        """Take the worst of the points `[M, D]` for a witness, if the property does not hold there."""
        u = self.core.inside(u)
        exact = self.output(u, self.core.evaluate(u))
        worst = int(exact.argmin())
        self.seen = min(self.seen, float(exact[worst]))
        if float(exact[worst]) <= -self.threshold:
            self.result.witness = u[:, worst : worst + 1]

    def enough(self, domains: Domains) -> float:
        """A bound that proves any of the domains."""
        scale = float(domains.scale.max())
        return max(scale, 0.0) * self.of_scale if math.isfinite(scale) else math.inf

    def proven(self, domains: Domains) -> Tensor:
        """Which domains hold no counterexample, bool `[D]`."""
        return torch.isfinite(domains.low) & (domains.low > domains.scale * self.of_scale)

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
            # Worth one tightening, or more where the last one gained little.
            rows = 2 * int(loose_neurons(core, node).sum())
            worth = rows * plan.tighten_iterations / (plan.iterations + 3)
            budget = max(worth, 2 * plan.batch) * min(max(FAIR_GAIN / max(start.gain, 1e-3), 1.0), PATIENCE)
        stack, spent, closed = [node], 0, math.inf
        before = float(node.sign.abs().sum())
        while stack:
            if self.late() or self.hopeless(stack, before, spent, budget):
                return False
            domains = stack.pop()
            while stack and len(domains) + len(stack[-1]) <= plan.batch // 2:
                domains = Domains.join([domains, stack.pop()])
            if len(domains) > plan.batch // 2:
                order = domains.low.argsort(descending=True)
                stack.append(domains[order[plan.batch // 2 :]])
                domains = domains[order[: plan.batch // 2]]
            neurons = plan.branching(core, domains, self.output)
            for leaf in (neurons < 0).nonzero().flatten():
                self.leaf(domains[leaf : leaf + 1])
            rest = neurons >= 0
            domains, neurons = domains[rest.nonzero().flatten()], neurons[rest]
            if not len(domains):
                continue
            children = self.bound(domains.halves(neurons), plan.iterations)
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

    @staticmethod
    def hopeless(stack: list[Domains], before: float, spent: int, budget: float) -> bool:
        """Whether a search that has bounded `spent` children will not end near its budget.

        A domain d splits below the node stands for 2^-d of the tree (Knuth 1975); what is not open is done.
        """
        if spent < budget / 8:
            return False
        done = 1 - sum(float((2.0 ** (before - domains.sign.abs().sum(0))).sum()) for domains in stack)
        return spent > budget * done

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
        found = tighten(self.core, domain, self.output, iterations, self.of_scale, node.memory, self.late)
        if found is None:
            self.close(domain.low.new_zeros(1))
            return None
        tighter = self.bound(replace(domain, lb=found.lb, ub=found.ub), plan.node_iterations)
        gain = float((tighter.low - domain.low) / domain.low.abs().clamp(min=1e-12))
        return None if self.done(tighter) else Node(tighter, found.memory, gain)

    def leaf(self, node: Domains) -> None:
        """Decide a domain without unstable neurons by a linear program."""
        if not bool(self.core.splittable.all()):
            self.result.doubtful = True  # the relaxation of a smooth activation has no exact leaf
            self.close(node.low)
            return
        low, u = solve_leaf(self.core, node, self.output)
        if u is not None:
            self.try_points(u)
        if self.result.witness is None:
            self.closed = min(self.closed, low)
            if not low > float(node.scale) * self.of_scale:
                self.result.doubtful = True
