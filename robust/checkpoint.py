"""Checkpoints: a trained model in one file that rebuilds itself and cannot run code when it is loaded."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.registry import UnknownName
from attacks.threat import Ball, make_ball
from robust.layout import own_names
from robust.model import MODELS, names_file
from robust.tensor_file import (
    CheckpointError,
    content_hash,
    load_tensors,
    pickled,
    read_safetensors,
    save_tensors,
)
from robust.versions import versions

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ball_facts",
    "load",
    "load_state_dict_file",
    "load_tensors",
    "named_network",
    "read_ball",
    "save_tensors",
]

KIND = "checkpoint"

# Names under which other projects store the weights beside an optimiser's state; what wrappers put before each name.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")

# What torch.load raises, besides UnpicklingError, for bytes that are no whole file of weights.
MALFORMED = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass
class Checkpoint:
    """A model with everything needed to rebuild, judge and continue it.

    Attributes:
        model: the network, pixels in [0, 1] to logits.
        settings: JSON values. `model` (text that MODELS parses, or FILE.py:NAME), `input_shape` (C, H, W), `classes`
            (number of logits), `mean` and `std` (one value per channel) rebuild the network; the rest belongs to the
            caller.
        ball: the threat model that the model was trained for; eps is one number.
        metrics: what was measured, by name.
        extra: anything else that JSON can hold.
        versions: software that wrote the checkpoint.
        code: SHA-256 of the user's own file that the model was built from; not stored in the checkpoint.
    """

    model: nn.Module
    settings: dict[str, Any]
    ball: Ball
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    code: str | None = None

    def save(self, path: Path) -> str:
        """Write the checkpoint whole or not at all; return its hash."""
        return save_tensors(path, _state(self.model), self._metadata())

    def hash(self) -> str:
        """SHA-256 over weights and metadata: the one in the file that `save` writes, and that `load` has checked."""
        return content_hash(_state(self.model), self._metadata())

    def _metadata(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "versions": self.versions,
            "settings": self.settings,
            "ball": ball_facts(self.ball),
            "metrics": self.metrics,
            "extra": self.extra,
        }


def load(path: Path, network: nn.Module | None = None) -> Checkpoint:
    """Rebuild the checkpoint in `path`: its model is on the CPU and in evaluation mode.

    Args:
        network: to put the weights into; None to build what the settings name, which a network of the user's own file
            needs: no checkpoint makes code run.

    Raises:
        CheckpointError: the file is missing, pickled, truncated, damaged, somebody else's, names an unknown model or
            a file of Python, or does not fit the network.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path}: holds {metadata.get('kind', 'tensors')!r}, expected a checkpoint")
    model = _build(metadata["settings"], path) if network is None else network
    _match_precision(model, tensors)
    _copy_weights(tensors, model, path)
    return Checkpoint(
        model.eval(),
        metadata["settings"],
        read_ball(metadata["ball"]),
        metadata["metrics"],
        metadata["extra"],
        metadata["versions"],
    )


def named_network(path: Path) -> str:
    """What a checkpoint's settings call its network: a text that MODELS parses, or FILE.py:NAME; nothing is run.

    Raises:
        CheckpointError: see `load`.
    """
    return str(load_tensors(path)[1].get("settings", {}).get("model", ""))


def load_state_dict_file(path: Path, model: nn.Module, layout: str | None = None) -> None:
    """Copy a plain state dict, from safetensors or from a pickle read weights-only, into `model`.

    A wrapper such as {"state_dict": ...} and prefixes such as "module." are removed, and the names of other projects
    become the suite's.

    Args:
        layout: whose names they are, see `robust.layout`; None to find out.

    Raises:
        CheckpointError: the file is missing or damaged, its pickle holds more than tensors and plain containers (it is
            refused without being executed), or its keys or shapes are not the model's.
    """
    content = _unpickled(path) if pickled(path) else read_safetensors(path)[0]
    tensors = _without_prefixes(_state_dict_in(content, path))
    _copy_weights(own_names(tensors, model, layout, str(path)), model, path)


def ball_facts(ball: Ball) -> dict[str, Any]:
    """JSON form of a ball with one radius; ValueError where there is one per example."""
    if isinstance(ball.eps, Tensor) and ball.eps.dim():
        raise ValueError("a record needs a ball with one eps, got one per example")
    return {"norm": ball.norm, "eps": float(ball.eps), "pixel_range": ball.pixel_range and list(ball.pixel_range)}


def read_ball(facts: Mapping[str, Any]) -> Ball:
    """Ball that `ball_facts` describes."""
    limits = facts["pixel_range"]
    return make_ball(facts["norm"], facts["eps"], limits and tuple(limits))


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(
            f"the model's state holds more than tensors, so no safetensors file can store it: {_few(foreign)}"
        )
    return state


def _build(settings: Mapping[str, Any], path: Path) -> nn.Module:
    needed = ("model", "input_shape", "classes", "mean", "std")
    missing = [name for name in needed if name not in settings]
    if missing:
        raise CheckpointError(f"{path}: its settings lack {', '.join(missing)}, so the model cannot be rebuilt")
    if names_file(settings["model"]):
        raise CheckpointError(
            f"{path}: its network is in {settings['model'].partition(':')[0]}, and no checkpoint makes code run; "
            f"name it yourself: --model {settings['model']}"
        )
    try:
        architecture = MODELS.parse(settings["model"])
        c, h, w = settings["input_shape"]
        return architecture((c, h, w), settings["classes"], tuple(settings["mean"]), tuple(settings["std"]))
    except UnknownName as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: model {settings['model']!r} cannot be built: {error}") from None


def _copy_weights(tensors: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Load tensors into the model in its own precision; CheckpointError names keys and shapes that differ."""
    expected = _state(model)
    misshaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": misshaped,
    }
    found = [f"{kind}: {_few(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{path}: the weights do not fit the model; {'; '.join(found)}")
    model.load_state_dict(dict(tensors))


def _match_precision(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give every parameter and buffer the dtype of its stored tensor, so that loading rounds nothing."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors and tensors[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _unpickled(path: Path) -> Any:
    try:
        # An open file, because torch would choose another reader by the name of a path.
        with Path(path).open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's thoughts about the pickle's protocol; the errors below say enough
            if zipfile.is_zipfile(file) and (torn := zipfile.ZipFile(file).testzip()) is not None:
                # torch writes check sums and reads past them.
                raise ValueError(f"the check sum of {torn} in it is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        reason = f" ({culprit[1].rstrip('.')})" if culprit else ", or is damaged"
        raise CheckpointError(
            f"{path}: refused without running it, since the pickle holds more than tensors{reason}; "
            "export the state dict alone, best as safetensors"
        ) from None
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: truncated, damaged or no file of weights ({_one_line(error)}); save or copy it again"
        ) from None


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors, taken out of its wrapper where it has one."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), got {type(content).__name__}")
    foreign = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), but no tensors are {_few(foreign)}")
    return {str(name): value for name, value in content.items()}


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel and torch.compile put before every one of them."""
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _few(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _one_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0].partition('. This is')[0][:200]}"
        if str(error).strip()
        else type(error).__name__
    )
