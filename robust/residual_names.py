"""Names of residual networks' weights in the code that most repositories of adversarial training share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from robust.layout import stages_of
from robust.models.preact_resnet import PreActBlock
from robust.models.resnet import BasicBlock

Names = dict[str, str]


def post_activation(names: Sequence[str], model: nn.Sequential) -> Names | None:
    """conv1, bn1, layerS.B.PART, linear -> ResNet-18's names here."""
    places = stages_of(model, BasicBlock)
    if places is None:
        return None
    tops = {"conv1": 1, "bn1": 2, "linear": len(model) - 1}
    return _renamed(names, tops, r"layer(\d)\.(\d+)", lambda s, b: places[2 * (s - 1) + b], {})


def pre_activation(names: Sequence[str], model: nn.Sequential) -> Names | None:
    """conv1, layerS.B.PART, bn, linear -> PreActResNet-18's names here."""
    places = stages_of(model, PreActBlock)
    if places is None or len(places) != 8:
        return None
    tops = {"conv1": 1, "bn": places[-1] + 1, "linear": len(model) - 1}
    shortcut = {"shortcut.0.": "shortcut."}
    return _renamed(names, tops, r"layer(\d)\.(\d+)", lambda s, b: places[2 * (s - 1) + b], shortcut)


def wide(names: Sequence[str], model: nn.Sequential) -> Names | None:
    """conv1, blockS.layer.B.PART, bn1, fc -> the names of a WideResNet here."""
    places = stages_of(model, PreActBlock)
    if places is None:
        return None
    tops, depth = {"conv1": 1, "bn1": places[-1] + 1, "fc": len(model) - 1}, len(places) // 3
    shortcut = {"convShortcut.": "shortcut."}
    return _renamed(names, tops, r"block(\d)\.layer\.(\d+)", lambda s, b: places[depth * (s - 1) + b], shortcut)


def _renamed(
    names: Sequence[str], tops: dict[str, int], block: str, place: Callable[[int, int], int], parts: dict[str, str]
) -> Names | None:
    """New names; None where one is neither of a top layer nor of a block that the model has."""
    renamed = {}
    for name in names:
        top, _, rest = name.partition(".")
        found = re.match(block + r"\.", name)
        if top in tops:
            renamed[name] = f"{tops[top]}.{rest}"
            continue
        if found is None:
            return None
        rest = name[found.end() :]
        for old, new in parts.items():
            rest = rest.replace(old, new)
        try:
            renamed[name] = f"{place(int(found[1]), int(found[2]))}.{rest}"
        except IndexError:
            return None
    return renamed
