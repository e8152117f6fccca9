"""Tightness and ReLU balance against sums written out neuron by neuron."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certify.op import Box
from robust.normalize import Normalize
from robust.objective import OBJECTIVES
from robust.objectives.natural import Natural
from robust.objectives.sabr import SABR
from robust.objectives.shi_ibp import ShiIBP
from robust.regularizer import REGULARIZERS
from robust.regularizers.shi import Shi, relu_balance, tightness
from tests.robust.objectives import oracle

EPS = 0.05


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=4)


def oracle_terms(boxes, first_radius):
    """(tightness, balance) as loops over plain numbers' tensors; boxes before each ReLU."""
    loose, uneven = [], []
    for low, high in boxes:
        radius = ((high - low) / 2).mean()
        loose.append(torch.relu(0.5 - first_radius / radius) / 0.5)
        center = ((low + high) / 2).flatten()
        active, inactive = center[low.flatten() > 0], center[high.flatten() < 0]
        if len(active) == 0 or len(inactive) == 0:
            uneven.append(torch.zeros((), dtype=torch.float64))
            continue
        count, middle = len(center), center.mean()
        mean_ratio = (active.sum() / count) / -(inactive.sum() / count)
        var_ratio = ((active - middle) ** 2).sum() / ((inactive - middle) ** 2).sum()
        shares = [ratio if ratio < 1 else 1 / ratio for ratio in (mean_ratio, var_ratio)]
        uneven.append(sum(torch.relu(0.5 - share) for share in shares) / 0.5)
    return torch.stack(loose).mean(), torch.stack(uneven).mean()


def boxes_of(model, x, low, high):
    _, stats = oracle.clean_pass(model, x)
    first_radius = ((high - low) / 2 / model[0].std).mean()
    return oracle.hidden_boxes(oracle.segments(model, stats), low, high)[:-1], first_radius


def check(terms, model, x, low, high, share):
    expected = oracle_terms(*boxes_of(model, x, low, high))
    assert terms.keys() == {"tightness", "relu_balance"}
    for name, target in zip(("tightness", "relu_balance"), expected, strict=True):
        torch.testing.assert_close(terms[name], share * target)
    assert terms["tightness"].shape == terms["relu_balance"].shape == ()
    oracle.assert_same_gradients(
        oracle.gradients(terms["tightness"] + terms["relu_balance"], model),
        oracle.gradients(share * (expected[0] + expected[1]), model),
        1e-8,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_norm", [False, True])
def test_terms_and_gradients_agree_with_the_oracle_on_the_objectives_box(batch_norm, seed):
    model = oracle.small_net(batch_norm, seed=seed, hidden=4)
    x, y = oracle.images(seed=seed)
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.25, ramp=0.4, note_boxes=True)
    ShiIBP()(views)
    found = Shi(weight=0.2)(views)
    check(found, model, x, *oracle.pixel_box(x, EPS), 0.2 * 0.75)
    assert found["tightness"] > 0 and found["relu_balance"] > 0


def test_sabrs_small_box_is_the_one_that_is_regularised(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.5, ramp=0.5, note_boxes=True)
    SABR(box_ratio=0.3, attack=oracle.Fixed())(views)
    low, high = oracle.pixel_box(x, EPS)
    radius = 0.3 * (high - low) / 2
    center = torch.minimum(torch.maximum(oracle.Fixed()(None, x, y, views.ball), low + radius), high - radius)
    check(Shi()(views), model, x, center - radius, center + radius, 0.25)


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.5), (0.1, 0.45), (0.9, 0.05), (1.0, 0.0)])
def test_weight_falls_with_the_radius(model, fraction, share):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=fraction, ramp=0.7, note_boxes=True)
    ShiIBP()(views)
    check(Shi(weight=0.5)(views), model, x, *oracle.pixel_box(x, EPS), share)


def test_nothing_is_left_after_the_ramp(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.5, ramp=1.0, note_boxes=True)
    ShiIBP()(views)
    assert Shi()(views) == {}


TINY = 1e-6


