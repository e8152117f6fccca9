"""Attacks inside a training step: which network they climb and which presets papers use."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.methods.pgd import PGD
from certify.graph import Snapshot, cast_tensors
from certify.ops.affine import Conv2d, Linear
from robust.views import Views

BatchNormStatistics = Literal["batch", "running"]
"""Statistics under an attack: those of the clean batch (CTBench), or the running ones (SABR, expressive losses)."""

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


def adversarial(views: Views, attack: Attack, factor: float = 1.0, statistics: BatchNormStatistics = "batch") -> Tensor:
    """Points that the attack finds in the ball of `factor` times the step's radius, `[B, C, H, W]`, detached."""
    network = with_weights_in(views.running if statistics == "running" else views.frozen, attack)
    ball = views.ball if factor == 1 else views.ball.scaled(factor)
    return attack(network, views.x, views.y, ball, generator=views.generator)


def attacked_and_bounding(views: Views, x_adv: Tensor, statistics: BoundsStatistics) -> tuple[Tensor, Snapshot]:
    """(logits at the adversarial points, network to bound), both with the BatchNorm statistics that are asked for."""
    if statistics == "adversarial" and views.graph.has_batch_norm:
        _ = views.clean  # the clean pass comes first: both update the running statistics
        return views.training_pass(x_adv)
    return views.snapshot(x_adv), views.snapshot


def with_weights_in(network: Snapshot, attack: Attack) -> Snapshot:
    """The network with the weights of its layers in the arithmetic that the attack asks for.

    Autocast would convert them anew at every step of the attack.
    """
    if getattr(attack, "precision", "float32") == "float32":
        return network
    nodes = (
        replace(node, op=cast_tensors(node.op, torch.bfloat16)) if isinstance(node.op, Conv2d | Linear) else node
        for node in network.nodes
    )
    return Snapshot(tuple(nodes))
