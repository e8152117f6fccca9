"""Registry of regularisers: terms on top of any objective."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from attacks.registry import Registry
from robust.views import Views

REGULARIZERS = Registry("regularizer", "robust.regularizers")


class Regularizer(Protocol):
    """Frozen dataclass; called after the objective, with the same views."""

    needs_boxes: bool
    """Whether `views.bounded` is read; the trainer then has every interval propagation note its boxes."""

    def __call__(self, views: Views) -> dict[str, Tensor]:
        """Named scalars that are added to the loss."""
        ...
