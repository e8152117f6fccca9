"""What a verifier is, and their registry."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from attacks.registry import Registry
from attacks.threat import Ball
from certify.verdict import Verdict

VERIFIERS = Registry("verifier", "certify.verifiers")

LEAST = {"batch_size": 1, "batch": 1, "timeout": 0, "iterations": 0, "node_iterations": 0, "tighten_iterations": 0}
"""Least value of the hyper-parameters that verifiers share, by name."""


def check_fields(verifier: Any) -> None:
    """Raise ValueError for hyper-parameters that mean nothing, such as batches of 0 examples."""
    for field in dataclasses.fields(verifier):
        value = getattr(verifier, field.name)
        if field.name in LEAST and not value >= LEAST[field.name]:
            raise ValueError(
                f"{type(verifier).__name__}: {field.name} must be at least {LEAST[field.name]}, got {value}"
            )


class Verifier(Protocol):
    """A frozen dataclass of hyper-parameters that decides examples, without state between calls.

    Class facts:
        sound: a certified example has no adversarial point (`certify.precision` says what that means for rounding).
        complete: with enough time every example is decided.
        falsifies: it looks for adversarial points, too.
        norms: threat models that it accepts.
    """

    sound: ClassVar[bool]
    complete: ClassVar[bool]
    falsifies: ClassVar[bool]
    norms: ClassVar[tuple[str, ...]]

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball, *, index: Tensor | None = None
    ) -> list[Verdict]:
        """One verdict per example, in order.

        Args:
            model: takes pixels to logits `[B, K]`; evaluated in evaluation mode and left as it was.
            x: examples `[B, *shape]` in the pixel range, on the model's device and in its precision.
            y: labels `[B]`.
            index: numbers of the examples `[B]`, which key the noise of attacks; positions in the batch by default.

        Raises:
            ValueError: input outside the pixel range, labels outside the classes, a norm that is not supported.
            UnsupportedOp, CaptureError: a model without bound rules.
        """
        ...
