"""How long a run will take, by a few of its steps on this machine.

Rough on purpose: training steps are measured on a few images, spread over the run, and counted for all of them, and of
a verifier with a time limit only the most that it can take is known.
"""

from __future__ import annotations

import dataclasses
import time
from functools import lru_cache
from typing import Any

import torch

from attacks.attack import ATTACKS, Ensemble
from attacks.methods.pgd import PGD
from attacks.threat import make_ball
from certify.verifier import VERIFIERS
from robust.data.stand_in import StandIn
from robust.data.subset import Subset
from robust.dataset import DATASETS, parse_dataset
from robust.model import MODELS
from robust.optimizer import OPTIMIZERS
from robust.settings import Settings
from robust.trainer import rehearse
from scripts.reproduction.reduce import CLASSES, own_data, with_epochs

ENOUGH = 0.3
"""Seconds of a step that are measured well enough; shorter ones are measured on more images."""

STEPS, EPOCHS = 5, 20
"""So many steps are measured, of a run in so many epochs: its schedules keep their shares of it."""

FORWARD_SHARE = 1 / 3
"""A query of a black-box attack as a share of a gradient step."""


def training_seconds(settings: Settings, images: int, device: str) -> float:
    """Estimated seconds of a run's steps over `images` an epoch."""
    return settings.epochs * images * seconds_per_image(_measured_part(settings), device)


def judging_seconds(settings: Settings, verifier: str, attack: str, images: int, device: str) -> float:
    """Estimated seconds at most of judging `images`: as if every one was right and withstood the attack."""
    seconds = 0.0
    if attack:
        seconds += _attack_steps(attack, settings) * _attack_step_seconds(settings.model, _shown(settings), device)
    if verifier:
        method = VERIFIERS.parse(verifier)
        limit = getattr(method, "timeout", None)
        seconds += _verifier_seconds(settings, verifier, device) if limit is None else limit
    return images * seconds


def _measured_part(settings: Settings) -> Settings:
    """What decides the cost of a step, and nothing that does not: equal for runs that cost the same."""
    rate = dataclasses.replace(OPTIMIZERS.parse(settings.optimizer), lr=1e-9)
    return dataclasses.replace(
        with_epochs(settings, EPOCHS),
        data=_shown(settings),
        optimizer=OPTIMIZERS.spell(rate),  # from random weights at the full radius a usual one may diverge
        lr_schedule="constant",
        hooks=(),
        validation=0.0,
        select="last",
        seed=0,
    )


def _shown(settings: Settings) -> str:
    """Text of a stand-in with as many classes as the run's data set, which need not be at hand."""
    own = own_data(parse_dataset(settings.data))
    if isinstance(own, StandIn):
        return DATASETS.spell(StandIn(own.data))
    inner = own.data if isinstance(own, Subset) else own
    return DATASETS.spell(StandIn(inner, classes=CLASSES.get(DATASETS.name_of(inner), 10)))


@lru_cache
def seconds_per_image(settings: Settings, device: str) -> float:
    """Of a training step, on as many images as take long enough to tell, up to the run's mini-batch."""
    count, least = 2, 2
    while True:
        seconds = _step_seconds(settings, count, device)
        if seconds > ENOUGH or count >= settings.batch_size:
            return seconds / count
        count = min(settings.batch_size, count * max(least, int(ENOUGH / seconds)))


def _step_seconds(settings: Settings, count: int, device: str) -> float:
    """Mean seconds of the trainer's steps on `count` images, from the first epoch to the last."""
    data = dataclasses.replace(parse_dataset(settings.data), train=count, test=10)
    short = dataclasses.replace(
        settings, data=DATASETS.spell(data), batch_size=count, micro_batch=min(settings.micro_batch, count)
    )
    return rehearse(short, None, torch.device(device), STEPS).seconds_per_step


def _attack_steps(attack: str, settings: Settings) -> float:
    """Gradient steps per image of an attack, or of every attack of an ensemble."""
    method = ATTACKS.parse(attack)
    stages = method.stages(settings.ball()).values() if isinstance(method, Ensemble) else [method]
    return sum(
        getattr(stage, "steps", 1) * getattr(stage, "restarts", 1) * max(1, getattr(stage, "targets", 1) or 1)
        if not hasattr(stage, "queries")
        else stage.queries * FORWARD_SHARE
        for stage in stages
    )


@lru_cache
def _attack_step_seconds(model: str, data: str, device: str, steps: int = 4, images: int = 8) -> float:
    net, x, y = _example(model, data, device, images)
    attack, ball = PGD(steps=steps), make_ball("linf", 1 / 255)
    attack(net, x, y, ball).cpu()  # which waits for a GPU
    started = time.perf_counter()
    attack(net, x, y, ball).cpu()
    return (time.perf_counter() - started) / steps / images


@lru_cache
def _verifier_seconds(settings: Settings, verifier: str, device: str, images: int = 2) -> float:
    net, x, y = _example(settings.model, _shown(settings), device, images)
    started = time.perf_counter()
    VERIFIERS.parse(verifier)(net, x, y, settings.ball())
    return (time.perf_counter() - started) / images


def _example(model: str, data: str, device: str, images: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The untrained network, images of its data set's shape, and its own predictions as labels."""
    shown = dataclasses.replace(parse_dataset(data), train=images, test=10)()
    net: Any = MODELS.parse(model)(shown.input_shape, len(shown.classes), shown.mean, shown.std)
    x, _ = shown.train.batch(torch.arange(images), device)
    with torch.no_grad():
        return net.eval().to(device), x, net(x).argmax(1)
