"""Shorter and smaller runs of a recipe: fewer epochs for a budget, less of everything for a trial run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from attacks.attack import ATTACKS
from attacks.methods.autoattack import AutoAttack
from certify.verifier import VERIFIERS
from robust.data.extra import Extra
from robust.data.imagenet import ImageNet
from robust.data.stand_in import StandIn
from robust.data.subset import Subset
from robust.dataset import DATASETS, MissingData, parse_dataset
from robust.method_texts import with_methods
from robust.models.cnn7 import CNN7
from robust.models.gowal import GowalLarge, GowalMedium, GowalSmall
from robust.models.liresnet import LiResNet
from robust.models.wide_resnet import WideResNet
from robust.settings import Settings

IMAGES = {
    "digits": (1437, 360),
    "mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
    "tiny_imagenet": (100_000, 10_000),
    "imagenet64": (1_281_167, 50_000),
    "imagenet": (1_281_167, 50_000),
}
"""Training and test images of a data set, for plans of runs whose data are not at hand."""

CLASSES = {"cifar100": 100, "tiny_imagenet": 200, "imagenet64": 1000, "imagenet": 1000}

EPOCH_FIELDS = ("start", "end", "at", "warmup", "start_epoch", "warmup_epochs", "halve_every", "patience_epochs")
"""Fields of methods that count epochs, and so are scaled along with them."""

SCALED_FROM = (20_000, 2_000)
"""Training and test images of which a scaled run takes its share; larger data sets count as this large."""

LIMIT_FROM, LEAST_LIMIT = 100.0, 0.5
"""Seconds per image of which a scaled run takes its share, longer limits count as this long; and the least of them."""

LEAST_IMAGES = (200, 20)
HELD_OUT_OF_A_CLASS = 2
"""Images for validation, where there are some: by its share of a whole data set, classes of a part would have none."""

SCALED_SIDE = 64
"""Pixels of images that are larger."""

LEAST_WIDTH = {"width": 4, "widen": 1, "hidden": 32, "channels": 4}
SCALED_BATCH = 50


def own_data(data: Any) -> Any:
    """The data set that images are validated and tested on: `own` of one with extra images, else itself."""
    return own_data(data.own) if isinstance(data, Extra) else data


def image_counts(settings: Settings) -> tuple[int, int]:
    """(images of an epoch, test images) of a run, from what is known of its data set."""
    data = parse_dataset(settings.data)
    train, test = _own_counts(data)
    train -= round(train * settings.validation)
    return (round(train / (1 - data.fraction)) if isinstance(data, Extra) else train), test


def _own_counts(data: Any) -> tuple[int, int]:
    """(training, test) images of a data set itself, without extra ones."""
    own = own_data(data)
    name = DATASETS.name_of(own)
    if isinstance(own, Subset | StandIn):
        return own.train, own.test
    if name not in IMAGES:
        raise ValueError(f"the number of images of data set {name!r} is not known; known: {', '.join(IMAGES)}")
    return IMAGES[name]


def with_epochs(settings: Settings, epochs: int) -> Settings:
    """The same run in `epochs` epochs: ramps, drops of the rate, warm-ups and starts keep their share of it."""
    factor = epochs / settings.epochs

    def shorter(kind: str, method: Any) -> Any:
        values = {}
        for field in dataclasses.fields(method):
            value = getattr(method, field.name)
            if field.name in EPOCH_FIELDS and isinstance(value, int | float | tuple) and not isinstance(value, bool):
                values[field.name] = _times(value, factor)
            elif field.metadata.get("registry") is not None and value is not None and kind not in ("data", "model"):
                values[field.name] = shorter(kind, value)
        return dataclasses.replace(method, **values)

    if epochs == settings.epochs:
        return settings
    return dataclasses.replace(
        with_methods(settings, shorter),
        epochs=epochs,
        validate_every=max(1, min(settings.validate_every, epochs // 2)),
    )


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_times(item, factor) for item in value)
    # A whole number of epochs stays one, and what is done from the second epoch on stays behind the first.
    return max(min(value, 1), round(value * factor)) if isinstance(value, int) else value * factor


def scaled(settings: Settings, scale: float, root: Path | None) -> tuple[Settings, list[str]]:
    """A run with `scale` of the images and epochs and a narrower network, and how it differs, in words.

    Where the data set is not at hand, digits stand in for it; the words and the data set's name say so.
    """
    data = parse_dataset(settings.data)
    share = (round(scale * min(*pair)) for pair in zip(_own_counts(data), SCALED_FROM, strict=True))
    counts = dict(zip(("train", "test"), map(max, share, LEAST_IMAGES), strict=True))
    part, absent = _part(_smaller(data), counts, root)
    epochs = max(2, round(scale * settings.epochs))
    shorter = with_epochs(settings, epochs)
    batch_size = min(settings.batch_size, SCALED_BATCH)

    def narrower(kind: str, method: Any) -> Any:
        return part if kind == "data" else narrow(method, math.sqrt(scale)) if kind == "model" else method

    taken = own_data(part)
    classes = CLASSES.get(DATASETS.name_of(taken.data), 10) if isinstance(taken, Subset) else 10
    held_out = max(settings.validation, min(0.5, HELD_OUT_OF_A_CLASS * classes / counts["train"]))
    changed = dataclasses.replace(
        with_methods(shorter, narrower),
        batch_size=batch_size,
        micro_batch=min(settings.micro_batch, batch_size),
        validation=held_out if settings.validation else 0.0,
    )
    words = [f"scale {scale:g}: {counts['train']} training and {counts['test']} test images, {epochs} epochs"]
    if changed.model != settings.model:
        words.append(f"network {changed.model}")
    if _smaller(data) != data:
        words.append(f"images of {SCALED_SIDE} pixels")
    if absent:
        words.append(f"STAND-IN data (resized digits of 10 classes instead of {absent})")
    return changed, words


def _smaller(data: Any) -> Any:
    """The data set with images of at most SCALED_SIDE pixels."""
    if not isinstance(data, ImageNet) or data.size <= SCALED_SIDE:
        return data
    return dataclasses.replace(data, size=SCALED_SIDE, resize=round(data.resize * SCALED_SIDE / data.size))


def _part(data: Any, counts: dict[str, int], root: Path | None) -> tuple[Any, str]:
    """A part of the data set, or its stand-in where it is missing, and then its name."""
    if isinstance(data, Extra):
        own, absent = _part(data.own, counts, root)
        # Generated images come from a user's own file: there is nothing that they could be a part of.
        extra = _stand_in(own_data(data), counts)
        name = DATASETS.name_of(own_data(data))
        return dataclasses.replace(data, own=own, extra=extra), absent or f"images generated for {name}"
    if at_hand(data, root):
        return Subset(data, **counts), ""
    return _stand_in(data, counts), DATASETS.name_of(data)


def _stand_in(data: Any, counts: dict[str, int]) -> StandIn:
    """As many digits as there are, up to the counts."""
    train, test = IMAGES["digits"]
    return StandIn(data, train=min(counts["train"], train), test=min(counts["test"], test))


def at_hand(data: Any, root: Path | None) -> bool:
    """Whether the data set can be read."""
    try:
        data(root)
    except MissingData:
        return False
    return True


def narrow(model: Any, factor: float) -> Any:
    """The architecture with `factor` of its widths and the fewest blocks that it can have; what is small stays."""
    if isinstance(model, GowalLarge):
        return CNN7(LEAST_WIDTH["width"], LEAST_WIDTH["hidden"], model.batch_norm)
    if isinstance(model, GowalMedium):
        return GowalSmall(model.batch_norm)
    values: dict[str, Any] = {}
    for field, least in LEAST_WIDTH.items():
        value = getattr(model, field, None)
        if isinstance(value, tuple):
            values[field] = tuple(min(item, max(least, _even(item * factor))) for item in value)
        elif value:
            values[field] = min(value, max(least, _even(value * factor)))
    if isinstance(model, WideResNet):
        values["depth"] = 10
    if isinstance(model, LiResNet):
        values |= {"depth": 2, "residual_dense": min(1, model.residual_dense)}
    return dataclasses.replace(model, **values)


def _even(width: float) -> int:
    """The nearest even number: MinMax pairs channels."""
    return 2 * round(width / 2)


def cheaper_judge(verifier: str, attack: str, scale: float) -> tuple[str, str]:
    """Texts of the judges with `scale` of their seconds per image, and of AutoAttack's steps and queries."""
    if verifier:
        method = VERIFIERS.parse(verifier)
        if hasattr(method, "timeout"):
            limit = max(LEAST_LIMIT, scale * min(method.timeout, LIMIT_FROM))
            verifier = VERIFIERS.spell(dataclasses.replace(method, timeout=limit))
    if attack:
        ensemble = ATTACKS.parse(attack)
        if isinstance(ensemble, AutoAttack):
            steps, queries = (max(5, round(count * scale)) for count in (ensemble.steps, ensemble.queries))
            attack = ATTACKS.spell(dataclasses.replace(ensemble, steps=steps, queries=queries))
    return verifier, attack
