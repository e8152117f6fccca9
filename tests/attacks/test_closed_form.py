"""On a linear model the strongest point of a ball is known: attacks must come close to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks import ATTACKS, make_ball
from attacks.losses import margin

DIMS = 40
COUNT = 12
OFFSET = 18.0  # keeps class 0 ahead everywhere, by less than the 36 at which cross-entropy loses its slope in float64
EPS = {"linf": 0.05, "l2": 0.3, "l1": 0.4}
WIDE = {"linf": 0.1, "l2": 0.6, "l1": 2.0}

SINGLE_STEP = ["fgsm", "mifgsm"]
ITERATED = [
    "pgd:steps=100,step_size=0.1,decay=0.1,decay_at=0.6+0.8,keep=best",
    "pgd:steps=100,step_size=0.1,decay=0.1,decay_at=0.6+0.8",
    "margin_pgd:steps=100",
    "apgd",
    "apgd:loss=dlr",
    "apgd_t",
]


def linear(classes: int, offset: float = OFFSET):
    """Linear model with a bias so large that class 0 wins everywhere: nothing is ever fooled, margins only shrink."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(DIMS, classes, dtype=torch.float64, generator=generator)
    bias = torch.zeros(classes, dtype=torch.float64)
    bias[0] = offset
    return (lambda x: x.flatten(1) @ weight + bias), weight


def largest_gain(norm: str, slope: Tensor, x: Tensor, eps: float) -> Tensor:
    """Largest <slope, move> over the ball around x cut by [0, 1], [B]; slope [d], x [B, d]."""
    room = torch.where(slope > 0, 1 - x, x)
    size = slope.abs()
    if norm == "linf":
        return (room.clamp(max=eps) * size).sum(1)
    if norm == "l1":  # the steepest pixels first, each as far as it can go
        order = size.argsort(descending=True)
        before = room[:, order].cumsum(1) - room[:, order]
        return ((eps - before).clamp(min=0).minimum(room[:, order]) * size[order]).sum(1)
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), 1e6, dtype=x.dtype)
    for _ in range(200):  # move = min(t |slope|, room) for the t at which it is eps long
        middle = (low + high) / 2
        long = (middle * size).minimum(room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, middle), torch.where(long, middle, high)
    return ((low * size).minimum(room) * size).sum(1)


def share_of_gain(text: str, norm: str, x: Tensor, classes: int, eps: float) -> Tensor:
    """What the attack gained, over the largest possible gain; [B]."""
    model, weight = linear(classes)
    y = torch.zeros(len(x), dtype=torch.long)
    x_adv = ATTACKS.parse(text)(model, x, y, make_ball(norm, eps))
    slopes = [weight[:, t] - weight[:, 0] for t in range(1, classes)]
    best = torch.stack([x @ slope - OFFSET + largest_gain(norm, slope, x, eps) for slope in slopes]).amax(0)
    clean = torch.stack([x @ slope - OFFSET for slope in slopes]).amax(0)
    return (margin(model(x_adv), y) - clean) / (best - clean)


