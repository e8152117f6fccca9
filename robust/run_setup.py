"""What a training run starts from: its folder's names, its data and model, and the checks before anything is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.tracing import capture
from robust.dataset import DataSet, parse_dataset
from robust.hook import HOOKS
from robust.initialization import initialize_
from robust.model import MODELS, names_file
from robust.objective import OBJECTIVES
from robust.optimizer import OPTIMIZERS
from robust.own_model import check_named, code_hash, model_for
from robust.regularizer import REGULARIZERS
from robust.schedule import SCHEDULES, ramp_progress
from robust.seeds import seeded
from robust.settings import Settings
from robust.tensor_file import load_tensors
from robust.validation import parse_validator
from robust.weight_perturbation import WEIGHT_PERTURBATIONS, WeightPerturbation
from robust.weighting import WEIGHTINGS

STATE, BEST, CHECKPOINT, LAST, LOG, SETTINGS = (
    "state.safetensors",
    "best.safetensors",
    "checkpoint.safetensors",
    "last.safetensors",
    "log.jsonl",
    "settings.json",
)

CODE = "code"
"""What SETTINGS calls the hash of the user's own file; folders of earlier runs lack it."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says where and what to do."""


def build_model(settings: Settings, data: DataSet) -> nn.Module:
    """The run's network with its starting weights.

    Raises:
        OwnModelError, UnsupportedOp, CaptureError: the user's own network cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # for what an initialisation leaves as it was built
        model = model_for(settings.model, data)
    if names_file(settings.model):
        # Before an initialisation meets what training refuses anyway.
        capture(model, torch.zeros(1, *data.input_shape))
    initialize_(model, settings.init, seeded("cpu", settings.seed, "weights"))
    return model


def check_texts(settings: Settings) -> None:
    """Raise UnknownName or ValueError where a text of the settings spells no method, before anything is read.

    TrainingError where a method is not for balls of the run's norm.
    """
    parse_dataset(settings.data)
    own = names_file(settings.model)
    if own:
        check_named(settings.model)
    for registry, texts in (
        (MODELS, [] if own else [settings.model]),
        (OBJECTIVES, [settings.objective]),
        (OPTIMIZERS, [settings.optimizer]),
        (SCHEDULES, [settings.eps_schedule, settings.lr_schedule]),
        (REGULARIZERS, settings.regularizers),
        (WEIGHTINGS, settings.weightings),
        (HOOKS, settings.hooks),
    ):
        for text in texts:
            _check_norm(f"{registry.kind} {text}", registry.parse(text), settings)
    parse_perturbation(settings)
    _check_norm(f"validator {settings.validator}", parse_validator(settings.validator), settings)


def refuse_undivided(settings: Settings) -> None:
    """TrainingError where a method of the run needs every mini-batch in one process."""
    for registry, texts in (
        (OBJECTIVES, [settings.objective]),
        (REGULARIZERS, settings.regularizers),
        (WEIGHTINGS, settings.weightings),
        (HOOKS, settings.hooks),
    ):
        for text in texts:
            if _undivided(registry.parse(text)):
                raise TrainingError(
                    f"{registry.kind} {text} can not be trained by several processes together; start one, "
                    "without torchrun"
                )


def _undivided(method: Any) -> bool:
    """Whether a method, or one that it holds in a field, says so."""
    held = (getattr(method, f.name) for f in dataclasses.fields(method))
    return getattr(method, "undivided", False) or any(_undivided(m) for m in held if dataclasses.is_dataclass(m))


def refuse_misfits(settings: Settings, labels: Tensor, steps_per_epoch: int) -> None:
    """TrainingError where a method would do nothing all the run, or has no answer to these training images.

    Args:
        labels: of the training images, `[N]`; -1 means none.
    """
    objective, name = OBJECTIVES.parse(settings.objective), settings.objective.partition(":")[0]
    ramps = ramp_progress(SCHEDULES.parse(settings.eps_schedule), 0, steps_per_epoch) < 1
    for text in settings.regularizers:
        if not ramps and getattr(REGULARIZERS.parse(text), "needs_boxes", False):
            raise TrainingError(
                f"{text} acts while the radius grows, and eps_schedule={settings.eps_schedule} has no such time; give "
                "a ramp, such as smooth, or leave it out"
            )
    if settings.weightings and getattr(objective, "of_the_batch", False):
        raise TrainingError(
            f"{' and '.join(settings.weightings)}: every image has the same loss in {name}, a product of means over "
            "the batch, so there is nothing to weight; mtl_ibp and cc_ibp have a loss for each"
        )
    alone = not (settings.regularizers or settings.weightings)
    if (labels < 0).any() and not (alone and getattr(objective, "takes_unlabelled", False)):
        raise TrainingError(
            "some training images have no label (-1); only awr takes them, without regularisers and weightings"
        )


def _check_norm(name: str, method: object, settings: Settings) -> None:
    norms = getattr(method, "norms", (settings.norm,))
    if settings.norm not in norms:
        raise TrainingError(
            f"{name} is for {', '.join(norms)} balls, the run has norm={settings.norm!r}; change one of them"
        )


def parse_perturbation(settings: Settings) -> WeightPerturbation | None:
    """The run's weight perturbation, None for "none"."""
    text = settings.weight_perturbation
    return None if text == "none" else WEIGHT_PERTURBATIONS.parse(text)


