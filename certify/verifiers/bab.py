"""Branch and bound with beta-CROWN as a verifier."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.registry import method_field
from attacks.threat import Ball
from certify.bab.branching import BRANCHINGS, Branching
from certify.bab.input_split import free_inputs, split_inputs
from certify.bab.max_pool import without_max_pool
from certify.bab.search import Plan, Search
from certify.bab.unstable_core import core_of
from certify.bounds.crown import crown, intermediate_boxes
from certify.branching.kfsb import KFSB
from certify.docket import NORMS, Docket, Finding, Problem
from certify.precision import ALLOWANCES
from certify.verdict import Verdict
from certify.verifier import VERIFIERS, check_fields


@VERIFIERS.register("bab")
@dataclass(frozen=True)
class BranchAndBound:
    """beta-CROWN with branch and bound, and with boxes tightened on possible counterexamples.

    Needs: a network whose nonlinear ops are elementwise activations or MaxPool2d. Returns: certified or unknown, or
    falsified where a minimiser of a bound turns out to be a counterexample, for correctly classified examples.
    How: CROWN bounds the hidden neurons once; then the network shrinks to its unstable neurons
    (`certify.bab.unstable_core`), and every target is searched for itself (`certify.bab.search`). Where few neurons are
    unstable, linear programs finish. With few inputs, the input is split first (`certify.bab.input_split`).
    Sound; complete for (leaky) ReLU and max-pooling networks and l_inf balls, given time.
    Source: Wang et al. (2021); tightening after Kotha et al. (2023); branching after De Palma et al. (2021).

    Args:
        timeout: seconds per example.
        branching: neuron to split in plain search; node_branching: in the nodes of the tree, which are few and dear.
        iterations: ascent steps per child in plain search; node_iterations: per node.
        tighten_iterations: ascent steps per neuron whose box is tightened; 0 for plain branch and bound.
        batch: children bounded in one pass; a GPU wants thousands.
        inputs: most inputs of a network whose input is split; 0 to split neurons alone.
    """

    timeout: float = 60.0
    branching: Branching = method_field(BRANCHINGS, KFSB())
    node_branching: Branching = method_field(BRANCHINGS, KFSB(candidates=8, iterations=2))
    iterations: int = 2
    node_iterations: int = 20
    tighten_iterations: int = 5
    batch: int = 128
    inputs: int = 8

    sound: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    falsifies: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = NORMS
    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if (
            self.timeout <= 0
            or min(self.iterations, self.node_iterations, self.tighten_iterations, self.inputs) < 0
            or self.batch < 2
        ):
            raise ValueError(f"expected timeout > 0, iterations and inputs >= 0 and batch >= 2, got {self}")

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        docket = Docket(model, x, y, ball, index, self.timeout)
        docket.decide("bab", self.decide)
        return docket.verdicts("bab")

    def decide(self, problem: Problem) -> Finding:
        """Search for a proof of every row, the most doubtful first."""
        region, tried = problem.region, 0
        if 0 < free_inputs(region) <= self.inputs:
            # Half of the time is left to the neurons.
            until = (time.perf_counter() + problem.deadline) / 2
            found = split_inputs(problem.snapshot, region, problem.size, until)
            if found.proven or found.witness is not None:
                proven = torch.full((len(problem.size),), found.proven)
                return Finding(found.low, proven, found.witness, found.domains, False)
            tried = found.domains
        snapshot = without_max_pool(problem.snapshot, region.center.device)
        known = problem.boxes if snapshot is problem.snapshot else None
        boxes = intermediate_boxes(snapshot, region, deadline=problem.deadline) if known is None else known
        if time.perf_counter() > problem.deadline:
            return Finding(problem.known, torch.zeros(len(problem.size), dtype=torch.bool), None, tried, False)
        core = core_of(snapshot, region, boxes)
        plan = Plan(
            self.branching,
            self.node_branching,
            self.iterations,
            self.node_iterations,
            self.tighten_iterations,
            batch=self.batch,
        )
        rough, scale = (t[0] for t in crown(snapshot, region, boxes, deadline=problem.deadline))
        of_scale, of_size = ALLOWANCES[rough.dtype]
        rough = rough - torch.maximum(scale * of_scale, problem.size * of_size)
        low = torch.maximum(problem.known, rough.double().cpu().nan_to_num(nan=-torch.inf))
        proven = torch.zeros_like(low, dtype=torch.bool)
        domains, doubtful = tried, False
        for row in low.argsort().tolist():
            if time.perf_counter() > problem.deadline:
                break
            outcome = Search(core, core.outputs[row], float(problem.size[row]), plan, problem.deadline).run()
            proven[row] = outcome.proven
            low[row] = outcome.low if outcome.proven else max(outcome.low, float(low[row]))
            domains, doubtful = domains + outcome.domains, doubtful or outcome.doubtful
            if outcome.witness is not None:
                return Finding(low, proven, core.pixels(outcome.witness)[0], domains, doubtful)
        return Finding(low, proven, None, domains, doubtful)
