"""Signs that an attack fails for reasons other than robustness: masked gradients, noise, outputs that are no logits.

An accuracy under attack is an upper bound, and gradient-based attacks may miss what is there by far. Each check here
compares two things that must be in a known order if gradients can be trusted, or looks at the gradients themselves. A
flag is a reason to distrust an evaluation, not a proof that it is wrong; no flag is no proof that it is right.

Sources: Croce and Hein (2020), the flags of AutoAttack; Carlini et al. (2019), "On evaluating adversarial robustness";
Pintor et al. (2022), "Indicators of attack failure".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from attacks.attack import ATTACKS, Attack
from attacks.auto_pgd import start_on_border
from attacks.gradient import differentiate
from attacks.losses import LOSSES
from attacks.mode import attack_mode
from attacks.noise import normal, streams
from attacks.threat import Ball, make_ball
from certify.precision import exact_arithmetic
from certify.verdict import logits_of
from robust.files import encode, write_whole
from robust.report import ReportError

MASKING_FILE = "masking.json"

# In percentage points: how far two accuracies may differ that should agree, or stand in the wrong order.
AGREEMENT = 1.0
SQUARE_HELPS = 0.2

FORWARDS = 5
LOGIT_NOISE = 1e-4
PROBABILITY_ERROR = 1e-5
SMALL_NOISE = 1e-3

# Above this share of exactly zero gradients, or below this similarity of neighbouring ones, steps lead nowhere.
ZERO_SHARE = 0.0
SIMILARITY = 0.1

WHITE_BOX: dict[str, str] = {
    "fgsm": "fgsm",
    "random": "pgd:steps=0,restarts=100",
    "pgd": "pgd:steps=20",
    "cross_entropy": "apgd",
    # Targeted: untargeted ascent on a difference of logits may settle for the wrong one of two classes, which is no
    # sign of masking.
    "margin": "margin_pgd",
    "dlr": "apgd_t:targets=3",
    "restarts": "margin_pgd:restarts=3,seed=1",
    "square": "square:queries=1000",
}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: of the check. value: what was measured; None where it could not be.
        limit: beyond which the check raises its flag. flagged: whether it did.
        words: what was compared, and what a flag means.
    """

    name: str
    value: float | None
    limit: float
    flagged: bool
    words: str


@dataclass(frozen=True)
class Masking:
    """Outcome of all checks on some examples of one model, and the accuracies in percent that they rest on."""

    checks: tuple[Check, ...]
    accuracies: dict[str, float]
    norm: str
    eps: float
    examples: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the checks that raised a flag."""
        return tuple(check.name for check in self.checks if check.flagged)

    def save(self, folder: Path) -> None:
        """Write the record to `folder`, where the report of an evaluation finds it."""
        write_whole(folder / MASKING_FILE, json.dumps(json.loads(encode(asdict(self))), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Masking | None:
        """The record in `folder`, None where there is none; ReportError where the file is damaged."""
        path = folder / MASKING_FILE
        if not path.exists():
            return None
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**facts, "checks": tuple(Check(**check) for check in facts["checks"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ReportError(f"{path}: damaged ({type(error).__name__}: {error}); remove it") from None


def check_masking(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, batch_size: int = 100) -> Masking:
    """All checks on some examples; 200 to 500 are enough.

    Args:
        x, y: images in the ball's pixel range and their true classes, where the model is.
        ball: threat model with one eps.
    """
    if not len(x):
        raise ValueError("the checks for masked gradients need examples, got none")
    with attack_mode(model):
        clean = logits_of(model, x).argmax(1) == y
        attacks = {name: ATTACKS.parse(text) for name, text in WHITE_BOX.items() if name != "square" or x.dim() == 4}
        held = {name: _held(model, x, y, ball, attack, batch_size) for name, attack in attacks.items()}
        held["far"] = _held(model, x, y, _far(ball, x), ATTACKS.parse("apgd:loss=margin"), batch_size)
        accuracies = {"clean": _percent(clean), **{name: _percent(flags) for name, flags in held.items()}}
        found = [
            *_of_outputs(model, x[:batch_size], y[:batch_size]),
            *_of_gradients(model, x[:batch_size], y[:batch_size], ball),
            *_of_accuracies(accuracies, held, len(x)),
        ]
    return Masking(tuple(found), accuracies, ball.norm, float(ball.eps), len(x))


def _of_outputs(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[Check]:
    logits = [logits_of(model, x) for _ in range(FORWARDS)]
    unit = torch.stack([z / z.norm(dim=1, keepdim=True).clamp(min=1e-10) for z in logits])
    noise = (unit - unit[:1]).norm(dim=2).max().item()
    words = "largest difference of normalised logits between equal passes; a model with noise needs autoattack's `rand`"
    yield _above("randomised", noise, LOGIT_NOISE, words)

    z = logits[0]
    off = max((-z).max().item(), (z - 1).max().item(), (z.sum(1) - 1).abs().max().item())
    words = (
        "distance of the outputs from being probabilities; attacks need logits, and lose their gradient behind softmax"
    )
    yield _below("probabilities", off, PROBABILITY_ERROR, words)

    words = "tensors kept for a backward pass inside the model's forward; it optimises while it is tested"
    yield _above("optimises at test time", float(_kept_tensors(model, x)), 0.0, words)

    words = "classes; with fewer than four the DLR losses are not the published ones"
    yield _below("few classes", float(z.shape[1]), 4.0, words)


def _kept_tensors(model: nn.Module, x: Tensor) -> int:
    """Tensors that autograd keeps in a forward pass without gradients: more than none only if the model asks for it."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return kept


