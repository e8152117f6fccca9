"""Attacks inside a training step: which network they climb and which presets papers use."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.gradient import Precision
from attacks.losses import misclassified
from attacks.methods.pgd import PGD
from attacks.mode import Model
from certify.graph import Snapshot
from robust.attacked_layers import layers_for
from robust.views import Views, split_last

BatchNormStatistics = Literal["batch", "running", "eval", "train", "train_frozen"]
"""Statistics under an attack. batch: those of the clean batch (CTBench). running: the running ones after the clean pass
(SABR, expressive losses). eval: the running ones as the last step left them (TRADES and its descendants). train: those
of every iterate, which also move the running ones (Madry et al., Rice et al., AWP). train_frozen: the same without
moving them (Gowal et al., Wang et al. 2023)."""

BatchNormOf = Literal["own", "clean"]
"""Statistics of the loss's pass at adversarial points. own: of that batch itself, in a training pass that moves the
running ones too (adversarial training as published). clean: of the clean batch (certified training, CTBench)."""

BoundsStatistics = Literal["clean", "adversarial"]
"""Batch whose statistics the bounds and the adversarial logits use: the clean one (Shi et al., SABR, CTBench), or that
of the adversarial points in a training pass of its own (the expressive losses' code)."""

# Both papers keep the point of largest loss, which takes one more forward pass. The last point is as strong:
# scripts/bench/attack_strength.py finds mean losses of 0.4252 and 0.4252, 0.4254 and 0.4253 (digits, CNN5).
SABR_PGD = PGD(steps=8, step_size=0.5, decay=0.1, decay_at=(0.5, 0.8, 0.9), unit="box", keep="last", mode="keep")
"""SABR's search (Mueller et al. 2023): 8 steps of half the box's half-width, decaying."""

EXPRESSIVE_PGD = PGD(steps=8, step_size=0.25, unit="box", keep="last", mode="keep")
"""The expressive losses' search on CIFAR-10 at 2/255 (De Palma et al. 2024): 8 equal steps."""

SINGLE_STEP = PGD(steps=1, step_size=10.0, unit="box", keep="last", mode="keep")
"""Their search in the other settings: one step from a random start that ends in a corner."""


TRADES_STEP = 0.007 / 0.031
"""Step of the TRADES family, in units of its radius."""


def adversarial(
    views: Views,
    attack: Attack,
    factor: float = 1.0,
    statistics: BatchNormStatistics = "batch",
    labels: Tensor | None = None,
) -> Tensor:
    """Points that the attack finds in the ball of `factor` times the step's radius, `[B, C, H, W]`, detached.

    They are searched once a step, also where the loss is then computed at other weights.

    Args:
        labels: classes to attack instead of the images' own, `[B]`, such as a teacher's.
    """
    y = views.y if labels is None else labels

    def search() -> Tensor:
        passes: int = getattr(attack, "steps", 1)
        precision: Precision = getattr(attack, "precision", "float32")
        network = attacked_network(views, statistics, passes, precision)
        ball = views.ball if factor == 1 else views.ball.scaled(factor)
        pace = {} if views.pace is None else {"pace": views.pace}
        if not views.count_correct:
            return attack(network, views.x, y, ball, generator=views.generator, **pace)
        counting = _Counting(network, y)
        points = attack(counting, views.x, y, ball, generator=views.generator, **pace)
        views.kept["path"] = counting.kappa, counting.length
        return points

    return views.once(("adversarial", id(attack), factor, statistics), search)


def attacked_network(
    views: Views, statistics: BatchNormStatistics, passes: int = 1, precision: Precision = "float32"
) -> Model:
    """The network that an attack climbs, without gradients to the parameters.

    Args:
        passes, precision: number of gradients that the attack takes, and its arithmetic; the layers are in the form
            that suits them.
    """
    change = layers_for(passes, precision, len(views.x))
    if views.graph.has_batch_norm and statistics in ("train", "train_frozen"):
        return functools.partial(views.iterate, move=statistics == "train", graph=views.graph.constant(change))
    if statistics == "running" and views.graph.has_batch_norm:
        return views.running.changed(change)
    if statistics == "eval" and views.graph.has_batch_norm:
        return views.evaluation.changed(change)
    return views.frozen.changed(change)


def adversarial_logits(views: Views, x_adv: Tensor, batch_norm: BatchNormOf) -> Tensor:
    """Logits at the adversarial points, `[B, K]`, noted in `views.logits`."""
    views.logits["adversarial"] = logits_at(views, x_adv, batch_norm)
    return views.logits["adversarial"]


def logits_at(views: Views, x: Tensor, batch_norm: BatchNormOf) -> Tensor:
    """Logits at any points of the step, `[B, K]`, with the BatchNorm statistics that are asked for."""
    return views.train(x) if batch_norm == "own" and views.graph.has_batch_norm else views.snapshot(x)


def logits_and_features_at(views: Views, x: Tensor, batch_norm: BatchNormOf) -> tuple[Tensor, Tensor]:
    """(logits, inputs of the last layer `[B, n]`) as in `logits_at`."""
    if batch_norm == "own" and views.graph.has_batch_norm:
        return views.train_with_features(x)
    front, last = split_last(views.snapshot)
    features = front(x)
    return last.forward(features), features


def attacked_and_bounding(views: Views, x_adv: Tensor, statistics: BoundsStatistics) -> tuple[Tensor, Snapshot]:
    """(logits at the adversarial points, network to bound), both with the BatchNorm statistics that are asked for."""
    if statistics == "adversarial" and views.graph.has_batch_norm:
        _ = views.clean  # the clean pass comes first: both update the running statistics
        views.logits["adversarial"], network = views.training_pass(x_adv)
        return views.logits["adversarial"], network
    return adversarial_logits(views, x_adv, "clean"), views.snapshot


@dataclass
class _Counting:
    """A network that counts, per example, the points at which an attack takes a gradient and the label is right."""

    network: Model
    y: Tensor
    kappa: Tensor = field(init=False)
    length: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.kappa = torch.zeros_like(self.y)

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        if torch.is_grad_enabled():
            if len(x) != len(self.y):
                raise ValueError("points of an attack's path are counted for keep=last or best, restarts=1 only")
            self.kappa += ~misclassified(logits.detach(), self.y)
            self.length += 1
        return logits
