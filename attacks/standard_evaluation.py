"""AutoAttack as code written for its authors' package calls it, RobustBench for one."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.gradient import forward
from attacks.losses import misclassified
from attacks.methods.autoattack import AutoAttack
from attacks.mode import Model, attack_mode
from attacks.threat import make_ball

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}


class StandardEvaluation:
    """The class `AutoAttack` of the authors' package, as far as evaluations use it.

        adversary = StandardEvaluation(model, norm="Linf", eps=8 / 255, version="standard")
        x_adv = adversary.run_standard_evaluation(x, y, bs=250)

    Args:
        model: images [B, C, H, W] in [0, 1] to logits, on `device`.
        norm: Linf, L2 or L1. eps: radius in pixel units.
        version: standard, plus or rand. The authors' "custom" is a list of `attacks` here.
        seed: key of all noise; None is 0.
        device: where batches go; None leaves them.
        verbose: print accuracies in percent.
        log_path: accepted for None only; print and redirect instead.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        version: str = "standard",
        device: torch.device | str | None = None,
        log_path: str | None = None,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
        if version not in ("standard", "plus", "rand"):
            raise ValueError(f"version={version!r}: expected standard, plus or rand; other attacks: attacks.ATTACKS")
        _refuse("log_path", log_path)
        self.model, self.device, self.verbose = model, device, verbose
        self.ball = make_ball(NORMS[norm], eps)
        self.attack = AutoAttack(version=version, seed=seed or 0)  # type: ignore[arg-type]

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The points that the attacks one after the other end with, as `x_orig`, and with return_labels their classes.

        Examples that no attack fools have the last point tried (with the authors, the clean image).
        """
        _refuse("state_path", state_path)
        points, classes = self._run(self.attack, "all attacks", x_orig, y_orig, bs)
        return (points, classes) if return_labels else points

    def run_standard_evaluation_individual(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> dict[str, Tensor]:
        """The points of every attack by itself, by its name, such as apgd-ce."""
        stages = {name.replace("_", "-"): attack for name, attack in self.attack.stages(self.ball).items()}
        return {name: self._run(attack, name, x_orig, y_orig, bs)[0] for name, attack in stages.items()}

    def _run(self, attack: Attack, name: str, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        points, classes, right = x.clone(), y.clone(), 0
        for rows in torch.arange(len(x)).split(batch_size):
            here, labels = x[rows].to(self.device), y[rows].to(self.device)
            found = attack(self.model, here, labels, self.ball, index=rows)
            with attack_mode(self.model), torch.no_grad():
                logits = forward(self.model, found)
            points[rows], classes[rows] = found.to(points), logits.argmax(1).to(classes)
            right += int((~misclassified(logits, labels)).sum())
        if self.verbose:
            print(f"robust accuracy under {name}: {100 * right / max(len(x), 1):.2f} %")
        return points, classes


def _refuse(name: str, value: object) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r}: not kept here; `robust attack` writes every example and can be resumed")