def grey_images() -> Tensor:
    """Pixels so far from 0 and 1 that no ball reaches them."""
    noise = torch.rand(COUNT, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 0.5 + 0.05 * (noise - 0.5)


def contrasty_images() -> Tensor:
    """Pixels of which most are at or near 0 and 1, so that the range cuts the ball almost everywhere."""
    noise = torch.randn(COUNT, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (0.5 + 0.6 * noise).clamp(0, 1)


def cases(texts: list[str]) -> list[tuple[str, str]]:
    """Attacks with their norms, but for Auto-PGD in L1, which has a test of its own."""
    pairs = [(text, norm) for text in texts for norm in ATTACKS.parse(text).norms]
    return [(text, norm) for text, norm in pairs if not (text.startswith("apgd") and norm == "l1")]


@pytest.mark.parametrize("text, norm", cases(SINGLE_STEP + ITERATED))
def test_with_two_classes_inside_the_range_the_strongest_point_is_found(text, norm):
    share = share_of_gain(text, norm, grey_images(), classes=2, eps=EPS[norm])
    assert (share > 0.99).all() and (share < 1 + 1e-9).all()


@pytest.mark.parametrize("text, norm", [*cases(ITERATED), ("fgsm", "linf"), ("mifgsm", "linf")])
def test_with_two_classes_at_the_border_of_the_range_the_strongest_point_is_nearly_found(text, norm):
    share = share_of_gain(text, norm, contrasty_images(), classes=2, eps=WIDE[norm])
    assert (share > (0.999 if norm == "linf" else 0.97)).all() and (share < 1 + 1e-9).all()


@pytest.mark.parametrize("text", ["apgd", "apgd:loss=dlr", "apgd_t"])
def test_auto_pgd_in_l1_comes_near_the_strongest_point(text):
    # Its steps never get shorter than a tenth of eps, and move several pixels alike where one would be best: the
    # published rule stays short of the optimum of a linear model.
    inside = share_of_gain(text, "l1", grey_images(), classes=2, eps=EPS["l1"])
    border = share_of_gain(text, "l1", contrasty_images(), classes=2, eps=WIDE["l1"])
    assert (inside > 0.92).all() and border.median() > 0.98 and (border > 0.6).all()
    assert (inside < 1 + 1e-9).all() and (border < 1 + 1e-9).all()


@pytest.mark.parametrize("images", [grey_images, contrasty_images])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("text", ["fab", "fab:targets=9"])
def test_fab_finds_the_nearest_point_beyond_a_hyperplane(text, norm, images):
    model, weight = linear(classes=2, offset=0.0)
    x = images()
    logits = model(x)
    y = logits.argmax(1)
    slopes = torch.where(y[:, None] == 0, weight[:, 1] - weight[:, 0], weight[:, 0] - weight[:, 1])
    found = ATTACKS.parse(text).nearest(model, x, y, make_ball(norm, 0.1))
    assert (model(found.points).argmax(1) != y).all() and (found.points >= 0).all() and (found.points <= 1).all()
    for i in range(3):
        margin_left = (logits[i, y[i]] - logits[i, 1 - y[i]]).item()
        low, high = 0.0, 100.0  # the smallest radius at which the ball reaches the hyperplane
        for _ in range(30):
            middle = (low + high) / 2
            reached = largest_gain(norm, slopes[i], x[i : i + 1], middle).item() >= margin_left
            low, high = (low, middle) if reached else (middle, high)
        assert low * (1 - 1e-6) <= found.distances[i].item() <= low * 1.06


@pytest.mark.parametrize("text, norm", [("deepfool", "linf"), ("deepfool", "l2"), ("carlini_wagner:steps=300", "l2")])
def test_other_minimal_attacks_come_near_the_hyperplane_inside_the_range(text, norm):
    model, weight = linear(classes=2, offset=0.0)
    x = grey_images()
    logits = model(x)
    y = logits.argmax(1)
    gap = logits.topk(2, dim=1).values.diff(dim=1).abs().squeeze(1)
    dual = make_ball(norm, 0.1).dual_norm(weight[:, 1] - weight[:, 0], (0,))
    found = ATTACKS.parse(text).nearest(model, x, y, make_ball(norm, 0.1))
    assert (model(found.points).argmax(1) != y).all()
    ratio = found.distances / (gap / dual)
    assert (ratio >= 1 - 1e-9).all() and (ratio < 1.15).all(), ratio


@pytest.mark.parametrize("images", [grey_images, contrasty_images])
@pytest.mark.parametrize("text, norm", cases(["margin_pgd:steps=100"]))
def test_attacks_on_all_targets_find_the_worst_of_them(text, norm, images):
    share = share_of_gain(text, norm, images(), classes=5, eps=EPS[norm])
    assert (share > (0.999 if norm == "linf" else 0.97)).all() and (share < 1 + 1e-9).all()


@pytest.mark.parametrize("text, norm", cases(["pgd:loss=margin", "margin_pgd", "apgd:loss=margin", "apgd_t"]))
def test_examples_that_can_be_fooled_are_fooled(text, norm):
    model, weight = linear(classes=3, offset=0.0)
    x = contrasty_images()
    y = model(x).argmax(1)
    ball = make_ball(norm, EPS[norm])
    fooled = model(ATTACKS.parse(text)(model, x, y, ball)).argmax(1) != y
    gains = []
    for i in range(COUNT):
        slopes = [weight[:, t] - weight[:, y[i]] for t in range(3) if t != y[i]]
        gains.append(max((x[i] @ s + largest_gain(norm, s, x[i : i + 1], EPS[norm])).item() for s in slopes))
    clearly = torch.tensor(gains).abs() > 0.05
    assert torch.equal(fooled[clearly], torch.tensor(gains)[clearly] > 0) and 0 < fooled.sum() < COUNT
