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

SABR_PGD = PGD(steps=8, step_size=0.5, decay=0.1, decay_at=(0.5, 0.8, 0.9), unit="box", keep="best", mode="keep")
"""SABR's search (Mueller et al. 2023): 8 steps of half the box's half-width, decaying; the point of largest loss."""

EXPRESSIVE_PGD = PGD(steps=8, step_size=0.25, unit="box", keep="best", mode="keep")
"""The expressive losses' search on CIFAR-10 at 2/255 (De Palma et al. 2024): 8 equal steps, point of largest loss."""

SINGLE_STEP = PGD(steps=1, step_size=10.0, unit="box", keep="last", mode="keep")
"""Their search in the other settings: one step from a random start that ends in a corner."""


def adversarial(views: Views, attack: Attack, factor: float = 1.0, statistics: BatchNormStatistics = "batch") -> Tensor:
    """Points that the attack finds in the ball of `factor` times the step's radius, `[B, C, H, W]`, detached."""
    network = views.running if statistics == "running" else views.frozen
    if getattr(attack, "precision", "float32") == "bfloat16":
        network = _cast_weights(network)
    ball = views.ball if factor == 1 else views.ball.scaled(factor)
    return attack(network, views.x, views.y, ball, generator=views.generator)


def _cast_weights(network: Snapshot) -> Snapshot:
    """Weight layers in bfloat16: autocast would convert them anew at every step of the attack."""
    nodes = (
        replace(node, op=cast_tensors(node.op, torch.bfloat16)) if isinstance(node.op, Conv2d | Linear) else node
        for node in network.nodes
    )
    return Snapshot(tuple(nodes))
