"""Registry of layouts: how the weights of other projects' checkpoints are named, and what their networks are fed.

A layout renames; it runs no code of the checkpoint and knows nothing of its file. Names follow the projects' public
code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from attacks.registry import Registry
from robust.normalize import Normalize
from robust.tensor_file import CheckpointError

LAYOUTS = Registry("layout", "robust.layouts")

COUNTER = "num_batches_tracked"
"""What BatchNorm counts for an average that no evaluation uses; old files lack it."""


class Layout(Protocol):
    """Frozen dataclass.

    Attributes:
        normalizes: False where the project's networks take pixels in [0, 1] as they are; the model's first layer then
            does nothing. True where images are normalised, by the file's own numbers or by those of the data set.
    """

    normalizes: ClassVar[bool]

    def names(self, tensors: Mapping[str, Tensor], model: nn.Sequential) -> dict[str, str] | None:
        """The model's name for each tensor's name, without those that no pass uses; None where the names are not of
        this layout or the model is of another family."""
        ...


def own_names(tensors: Mapping[str, Tensor], model: nn.Module, layout: str | None, where: str) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint under the model's own names, ready for its `load_state_dict`.

    Args:
        layout: name of the tensors' layout; None to find it by the names. The suite's own is always recognised.
        where: the file, for messages.

    Raises:
        CheckpointError: the layout that was asked for does not fit, or several fit that feed the network differently.
    """
    expected = model.state_dict()
    if layout is None and set(tensors) == set(expected):
        return dict(tensors)
    if not isinstance(model, nn.Sequential):
        return dict(tensors)
    names = LAYOUTS.names() if layout is None else [layout]
    parsed = {name: LAYOUTS.parse(name) for name in names}
    fitting = {name: found for name, one in parsed.items() if (found := one.names(tensors, model)) is not None}
    if not fitting:
        if layout is not None:
            raise CheckpointError(f"{where}: its names are not of the layout {layout}, or the model is another")
        return dict(tensors)
    if len({parsed[name].normalizes for name in fitting}) > 1:
        raise CheckpointError(
            f"{where}: the names do not tell whether the network takes normalised images; say whose it is: "
            + " or ".join(f"--layout {name}" for name in fitting)
        )
    chosen, renamed = next(iter(fitting.items()))
    return _complete({new: tensors[old] for old, new in renamed.items()}, model, parsed[chosen].normalizes)


def _complete(tensors: dict[str, Tensor], model: nn.Sequential, normalizes: bool) -> dict[str, Tensor]:
    """With the normalisation, and with counters that old files lack."""
    expected = model.state_dict()
    for name, value in expected.items():
        if name in tensors and name in ("0.mean", "0.std"):
            tensors[name] = tensors[name].reshape(value.shape)
        elif name not in tensors and name in ("0.mean", "0.std"):
            neutral = torch.zeros_like(value) if name == "0.mean" else torch.ones_like(value)
            tensors[name] = value if normalizes else neutral
        elif name not in tensors and name.endswith(COUNTER):
            tensors[name] = value
    return tensors


def numbered(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[int, list[str]] | None:
    """Parts of each layer by its number, from names `PREFIX NUMBER . PART`; None where one is named otherwise."""
    layers: dict[int, list[str]] = {}
    for name in tensors:
        found = re.fullmatch(re.escape(prefix) + r"(\d+)\.(\w+)", name)
        if found is None:
            return None
        layers.setdefault(int(found[1]), []).append(found[2])
    return layers


def in_order(tensors: Mapping[str, Tensor], model: nn.Sequential, prefix: str = "") -> dict[str, str] | None:
    """Names for plain sequences of layers, whose weights come in the order in which they act; None otherwise.

    The file's sequence has activations and flattening as layers without weights; those with weights follow each other
    as the model's do.
    """
    theirs = numbered(tensors, prefix)
    ours = numbered({n: t for n, t in model.state_dict().items() if not n.startswith("0.")})
    if theirs is None or ours is None or len(theirs) != len(ours):
        return None
    pairs = zip(sorted(theirs), sorted(ours), strict=True)
    return {f"{prefix}{old}.{part}": f"{new}.{part}" for old, new in pairs for part in theirs[old]}


def stages_of(model: nn.Sequential, block: type[nn.Module]) -> list[int] | None:
    """Places of the residual blocks of a model of the suite; None where it is no network of normalisation, stem and
    such blocks."""
    places = [place for place, layer in enumerate(model) if type(layer) is block]
    return places if places and isinstance(model[0], Normalize) else None
