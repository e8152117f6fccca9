"""PubDef: a defence against transfer attacks from public models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.methods.pgd import PGD
from attacks.noise import uniform
from attacks.registry import method_field
from robust.active import Active, RunFacts
from robust.auxiliary import FrozenModel
from robust.objective import OBJECTIVES, cross_entropy, mixed
from robust.training_attack import BatchNormOf, adversarial_logits
from robust.views import Views


@OBJECTIVES.register("pubdef")
@dataclass(frozen=True)
class PubDef:
    """Half cross-entropy at x, half at a point that fools a public network drawn at random for each image
    (Sitawarin et al. 2024).

    The trained network is not attacked, and not robust to attacks that see it. Here each point is searched when it is
    needed. The authors store four per image and source before training; that is the objective `natural` on the data set
    `transferred`. Their weights over sources, worst sources and dual loss are not built.

    Args:
        sources: checkpoints of the public networks, one of each kind, such as standard, linf- and l2-robust.
        robust_weight: share of the transferred points in the loss.
        attack: on the source.
        batch_norm: BatchNorm statistics of the pass at the transferred points.
    """

    sources: tuple[str, ...]
    robust_weight: float = 0.5
    attack: Attack = method_field(ATTACKS, PGD(steps=10, step_size=0.25, keep="last", mode="keep"))
    batch_norm: BatchNormOf = "own"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("pubdef needs networks to be attacked: pubdef:sources=A.safetensors+B.safetensors")

    def start(self, run: RunFacts) -> Active:
        return _Active(self, [FrozenModel(path, run) for path in self.sources])


class _Active(Active):
    def __init__(self, pubdef: PubDef, sources: list[FrozenModel]) -> None:
        self.pubdef, self.sources = pubdef, sources

    def companions(self) -> list[Active]:
        return list(self.sources)

    def __call__(self, views: Views) -> dict[str, Tensor]:
        points = views.once(("adversarial", self), lambda: self._transferred(views))
        _ = views.clean  # the clean pass comes first: both may move the running statistics
        logits = adversarial_logits(views, points, self.pubdef.batch_norm)
        return mixed(views, self.pubdef.robust_weight, {"adversarial": cross_entropy(logits, views.y)})

    def _transferred(self, views: Views) -> Tensor:
        x, y = views.x, views.y
        chosen = (len(self.sources) * uniform((len(x),), x, views.generator)).long()
        points = x.clone()
        for number, source in enumerate(self.sources):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                ball = views.ball.select(rows)
                points[rows] = self.pubdef.attack(source, x[rows], y[rows], ball, generator=views.generator)
        return points
