"""Bounds and verdicts on published networks, against stored results of another implementation.

The reference bounds were computed in float32 by auto_LiRPA (see the README beside them). Tolerances are relative to
the size of the reference or of the clean margin, whichever is greater: a bound near zero is a difference of numbers of
the size of the margin, and owes its digits to them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from attacks.threat import LinfBall
from certify.bounds.bound import bound
from certify.bounds.crown import (
    Boxes,
    Rows,
    bound_rows,
    crown,
    intermediate_boxes,
    loose_mask,
    relaxed_inputs,
)
from certify.bounds.interval import interval_walk
from certify.graph import Snapshot
from certify.op import Box
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from certify.verifiers.cascade import Cascade
from tests.golden.networks import NAMES, Golden, load, reference_folder

pytestmark = pytest.mark.skipif(
    not (reference_folder() / "golden").is_dir(),
    reason="the reference networks are not here; set ROBUST_REFERENCE to their folder",
)

FAST_IMAGES = {"cnn_a_adv": 2, "resnet2b": 0, "cifar_conv_small_pgd": 3, "mnist_6_100_nat": 8}
"""Images on which alpha-CROWN, with all bounds optimised, is run in the default suite; all of them when slow."""

ALPHA_CASES = [(name, count) for name, count in FAST_IMAGES.items() if count]
ALPHA_CASES += [pytest.param(name, 100, marks=pytest.mark.slow) for name in NAMES]


@lru_cache
def golden(name: str) -> tuple[Golden, Snapshot]:
    """Network, images and captured graph."""
    found = load(name)
    return found, capture(found.model, found.x[:1]).snapshot().without_gradient()


def lower_bounds(name: str, which: Tensor, method: str, **options: object) -> Tensor:
    """Our margins `[n, 9]` of the images `which`."""
    found, snapshot = golden(name)
    x, y = found.x[which], found.y[which]
    return bound(snapshot, x, LinfBall(found.eps[which]), margin_spec(y, 10), method, **options).lb.detach()


def clean_size(name: str, which: Tensor) -> Tensor:
    """Largest logit of each image, `[n, 1]`: the size of what margins are differences of."""
    return golden(name)[0].logits[which].abs().amax(1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
def test_networks_reproduce_the_stored_logits(name: str) -> None:
    found, snapshot = golden(name)
    for evaluate in (found.model, snapshot):
        with torch.no_grad():
            torch.testing.assert_close(evaluate(found.x), found.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_stay_below_the_smallest_margins_that_attacks_found(name: str) -> None:
    found, _ = golden(name)
    which = torch.arange(min(len(found.x), 6))
    attacked = [found.samples[i]["alpha_beta_crown"].get("attack_margin") for i in which.tolist()]
    smallest = lower_bounds(name, which, "crown").amin(1)
    assert all(margin is None or low <= margin + 1e-4 for low, margin in zip(smallest.tolist(), attacked, strict=True))


@pytest.mark.parametrize(("method", "stored"), [("ibp", "IBP"), ("crown_ibp", "CROWN-IBP"), ("crown", "CROWN")])
@pytest.mark.parametrize("name", NAMES)
def test_margins_equal_the_stored_ones(name: str, method: str, stored: str) -> None:
    which, reference = golden(name)[0].stored(stored)
    size = torch.maximum(reference.abs(), clean_size(name, which))
    gap = (lower_bounds(name, which, method) - reference) / size
    assert gap.min() >= -1e-4, "looser than the reference"
    # CROWN is tighter where intervals on tightened boxes improve a hidden bound: behind the sums of the residual net.
    assert gap.max() <= (2e-3 if (name, method) == ("resnet2b", "crown") else 1e-4)


def test_residual_margins_differ_by_the_intersection_with_intervals_alone() -> None:
    # The stored bounds take CROWN's interval of every unstable neuron as it is; ours is cut with the interval rule's.
    found, snapshot = golden("resnet2b")
    which, reference = (t[3:5] for t in found.stored("CROWN"))
    margins = snapshot.with_spec(margin_spec(found.y[which], 10))
    region = Region.around(found.x[which], LinfBall(found.eps[which]))
    with torch.no_grad():
        ours, _ = crown(margins, region)
        plain, _ = crown(margins, region, _boxes_without_intersection(margins, region))
    assert ((plain - reference).abs() / clean_size("resnet2b", which)).max() <= 1e-4
    assert ((ours - reference) / clean_size("resnet2b", which)).min() >= -1e-4
    assert (ours - plain).max() > 1e-3


def _boxes_without_intersection(snapshot: Snapshot, region: Region) -> Boxes:
    """Hidden bounds by CROWN where intervals leave a neuron unstable, by intervals elsewhere."""
    intervals = interval_walk(snapshot, region.interval())[1]
    boxes: Boxes = {}
    first = relaxed_inputs(snapshot)[0]
    for place in relaxed_inputs(snapshot):
        box = Box(intervals[place].lb, intervals[place].ub)
        mask = loose_mask(snapshot, place, box)
        if place != first and mask.any():
            rows = Rows.of(mask)
            hollow = Box(torch.where(mask, -torch.inf, box.lb), torch.where(mask, torch.inf, box.ub))
            box = rows.write(hollow, bound_rows(snapshot, place, rows, boxes, region))
        boxes[place] = box
    return boxes


@pytest.mark.parametrize(("name", "images"), ALPHA_CASES)
def test_alpha_crown_is_at_least_crown_everywhere_and_the_stored_alpha_crown_on_average(name: str, images: int) -> None:
    which, reference = golden(name)[0].stored("alpha-CROWN-20")
    which, reference = which[:images], reference[:images]
    ours = torch.cat([lower_bounds(name, part, "alpha_crown", iterations=20) for part in which.split(4)])
    crown = lower_bounds(name, which, "crown")
    size = torch.maximum(reference.abs(), clean_size(name, which))
    assert ((ours - crown) / size).min() >= -1e-6
    assert ((ours - reference) / size).mean() >= -1e-3


@pytest.mark.parametrize("name", NAMES)
def test_alpha_crown_with_fixed_hidden_bounds_is_no_looser_than_the_stored_one_on_average(name: str) -> None:
    which, reference = golden(name)[0].stored("alpha-CROWN-20-final")
    which, reference = which[:2], reference[:2]
    ours = lower_bounds(name, which, "alpha_crown", iterations=20, optimise_intermediate=False)
    size = torch.maximum(reference.abs(), clean_size(name, which))
    assert ((ours - lower_bounds(name, which, "crown")) / size).min() >= -1e-6
    assert ((ours - reference) / size).mean() >= -1e-3


@pytest.mark.parametrize("name", NAMES)
def test_hidden_bounds_agree_with_the_stored_ones(name: str) -> None:
    found, snapshot = golden(name)
    stored = np.load(reference_folder() / "golden" / name / "interm.npz")
    region = Region.around(found.x[:2], LinfBall(found.eps[:2]))
    ours = {"IBP": interval_walk(snapshot, region.interval())[1], "CROWN": intermediate_boxes(snapshot, region)}
    for example in range(2):
        for method, boxes in ours.items():
            keys = [k for k in stored.files if k.startswith(f"s{example}.{method}.") and k.endswith(".lower")]
            layers = [k for k in keys if "logits" not in k]
            assert len(layers) == len(relaxed_inputs(snapshot))
            for key, place in zip(layers, relaxed_inputs(snapshot), strict=True):
                reference = Box(*(torch.from_numpy(stored[key.replace("lower", end)]) for end in ("lower", "upper")))
                _agree(Box(boxes[place].lb[example], boxes[place].ub[example]), reference, method)


def _agree(ours: Box, reference: Box, method: str) -> None:
    lb, ub = (end.flatten() for end in reference)
    tolerance = 1e-4 * torch.maximum(lb.abs(), ub.abs()).max()
    found_lb, found_ub = (end.flatten() for end in ours)
    # Neurons that intervals show to be stable get no backward pass: their bounds may be looser, not their sign.
    compared = torch.ones_like(lb, dtype=torch.bool) if method == "IBP" else (found_lb < 0) & (found_ub > 0)
    assert (found_lb >= lb - tolerance)[compared].all() and (found_ub <= ub + tolerance)[compared].all()
    # Intervals on tightened boxes may improve few of the others' bounds.
    equal = ((found_lb <= lb + tolerance) & (found_ub >= ub - tolerance))[compared]
    assert equal.double().mean() >= (1.0 if method == "IBP" else 0.98)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n != "resnet2b"] + [pytest.param("resnet2b", marks=pytest.mark.slow)]
)
def test_cascade_verdicts_never_contradict_the_stored_ones(name: str) -> None:
    found, _ = golden(name)
    verdicts = Cascade(last=None, alpha=None)(found.model, found.x, found.y, LinfBall(found.eps))
    contradictions = {("certified", "falsified"), ("falsified", "verified")}
    for verdict, sample in zip(verdicts, found.samples, strict=True):
        assert verdict.status != "misclassified"
        assert (verdict.status, sample["alpha_beta_crown"]["verdict"]) not in contradictions
    assert any(v.status == "certified" for v in verdicts) and any(v.status == "falsified" for v in verdicts)
