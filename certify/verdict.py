"""What a verifier says about one example. A verdict that its evidence does not support cannot be built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.precision import Precision, exact_arithmetic

Status = Literal["certified", "falsified", "unknown", "misclassified"]
STATUSES = ("certified", "falsified", "unknown", "misclassified")

_CHECKED = object()


class SoundnessError(RuntimeError):
    """A claim that its evidence does not support: a fault of the suite or of the method that made the claim."""


@dataclass(frozen=True)
class Verdict:
    """Outcome for one example.

    Attributes:
        status: "certified": no point of the ball changes the prediction. "falsified": `witness` does. "misclassified":
            the clean prediction is wrong already. "unknown": none of these was shown.
        margin_lb: proven lower bound of the smallest margin over the ball; -inf where no bound was computed. Positive
            where certified.
        method: what decided, such as "crown", or "cascade/crown" for a stage of a cascade.
        seconds: time spent on this example; a batch's time is shared equally among its examples.
        witness: a point of the ball `[*shape]` that the model misclassifies; only where falsified.
        precision: "float64" where float32 did not suffice for at least one target.
        domains: subproblems that branch and bound bounded for this example; 0 for methods that do not branch.

    Raises:
        SoundnessError: for a certified verdict without a positive finite margin, and for a falsified one that was not
            made by `falsified`, which checks its witness.
    """

    status: Status
    margin_lb: float
    method: str
    seconds: float
    witness: Tensor | None = None
    precision: Precision = "float32"
    domains: int = 0
    checked: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"no status {self.status!r}; known: {', '.join(STATUSES)}")
        # Positive evidence: a comparison with nan is False, so "not below zero" would turn an overflow into a proof.
        if self.status == "certified" and not (self.margin_lb > 0 and math.isfinite(self.margin_lb)):
            raise SoundnessError(f"{self.method}: certified needs a positive finite margin, got {self.margin_lb}")
        if self.status == "falsified" and (self.witness is None or self.checked is not _CHECKED):
            raise SoundnessError(f"{self.method}: a falsified verdict is made by certify.falsified, from a witness")
        if self.status != "falsified" and self.witness is not None:
            raise SoundnessError(f"{self.method}: only a falsified verdict has a witness, this one is {self.status}")


def falsified(
    model: nn.Module,
    witness: Tensor,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    method: str,
    seconds: float,
    margin_lb: float = -math.inf,
    domains: int = 0,
) -> Verdict:
    """The falsified verdict of one example, after `check_witness`; arguments as there."""
    check_witness(model, witness, x, y, ball)
    point = witness.detach().clone()
    return Verdict("falsified", margin_lb, method, seconds, point, domains=domains, checked=_CHECKED)


def check_witness(model: nn.Module, witness: Tensor, x: Tensor, y: Tensor, ball: Ball) -> None:
    """Raise SoundnessError unless `witness` lies in the ball and the model, evaluated on it alone, misclassifies it.

    Args:
        witness, x: one example each, `[*shape]`, of the same dtype.
        y: its label, a scalar.
        ball: threat model of this example (one eps).
    """
    if witness.shape != x.shape or witness.dtype != x.dtype:
        raise SoundnessError(
            f"a witness has the shape and dtype of its example, {tuple(x.shape)} {x.dtype}; "
            f"got {tuple(witness.shape)} {witness.dtype}"
        )
    if not bool(ball.contains(witness.unsqueeze(0), x.unsqueeze(0))):
        raise SoundnessError(
            f"the witness lies outside the {ball.norm} ball: largest pixel move "
            f"{(witness.double() - x.double()).abs().max():.9g}, eps {ball.eps}, pixel range {ball.pixel_range}"
        )
    logits = logits_of(model, witness.unsqueeze(0))[0]
    if not bool(torch.isfinite(logits).all()):
        raise SoundnessError(f"the model's logits on the witness are not finite: {logits.tolist()}")
    if int(logits.argmax()) == int(y):
        raise SoundnessError(f"the model classifies the witness as {int(y)}, which is right: logits {logits.tolist()}")


def refutes(model: nn.Module, point: Tensor, x: Tensor, y: Tensor, ball: Ball) -> bool:
    """Whether `point` passes `check_witness`: an attack may propose points that do not."""
    try:
        check_witness(model, point, x, y, ball)
    except SoundnessError:
        return False
    return True


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own logits `[B, K]` in evaluation mode and full precision, without gradient."""
    with torch.no_grad(), evaluation(model), exact_arithmetic():
        return model(x)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context; every module's own flag comes back, also after an exception."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
