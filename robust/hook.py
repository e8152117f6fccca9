"""Registry of hooks: things that happen at moments of a training run."""

from __future__ import annotations

from typing import Protocol

from attacks.registry import Registry
from robust.active import Active, RunFacts

HOOKS = Registry("hook", "robust.hooks")


class Hook(Protocol):
    """Frozen dataclass of hyper-parameters."""

    def start(self, run: RunFacts) -> Active:
        """The hook at work in a new run."""
        ...