@pytest.mark.parametrize("objective", [Natural(), ShiIBP(), SABR(), OBJECTIVES["mtl_ibp"]()])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-7])
def test_a_radius_below_one_millionth_regularises_a_box_of_one_millionth(objective, eps, model):
    # The smooth ramp starts so slowly that its first steps are far below what float32 tells from 0.
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, eps, eps_fraction=eps / EPS, ramp=0.0, note_boxes=True)
    objective(views)
    found = Shi()(views)
    low, high = oracle.pixel_box(x, TINY)
    expected = oracle_terms(*boxes_of(model, x, low, high))
    for name, target in zip(("tightness", "relu_balance"), expected, strict=True):
        torch.testing.assert_close(found[name], 0.5 * (1 - eps / EPS) * target, rtol=1e-6, atol=1e-6)
    slopes = oracle.gradients(found["tightness"], model)
    wanted = oracle.gradients(0.5 * (1 - eps / EPS) * expected[0], model)
    oracle.assert_same_gradients(slopes, wanted, 1e-5)
    assert any(g.abs().max() > 1e-4 for g in slopes)


def test_an_objective_without_boxes_is_regularised_on_the_whole_ball(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.5, ramp=0.5, note_boxes=True)
    Natural()(views)
    check(Shi()(views), model, x, *oracle.pixel_box(x, EPS), 0.25)


def test_boxes_are_found_also_where_nothing_was_noted(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.5, ramp=0.5)
    ShiIBP()(views)
    check(Shi()(views), model, x, *oracle.pixel_box(x, EPS), 0.25)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-6, 1e-3])
def test_single_precision_keeps_tightness_and_its_gradient_at_tiny_radii(eps):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = oracle.small_net(batch_norm=True, hidden=4).to(dtype)
        x, y = oracle.images()
        views = oracle.views_of(model, x.to(dtype), y, eps, eps_fraction=eps / EPS, ramp=0.1, note_boxes=True)
        ShiIBP()(views)
        term = Shi()(views)["tightness"]
        found.append([term.double(), *(g.double() for g in oracle.gradients(term, model))])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=0.1, atol=0.02)


def box(*ends):
    """Box [1, n] from (lower, upper) pairs."""
    return Box(*(torch.tensor([column]).double().requires_grad_() for column in zip(*ends, strict=True)))


def test_balance_by_hand():
    # Centres 2 (active), 3 (active), -1 (inactive), 0.5 (unstable); their mean is 1.125.
    layer = box((1.0, 3.0), (2.0, 4.0), (-2.0, 0.0 - 1e-12), (-1.0, 2.0))
    mean_share = 1 / 5
    var_active = (2 - 1.125) ** 2 + (3 - 1.125) ** 2
    var_share = var_active / (1 + 1.125) ** 2
    expected = (0.5 - mean_share) / 0.5 + max(0.0, 0.5 - min(var_share, 1 / var_share)) / 0.5
    assert relu_balance([layer]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        box((1.0, 2.0), (0.5, 3.0), (-1.0, 2.0)),
        box((-2.0, -1.0), (-3.0, -0.5), (-1.0, 2.0)),
        box((-1.0, 2.0), (-2.0, 3.0)),
        box((0.0, 1.0), (-1.0, 0.0)),
    ],
    ids=["none_inactive", "none_active", "all_unstable", "ends_exactly_at_zero"],
)
def test_a_one_sided_layer_counts_nothing_and_sends_no_nan(layer):
    other = box((1.0, 3.0), (-1.5, -0.5))
    both, alone = relu_balance([layer, other]), relu_balance([other])
    torch.testing.assert_close(both, alone / 2)
    grads = torch.autograd.grad(both, [*layer, *other], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    assert grads[0] is None or not grads[0].any()


def test_tightness_by_hand():
    first = torch.tensor(0.1).double()
    # Mean radii 1, 0.1 and 0.25: ratios 0.1, 1 and 0.4 to the input's.
    layers = [box((-1.0, 1.0), (0.0, 2.0)), box((0.0, 0.2)), box((0.0, 0.2), (0.0, 0.8))]
    assert tightness(layers, first).item() == pytest.approx((0.8 + 0.0 + 0.2) / 3)


def test_the_first_radius_is_taken_after_normalisation():
    found = []
    for std in (1.0, 0.2):
        torch.manual_seed(0)
        model = nn.Sequential(
            Normalize((0.5, 0.5), (std, std)), nn.Flatten(), nn.Linear(50, 5), nn.ReLU(), nn.Linear(5, 4)
        ).double()
        x, y = oracle.images()
        views = oracle.views_of(model, x, y, EPS, eps_fraction=0.0, ramp=0.0, note_boxes=True)
        ShiIBP()(views)
        found.append(Shi()(views)["tightness"])
    # Radii of the input and of the hidden layer scale alike.
    torch.testing.assert_close(*found)


def test_registered_under_its_authors_name():
    assert REGULARIZERS.parse("shi:weight=0.2") == Shi(0.2) and REGULARIZERS.spell(Shi()) == "shi"
    assert Shi.needs_boxes