def _of_gradients(model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> Iterator[Check]:
    start = start_on_border(x, ball, streams(0, range(len(x))))
    for loss in ("cross_entropy", "dlr"):
        gradient, _, _ = differentiate(model, LOSSES[loss], start, (y,))
        zero = (gradient.flatten(1).abs().amax(1) == 0).double().mean().item()
        words = f"percent of examples whose {loss} has a gradient of exactly zero at a random start"
        yield _above(f"zero gradients of {loss}", 100 * zero, 100 * ZERO_SHARE, words)
    here, _, _ = differentiate(model, LOSSES["margin"], x, (y,))
    noisy = (x + SMALL_NOISE * normal(x.shape, x, streams(1, range(len(x))))).clamp(*ball.pixel_range or (None, None))
    there, _, _ = differentiate(model, LOSSES["margin"], noisy, (y,))
    similarity = cosine_similarity(here.flatten(1), there.flatten(1)).median().item()
    words = "median cosine between the margin's gradients at an image and beside it; a shattered gradient leads nowhere"
    yield _below("unlike gradients", similarity, SIMILARITY, words)


def _of_accuracies(accuracies: dict[str, float], held: dict[str, Tensor], examples: int) -> Iterator[Check]:
    one = 100 / examples
    survivors = held["cross_entropy"] & held["margin"] & held["dlr"] & held["restarts"]
    white = _percent(survivors)
    losses = [accuracies[name] for name in ("cross_entropy", "margin", "dlr")]
    words = "points between the weakest and the strongest attack of cross-entropy, margin and DLR; saturated logits"
    yield _above("losses disagree", max(losses) - min(losses), AGREEMENT + one, words)

    words = "points by which PGD with 20 steps on cross-entropy stays behind the white-box attacks together"
    yield _above("cross-entropy is too weak", accuracies["pgd"] - white, 5 * AGREEMENT + one, words)

    words = "points that three other starts on the margin gain over one; the search has not converged"
    gained = accuracies["margin"] - _percent(held["margin"] & held["restarts"])
    yield _above("more restarts help", gained, AGREEMENT + one, words)

    words = "points by which one step beats twenty"
    yield _above("one step beats many", accuracies["pgd"] - accuracies["fgsm"], 0.0, words)

    if "square" in held:
        words = "points that Square, which needs no gradients, gains over the white-box attacks together"
        yield _above("Square helps", white - _percent(held["square"] & survivors), SQUARE_HELPS, words)

    words = "points by which 100 random points of the ball beat the white-box attacks together"
    yield _above("random points beat attacks", white - accuracies["random"], 0.0, words)

    words = "percent still right in a ball that reaches a grey image; every image can be changed there"
    yield _above("robust at a large radius", accuracies["far"], AGREEMENT + one, words)


def _held(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, batch_size: int) -> Tensor:
    """Which examples stay right under the attack, bool [B], by a fresh pass over points inside the ball."""
    flags = []
    for rows in torch.arange(len(x), device=x.device).split(batch_size):
        here = ball.select(rows)
        with exact_arithmetic():
            points = here.project(attack(model, x[rows], y[rows], here, index=rows.cpu()), x[rows])
        flags.append(logits_of(model, points).argmax(1) == y[rows])
    return torch.cat(flags) & (logits_of(model, x).argmax(1) == y)


def _far(ball: Ball, x: Tensor) -> Ball:
    """A ball that holds the grey image, from every image."""
    low, high = ball.pixel_range or (0.0, 1.0)
    grey = ball.length(torch.full_like(x[:1], (high - low) / 2)).item()
    return make_ball(ball.norm, grey, ball.pixel_range)


def _above(name: str, value: float, limit: float, words: str) -> Check:
    return Check(name, value if math.isfinite(value) else None, limit, not value <= limit, words)


def _below(name: str, value: float, limit: float, words: str) -> Check:
    return Check(name, value if math.isfinite(value) else None, limit, not value >= limit, words)


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()
