"""Early stop when single-step training loses its robustness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.attack import ATTACKS, Attack
from attacks.losses import misclassified
from attacks.methods.pgd import PGD
from attacks.mode import attack_mode
from attacks.registry import method_field
from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS


@HOOKS.register("catastrophic_overfitting")
@dataclass(frozen=True)
class CatastrophicOverfitting:
    """Ends the run, with the weights of the epoch before, when the accuracy under an attack falls from one epoch to the
    next by more than `drop` on a mini-batch of training images (Wong et al. 2020).

    Measured in evaluation mode; the authors' code stays in training mode.

    Args:
        drop: share of the batch.
        attack: the authors' are five steps of a quarter of the radius.
    """

    drop: float = 0.2
    attack: Attack = method_field(ATTACKS, PGD(steps=5, step_size=0.25, keep="last"))

    def start(self, run: RunFacts) -> Active:
        return _Active(self, run)


class _Active(Active):
    goes_back: ClassVar[bool] = True

    def __init__(self, hook: CatastrophicOverfitting, run: RunFacts) -> None:
        self.hook, self.ball = hook, run.ball
        self.accuracy = torch.zeros((), dtype=torch.float64)
        self.over = torch.zeros((), dtype=torch.bool)
        self.kept: dict[str, Tensor] = {}

    def after_epoch(self, moment: Moment) -> None:
        accuracy = self._accuracy(moment)
        if accuracy < self.accuracy - self.hook.drop:
            self.over.fill_(True)
            moment.model.load_state_dict(self.kept)
            return
        self.accuracy.fill_(accuracy)
        self.kept = {name: tensor.detach().clone() for name, tensor in moment.model.state_dict().items()}

    def _accuracy(self, moment: Moment) -> float:
        x, y = next(moment.labelled())
        with attack_mode(moment.model):
            noise = torch.Generator().manual_seed(moment.step)
            points = self.hook.attack(moment.model, x, y, self.ball, generator=noise)
            with torch.no_grad():
                return 1 - misclassified(moment.model(points), y).double().mean().item()

    def finished(self) -> bool:
        return bool(self.over)

    def state(self) -> dict[str, Tensor]:
        return {"accuracy": self.accuracy, "over": self.over, **{f"kept.{k}": v for k, v in self.kept.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.accuracy, self.over = state["accuracy"].clone(), state["over"].clone()
        self.kept = {k.removeprefix("kept."): v.clone() for k, v in state.items() if k.startswith("kept.")}
