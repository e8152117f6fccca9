"""The views of a batch: which BatchNorm statistics they use, how gradients flow, and when running statistics move."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.methods.friendly_pgd import FriendlyPGD
from attacks.threat import LinfBall
from certify.graph import Snapshot
from certify.tracing import capture
from robust.objective import OBJECTIVES, certified_cross_entropy
from robust.views import Views, split_last
from tests.robust.objectives import oracle

EPS = 0.05


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=3)


def buffers(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.named_buffers()}


def test_clean_logits_are_the_models_own_in_training_mode(model):
    x, y = oracle.images()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(oracle.views_of(model, x, y, EPS).clean, twin(x))
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value)


def test_the_snapshot_normalises_every_other_point_with_the_clean_batchs_statistics(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    other = oracle.images(batch=9, seed=5)[0]
    stats = oracle.clean_pass(model, x)[1]
    torch.testing.assert_close(views.snapshot(other), oracle.logits(model, other, stats))
    torch.testing.assert_close(views.frozen(other), oracle.logits(model, other, stats))


def test_interval_margins_and_their_gradient_agree_with_the_dense_oracle_through_the_statistics(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    found = views.margins(views.box)
    _, stats = oracle.clean_pass(model, x)
    expected = oracle.margin_bounds(oracle.segments(model, stats), *oracle.pixel_box(x, EPS), y)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    oracle.assert_same_gradients(
        oracle.gradients((found * weights).sum(), model), oracle.gradients((expected * weights).sum(), model)
    )


def test_gradients_through_the_statistics_are_not_negligible():
    # Guards the test above: with detached statistics the same oracle gives a clearly different gradient.
    model = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    _, stats = oracle.clean_pass(model, x)
    detached = {place: (mean.detach(), var.detach()) for place, (mean, var) in stats.items()}
    values = [
        oracle.loss_of_margins(oracle.margin_bounds(oracle.segments(model, s), *oracle.pixel_box(x, EPS), y), y).mean()
        for s in (stats, detached)
    ]
    first, second = (torch.cat([g.flatten() for g in oracle.gradients(value, model)]) for value in values)
    assert (first - second).norm() > 0.05 * second.norm()


def test_clean_and_bound_losses_share_one_backward_pass(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    found = F.cross_entropy(views.clean, y) + certified_cross_entropy(views.margins(views.box), y).mean()
    z, stats = oracle.clean_pass(model, x)
    bounds = oracle.margin_bounds(oracle.segments(model, stats), *oracle.pixel_box(x, EPS), y)
    expected = oracle.loss_of_logits(z, y).mean() + oracle.loss_of_margins(bounds, y).mean()
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(expected, model))


def test_margins_beside_clean_are_the_margins_and_the_clean_logits_with_the_same_gradients(model):
    x, y = oracle.images()
    apart, beside = oracle.views_of(model, x, y, EPS), oracle.views_of(model, x, y, EPS)
    apart.note_boxes = beside.note_boxes = True
    pairs = [(v.margins_beside_clean() if v is beside else v.margins(v.box), v.clean) for v in (beside, apart)]
    torch.testing.assert_close(*pairs)
    found, expected = (oracle.gradients(low.sin().sum() + z.cos().sum(), model) for low, z in pairs)
    oracle.assert_same_gradients(found, expected)
    (noted,), (wanted,) = beside.bounded, apart.bounded
    assert noted.start is beside.box and noted.boxes.keys() == wanted.boxes.keys()
    for place, box in wanted.boxes.items():
        torch.testing.assert_close(noted.boxes[place].lb, box.lb)
        torch.testing.assert_close(noted.boxes[place].ub, box.ub)


def test_the_clean_pass_that_goes_beside_the_margins_is_made_once():
    x, y = oracle.images()
    views = oracle.views_of(oracle.small_net(), x, y, EPS)
    views.margins_beside_clean()
    clean = views.clean
    views.margins_beside_clean()
    assert views.clean is clean


def test_the_box_is_cut_by_the_pixel_range_and_collapses_at_radius_zero():
    x, y = oracle.images()
    model = oracle.small_net()
    box = oracle.views_of(model, x, y, EPS).box
    low, high = oracle.pixel_box(x, EPS)
    torch.testing.assert_close(box.lb, low)
    torch.testing.assert_close(box.ub, high)
    assert (box.radius[x == 0] < 0.6 * EPS).all() and (x == 0).any() and (x == 1).any()
    point = oracle.views_of(model, x, y, 0.0).box
    assert torch.equal(point.center, x) and not point.radius.any()


def test_every_example_may_have_its_own_radius():
    x, y = oracle.images()
    eps = torch.linspace(0, 0.1, len(x), dtype=torch.float64)
    model = oracle.small_net()
    views = Views(capture(model, x), x, y, LinfBall(eps))
    for b in range(len(x)):
        alone = oracle.views_of(model, x[b : b + 1], y[b : b + 1], float(eps[b]))
        torch.testing.assert_close(views.margins(views.box)[b : b + 1], alone.margins(alone.box))


def fields_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(OBJECTIVES[name])}


def of_one_batch(name: str, **changes: object) -> object:
    """The objective in the form in which every pass has the clean batch's statistics."""
    clean = {"statistics": "batch", "batch_norm": "clean"}
    if name == "fat":
        still = FriendlyPGD(steps=2, start="clean", noise=0.0, mode="keep")
        return OBJECTIVES[name](objective=OBJECTIVES["pgd"](attack=still, **clean))
    own = {
        field: value for field, value in clean.items() if field in fields_of(name) and "batch_norm" in fields_of(name)
    }
    return oracle.objective(name, **own, **changes)