def training_data(settings: Settings, root: Path | None) -> DataSet:
    """The run's data set, whose test images are the validation images where there are any.

    Raises:
        TrainingError: too few training images, or a share of them that is no image.
    """
    data = parse_dataset(settings.data)(root)
    count = len(data.train)
    if count < 2:
        raise TrainingError(f"{settings.data}: no training images (a folder needs train/, an archive x_train)")
    crop = data.augmentation.crop_size if data.augmentation is not None else None
    if settings.validation:
        data = data.split(settings.validation, settings.seed)
        if len(data.train) < 2 or not len(data.test):
            raise TrainingError(
                f"validation={settings.validation} of {count} images leaves {len(data.train)} to train on and "
                f"{len(data.test)} to validate with; both are needed"
            )
    if crop is not None and not settings.augment:
        # The augmentation would have cut the images to the model's input.
        data = dataclasses.replace(data, train=data.train.center_crop(crop))
    return data


def settings_facts(settings: Settings) -> dict[str, Any]:
    """What a run's folder keeps of its settings; of the user's own network they also say which code that was."""
    code = code_hash(settings.model)
    return settings.to_dict() if code is None else {**settings.to_dict(), CODE: code}


def refuse_other_settings(settings: Settings, out: Path) -> None:
    """TrainingError where `out` holds work of a run with other settings, or of an own network that was edited since."""
    log = out / LOG
    worked = (out / STATE).exists() or (out / CHECKPOINT).exists() or (log.exists() and log.stat().st_size > 0)
    if (out / SETTINGS).exists() and worked:
        try:
            there = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise _no_settings(out / SETTINGS, error) from None
        refuse_unlike(settings, there, out / SETTINGS)
    elif (out / CHECKPOINT).exists():
        there = load_tensors(out / CHECKPOINT)[1].get("settings", {})
        names = settings.to_dict()
        refuse_unlike(settings, {name: there[name] for name in names if name in there}, out / CHECKPOINT)


def refuse_unlike(settings: Settings, there: Any, path: Path) -> None:
    """TrainingError where the settings that `path` holds (`settings_facts`) are others."""
    try:
        code = there.get(CODE)
        stored = Settings.from_dict({name: value for name, value in there.items() if name != CODE}).to_dict()
    except (ValueError, AttributeError) as error:
        raise _no_settings(path, error) from None
    changed = [
        f"{name}: {stored[name]!r} there, {value!r} now"
        for name, value in settings.to_dict().items()
        if stored[name] != value
    ]
    if changed:
        raise TrainingError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); choose another folder"
        )
    if code is not None and code != code_hash(settings.model):
        raise TrainingError(
            f"{path.parent} holds a run of {settings.model}, and the network's code changed since then; choose another "
            "folder with --out"
        )


def _no_settings(path: Path, error: Exception) -> TrainingError:
    return TrainingError(f"{path} holds no settings of this suite ({error}); choose another folder")
