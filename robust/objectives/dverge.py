"""DVERGE: an ensemble whose members are vulnerable to different perturbations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.ascent import Ascent, Task, ascend
from attacks.attack import ATTACKS, Attack
from attacks.noise import uniform
from attacks.registry import method_field
from attacks.threat import LinfBall
from certify.graph import Graph
from certify.ops.relu import ReLU
from certify.tracing import capture
from robust.active import Active, RunFacts
from robust.models.ensemble import Ensemble
from robust.objective import OBJECTIVES, cross_entropy
from robust.seeds import seeded
from robust.training_attack import BatchNormStatistics, adversarial, attacked_network
from robust.views import Views


@OBJECTIVES.register("dverge")
@dataclass(frozen=True)
class DVERGE:
    """Sum over members i and j != i of CE(z_i(x_j), y), where x_j lies near x and looks to member j's hidden layer like
    another image (Yang et al. 2020); for the model `ensemble`.

    x_j = argmin over |x' - x|_inf <= eps of the mean square of h_j(x') - h_j(x_t), by sign steps with momentum from x;
    h_j are the inputs of one of its ReLUs, drawn for every epoch. It holds back attacks that transfer, not those that
    see the ensemble.

    The authors step the members in turn, each with its own optimiser, at points that were found before any of them
    moved. As no two members share parameters, one step on the sum of their losses is the same. Their targets x_t come
    from a second stream of images; here they are the mini-batch's own in another order. They start from trained
    networks.

    Args:
        eps: of the distillation; the run's eps is that of `attack` and of evaluation.
        steps, step_size: of the distillation, in units of eps.
        weight: of the sum.
        attack: where given, the members' cross-entropies at their own adversarial points are added.
        statistics: BatchNorm statistics of the distillation and under the attack.
        seed: of the drawn layers.
    """

    eps: float = 0.07
    steps: int = 10
    step_size: float = 0.1
    weight: float = 1.0
    attack: Attack | None = method_field(ATTACKS, None)
    statistics: BatchNormStatistics = "train"
    seed: int = 0

    def start(self, run: RunFacts) -> Active:
        if not isinstance(run.model, Ensemble) or len(run.model.members) < 2:
            raise ValueError("dverge trains an ensemble; set model=ensemble:model=(cnn5),members=3")
        example = torch.zeros(1, *run.input_shape).to(next(run.model.parameters()))
        return _Active(self, [capture(member, example) for member in run.model.members])


class _Active(Active):
    def __init__(self, dverge: DVERGE, members: list[Graph]) -> None:
        self.dverge, self.members = dverge, members

    def __call__(self, views: Views) -> dict[str, Tensor]:
        seen = [
            replace(views, graph=graph, kept=views.once((self, number), dict))
            for number, graph in enumerate(self.members)
        ]
        points = views.once(("distilled", self), lambda: self._distilled(seen))
        losses = [
            cross_entropy(member.train(x), views.y)
            for number, member in enumerate(seen)
            for source, x in enumerate(points)
            if source != number
        ]
        terms = {"distilled": self.dverge.weight * torch.stack(losses).sum(0)}
        if (attack := self.dverge.attack) is not None:
            found = [adversarial(member, attack, statistics=self.dverge.statistics) for member in seen]
            own = [cross_entropy(member.train(x), views.y) for member, x in zip(seen, found, strict=True)]
            terms["adversarial"] = torch.stack(own).sum(0)
        return terms

    def _distilled(self, seen: list[Views]) -> list[Tensor]:
        """A batch of points for every member."""
        dverge, first = self.dverge, seen[0]
        targets = first.x[uniform((len(first.x),), first.x, first.generator).argsort()]
        ball = LinfBall(dverge.eps * first.eps_fraction, first.ball.pixel_range)
        plan = Ascent(dverge.steps, dverge.step_size, keep="last", momentum=1.0)
        found = []
        for member in seen:
            front = replace(member, graph=hidden_part(member.graph, dverge.seed, int(first.epoch)), kept={})
            network = attacked_network(front, dverge.statistics, dverge.steps)
            with torch.no_grad():
                wanted = network(targets)
            task = Task(first.x, (first.y, wanted), ball)
            found.append(ascend(network, likeness, task, first.x.clone(), plan)[0])
        return found


def likeness(features: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Less the mean square of the features' distance from those wanted, `[B]`; y plays no part."""
    return -(features - wanted).square().flatten(1).mean(1)


def hidden_part(graph: Graph, seed: int, epoch: int) -> Graph:
    """The graph up to the input of one of its ReLUs, drawn for the epoch."""
    borders = [step.inputs[0] for step in graph.steps[1:] if isinstance(step.build(), ReLU)]
    if not borders:
        raise ValueError("dverge needs members with ReLUs")
    drawn = int(torch.randint(len(borders), (), generator=seeded("cpu", seed, "layer", epoch)))
    return replace(graph, steps=graph.steps[: borders[drawn] + 1])
