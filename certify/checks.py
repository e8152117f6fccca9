"""What a verifier asks of a problem before it begins: one line of a ValueError for what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attacks.threat import Ball
from certify.precision import ALLOWANCES
from certify.region import check_pixels
from certify.verdict import logits_of


def check_problem(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, norms: Sequence[str]) -> None:
    """Raise ValueError for a problem that makes no sense; one line that says what was expected."""
    for name, value, kind, words in (
        ("model", model, nn.Module, "an nn.Module"),
        ("x", x, Tensor, "a tensor of images [B, ...]"),
        ("y", y, Tensor, "a tensor of labels [B]"),
        ("ball", ball, Ball, "a threat model such as LinfBall(eps=8 / 255)"),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {words}, got a {type(value).__name__}")
    if ball.norm not in norms:
        raise ValueError(f"the threat model is an {ball.norm} ball; this verifier knows {', '.join(norms)}")
    if x.dtype not in ALLOWANCES:
        raise ValueError(f"x is {x.dtype}; verdicts need float32 or float64 images (and a model of that precision)")
    if x.dim() < 2:
        raise ValueError(f"x must be a batch [B, ...], got shape {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected one label per example: x has shape {tuple(x.shape)}, y has {tuple(y.shape)}")
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y is {y.dtype}; labels are numbers of classes in int64, y.long()")
    places = {x.device, y.device, next(model.parameters(), x).device}
    if len(places) > 1:
        raise ValueError(f"x, y and the model must be on one device, got {', '.join(sorted(map(str, places)))}")
    ball.eps_of(x)  # as many radii as examples, or one
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {x.dtype}
    if others:
        raise ValueError(f"x is {x.dtype}, the model has parameters of {others.pop()}; convert one of them")
    check_pixels(x, ball)


def checked_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The model's logits `[B, K]`; ValueError where it gives none, and for labels that are not of its classes."""
    try:
        logits = logits_of(model, x)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"the model cannot take images of shape {tuple(x.shape)}: {error}") from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return one tensor of logits [B, K], got a {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[0] != len(y) or logits.shape[1] < 2:
        raise ValueError(f"the model must return logits [B, K] with K >= 2, got shape {tuple(logits.shape)}")
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(f"labels from {int(y.min())} to {int(y.max())}, but the model has {logits.shape[1]} classes")
    return logits
