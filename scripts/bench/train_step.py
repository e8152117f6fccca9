"""Cost of a training step of each objective, as a multiple of a plain forward and backward pass of the same net.

    python scripts/bench/train_step.py [--net cnn7|gowal_small|preactresnet18] [--rounds 15] [--device cpu]
    python scripts/bench/train_step.py --memory --net cnn7

Every round times the plain pass and then each objective; the ratio's median over the rounds counts, so that a machine
that is busy for a while does not decide. On a CPU the time is the process's own CPU time on one thread. A step is
clearing the gradients, attack, bounds, loss and backward pass at the full radius with all loss terms active; "update"
is clipping the gradient and a fused Adam step on top, the same for every objective.

--memory starts a fresh process per objective and prints the growth of its resident memory by a training step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from certify.graph import Graph
from certify.tracing import capture
from robust.allocator import keep_freed_memory
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.settings import Settings
from robust.step import BatchLoss, StepPlan
from robust.weight_perturbation import WEIGHT_PERTURBATIONS, Perturbed

STEPS_8 = "attack=(pgd:steps=8,step_size=0.5,unit=box,keep=last,mode=keep{})"
CERTIFIED = {
    "ibp": "ibp",
    "shi_ibp": "shi_ibp",
    "sabr, 8 steps": "sabr:" + STEPS_8.format(""),
    "sabr, 8 steps in bfloat16": "sabr:" + STEPS_8.format(",precision=bfloat16"),
    "mtl_ibp, 8 steps": "mtl_ibp:" + STEPS_8.format(""),
    "crown_ibp, loss fusion": "crown_ibp:crown_weight=0.5",
}
PGD_10 = "pgd:attack=(pgd:steps=10,step_size=0.25,keep=last,mode=keep{}),statistics=train,batch_norm=own"
ADVERSARIAL = {
    "pgd, 10 steps": PGD_10.format(""),
    "pgd, 10 steps in bfloat16": PGD_10.format(",precision=bfloat16"),
    "trades, 10 steps": "trades",
    "mart, 10 steps": "mart",
    "pgd + awp, 10 steps": f"{PGD_10.format('')} + awp:gamma=0.01",
    "trades + awp, 10 steps": "trades + awp:gamma=0.005",
}
"""Objective, and behind " + " a weight perturbation."""


@dataclass(frozen=True)
class Net:
    """A benchmark case; `steps` are texts by title."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    eps: float
    limits: dict[str, float]
    steps: dict[str, str] = field(default_factory=lambda: CERTIFIED)


NETS = {
    "cnn7": Net(
        "cnn7",
        (3, 32, 32),
        32,
        2 / 255,
        {
            "ibp": 3.5,
            "sabr, 8 steps": 8.2,
            "sabr, 8 steps in bfloat16": 5.8,
            "mtl_ibp, 8 steps": 9.0,
            "crown_ibp, loss fusion": 4.8,
        },
    ),
    "gowal_small": Net(
        "gowal_small",
        (1, 28, 28),
        128,
        0.2,
        {"ibp": 3.0, "sabr, 8 steps": 10.5, "mtl_ibp, 8 steps": 11.0, "crown_ibp, loss fusion": 5.5},
    ),
    "preactresnet18": Net(
        "preactresnet18",
        (3, 32, 32),
        16,
        8 / 255,
        {"pgd, 10 steps": 7.2, "trades, 10 steps": 8.6, "mart, 10 steps": 8.3, "trades + awp, 10 steps": 11.5},
        ADVERSARIAL,
    ),
}


class Case:
    """A net with one batch, and the steps that are timed."""

    def __init__(self, net: Net, device: str) -> None:
        torch.manual_seed(0)
        channels = net.shape[0]
        self.model = MODELS.parse(net.model)(net.shape, 10, (0.5,) * channels, (0.25,) * channels).to(device).train()
        self.x = torch.rand(net.batch, *net.shape, device=device)
        self.y = torch.randint(0, 10, (net.batch,), device=device)
        self.graph: Graph = capture(self.model, self.x[:1])
        self.settings = Settings(eps=net.eps, batch_size=net.batch)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)

    def plain(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()

    def textbook_pgd(self) -> None:
        """The step of "pgd, 10 steps" as a user would write it down, without the suite."""
        self.optimizer.zero_grad()
        x, eps = self.x, self.settings.eps
        point = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(10):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(point), self.y), point)
            point = torch.clamp(point.detach() + eps / 4 * gradient.sign(), x - eps, x + eps).clamp(0, 1)
        F.cross_entropy(self.model(point), self.y).backward()

    def step(self, text: str) -> Callable[[], None]:
        text, _, perturbation_text = text.partition(" + ")
        objective = OBJECTIVES.parse(text)
        perturbation = WEIGHT_PERTURBATIONS.parse(perturbation_text) if perturbation_text else None

        def run() -> None:
            self.optimizer.zero_grad()
            generator = torch.Generator(self.x.device).manual_seed(0)
            loss = BatchLoss(self.graph, self.x, self.y, StepPlan(objective, [], 1.0, 1.0, generator), self.settings)
            perturbed = Perturbed(perturbation(self.model, loss) if perturbation else [], "after_step")
            loss.backward()
            perturbed.restore("after_step")

        return run


def seconds(run: Callable[[], object], device: str) -> float:
    """CPU seconds of one call, or wall seconds on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, rounds: int, device: str) -> list[dict[str, object]]:
    """One record per objective."""
    case = Case(NETS[name], device)
    runs = {title: case.step(text) for title, text in NETS[name].steps.items()}
    if "pgd, 10 steps" in runs:
        runs["pgd, 10 steps, textbook"] = case.textbook_pgd
    case.plain()
    runs["update"] = case.update
    for run in runs.values():
        run()
    plain: list[float] = []
    ratios: dict[str, list[float]] = {title: [] for title in runs}
    for _ in range(rounds):
        base = statistics.median(seconds(case.plain, device) for _ in range(3))
        plain.append(base)
        for title, run in runs.items():
            ratios[title].append(seconds(run, device) / base)
    facts = {"net": name, "device": device, "torch": torch.__version__, "rounds": rounds}
    return [
        {
            **facts,
            "step": title,
            "multiple": round(statistics.median(values), 2),
            "least": round(min(values), 2),
            "most": round(max(values), 2),
            "limit": NETS[name].limits.get(title),
            "plain_ms": round(1000 * statistics.median(plain), 2),
        }
        for title, values in ratios.items()
    ]


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def memory_of_one_step(name: str, title: str) -> float:
    """MB that two training steps, Adam's state included, add at their peak to a process with model and data."""
    case = Case(NETS[name], "cpu")
    before = resident_mb()
    run = case.plain if title == "plain" else case.step(NETS[name].steps[title])
    for _ in range(2):
        run()
        case.update()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before


def print_memory(name: str) -> None:
    """A line per objective, each measured in a process of its own."""
    for title in ("plain", *NETS[name].steps):
        command = [sys.executable, __file__, "--net", name, "--memory-of", title]
        megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(json.dumps({"net": name, "step": title, "resident_mb_added": round(megabytes)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), default="cnn7")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    keep_freed_memory()  # as the command line does
    if options.memory_of:
        print(memory_of_one_step(options.net, options.memory_of))
    elif options.memory:
        print_memory(options.net)
    else:
        for record in measure(options.net, options.rounds, options.device):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