# Losses of l2-certified networks need an l2 ball and a network of their own: test_l2_objectives.py.
# DVERGE trains an ensemble: test_dverge.py.
NAMES = [n for n in OBJECTIVES.names() if getattr(OBJECTIVES[n], "norms", ("linf",)) != ("l2",) and n != "dverge"]


@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_move_once_per_step_and_by_the_clean_pass_alone(name):
    model = oracle.small_net(batch_norm=True, hidden=3)
    x, y = oracle.images()
    twin = copy.deepcopy(model)
    twin(x)
    views = oracle.views_of(model, x, y, EPS, note_boxes=True)
    oracle.loss_of(oracle.begun(of_one_batch(name), model)(views)).backward()
    for key, value in twin.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[key], value, msg=f"{name} moved {key} differently")


def test_running_view_holds_the_running_statistics_after_the_clean_pass_whatever_is_asked_first():
    x, y = oracle.images()
    found = []
    for clean_first in (True, False):
        model = oracle.small_net(batch_norm=True)
        views = oracle.views_of(model, x, y, EPS)
        if clean_first:
            assert views.clean.shape == (len(x), oracle.CLASSES)
        found.append(views.running(x))
        assert not found[-1].requires_grad
        views.snapshot(x)
        torch.testing.assert_close(found[-1], oracle.logits(model, x))
    assert torch.equal(*found)


OF_THE_BATCH = {"exp_ibp", "taps", "staps", "sovr", "srat", "lbgat", "mtard", "beta", "lat"}
"""They multiply or weigh batch means, compare examples, have a teacher in training mode, or draw noise that depends on
the size of the batch, so a part of a batch has terms of its own."""

PER_EXAMPLE = [name for name in NAMES if name not in OF_THE_BATCH]


def without_noise(name: str) -> object:
    changes = {"attack": oracle.Fixed(), "noise": 0.0}
    return of_one_batch(name, **{key: value for key, value in changes.items() if key in fields_of(name)})


@pytest.mark.parametrize("name", PER_EXAMPLE)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_parts_of_a_batch_with_the_whole_batchs_statistics_give_the_whole_batchs_terms(name, batch_norm):
    x, y = oracle.images()
    schedule = {"eps_fraction": 0.5, "ramp": 0.5}
    model = oracle.small_net(batch_norm)
    objective = oracle.begun(without_noise(name), model)
    whole = objective(oracle.views_of(model, x, y, EPS, **schedule))
    model = oracle.small_net(batch_norm)
    _, statistics = capture(model, x).forward_train(x)
    before = buffers(model)
    parts = [
        objective(oracle.views_of(model, x[part], y[part], EPS, statistics=statistics, **schedule))
        for part in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert all(part.keys() == whole.keys() for part in parts)
    for key, value in whole.items():
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())


@pytest.mark.parametrize("name", NAMES)
def test_given_statistics_of_the_same_batch_change_neither_terms_nor_gradients(name):
    x, y = oracle.images()
    found = []
    for given in (False, True):
        model = oracle.small_net(batch_norm=True, hidden=3)
        statistics = capture(model, x).forward_train(x)[1] if given else None
        objective = oracle.begun(without_noise(name), model)
        terms = objective(oracle.views_of(model, x, y, EPS, statistics=statistics))
        found.append((terms, oracle.gradients(oracle.loss_of(terms), model)))
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value)
    oracle.assert_same_gradients(found[0][1], found[1][1])


def test_boxes_of_every_propagation_are_noted_on_request_only(model):
    x, y = oracle.images()
    quiet, noted = (oracle.views_of(model, x, y, EPS, note_boxes=note) for note in (False, True))
    for views in (quiet, noted):
        views.margins(views.box)
    assert quiet.bounded == []
    (bounded,) = noted.bounded
    stretches = oracle.segments(model, oracle.clean_pass(model, x)[1])
    expected = oracle.hidden_boxes(stretches, *oracle.pixel_box(x, EPS))[:-1]
    assert len(bounded.boxes) == len(expected)
    for box, (low, high) in zip(bounded.boxes.values(), expected, strict=True):
        torch.testing.assert_close(box.lb.flatten(1), low)
        torch.testing.assert_close(box.ub.flatten(1), high)


def test_a_network_that_does_not_end_in_a_dense_layer_is_refused():
    x, _ = oracle.images()
    snapshot = capture(nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.ReLU()).double(), x).snapshot()
    with pytest.raises(ValueError, match="dense last layer, got ReLU"):
        split_last(snapshot)
    front, last = split_last(Snapshot(snapshot.nodes[:-1]))
    assert len(front.nodes) == 2 and last.weight.shape == (4, 50)


def test_at_radius_zero_the_adversarial_points_are_the_images(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, 0.0, eps_fraction=0.0)
    assert views.points is views.x and views.adversarial is views.clean
    with pytest.raises(ValueError, match="try pgd"):
        _ = oracle.views_of(model, x, y, EPS).adversarial
