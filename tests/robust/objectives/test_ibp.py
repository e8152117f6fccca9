"""Interval bounds as a training loss: elision, soundness, and the two objectives that use nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robust.objective import certified_cross_entropy
from robust.objectives.ibp import IBP
from robust.objectives.shi_ibp import ShiIBP
from tests.robust.objectives import oracle

EPS = 0.05


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=3)


def bounds_of(model, x, y, eps=EPS):
    _, stats = oracle.clean_pass(model, x)
    margins = oracle.margin_bounds(oracle.segments(model, stats), *oracle.pixel_box(x, eps), y)
    return oracle.loss_of_margins(margins, y)


def test_what_two_rows_of_the_last_layer_share_cancels_before_it_is_bounded():
    # Equal rows: both logits are the hidden neuron in [0, 1], so bounding them one by one would give -1.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.zero_()
    x, y = torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0])
    views = oracle.views_of(model, x, y, 0.5)
    assert torch.equal(views.margins(views.box), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("batch", [2, 6], ids=["fewer_examples_than_classes", "more_examples_than_classes"])
def test_both_ways_of_bounding_row_differences_agree_with_the_oracle(model, batch):
    x, y = oracle.images(batch)
    terms = ShiIBP()(oracle.views_of(model, x, y, EPS))
    assert terms.keys() == {"ibp"}
    torch.testing.assert_close(terms["ibp"], bounds_of(model, x, y))


def test_margins_of_random_points_never_fall_below_their_bounds(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    with torch.no_grad():
        lowest, loss = views.margins(views.box), certified_cross_entropy(views.margins(views.box), y)
        low, high = oracle.pixel_box(x, EPS)
        generator = torch.Generator().manual_seed(0)
        nearest = torch.full_like(lowest, torch.inf)
        for round_ in range(200):
            share = torch.rand(x.shape, generator=generator, dtype=x.dtype)
            z = views.snapshot(low + (share.round() if round_ % 2 else share) * (high - low))
            margins = z.gather(1, y[:, None]) - z
            assert (margins >= lowest - 1e-9).all()
            assert (oracle.loss_of_logits(z, y) <= loss + 1e-9).all()
            nearest = torch.minimum(nearest, margins)
    # The bounds are no trivial ones: random corners come within a few units of them.
    assert (nearest - lowest).max() < 20


def test_certified_loss_is_the_cross_entropy_of_zero_and_the_negated_margins():
    margins = torch.tensor([[0.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    found = certified_cross_entropy(margins, torch.tensor([0, 1]))
    expected = (1 + torch.tensor([-2.0, -0.5]).double().exp() + torch.tensor([1.0, -3.0]).double().exp()).log()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("ramp", "kappa"), [(0.0, 1.0), (0.25, 0.875), (0.5, 0.75), (1.0, 0.5)])
def test_clean_weight_falls_linearly_to_one_half_along_the_ramp(model, ramp, kappa):
    x, y = oracle.images()
    # The radius has a schedule of its own, which the weight does not follow.
    terms = IBP()(oracle.views_of(model, x, y, EPS, ramp=ramp, eps_fraction=0.1))
    clean, _ = oracle.clean_pass(model, x)
    torch.testing.assert_close(terms["clean"], kappa * oracle.loss_of_logits(clean, y))
    torch.testing.assert_close(terms["ibp"], (1 - kappa) * bounds_of(model, x, y))


def test_clean_weight_zero_ends_in_bounds_alone(model):
    x, y = oracle.images()
    terms = IBP(clean_weight=0.0)(oracle.views_of(model, x, y, EPS))
    assert terms.keys() == {"ibp"}
    torch.testing.assert_close(terms["ibp"], bounds_of(model, x, y))


def test_constant_weight_splits_between_bounds_and_clean_images(model):
    x, y = oracle.images()
    terms = ShiIBP(robust_weight=0.7)(oracle.views_of(model, x, y, EPS, ramp=0.2))
    clean, _ = oracle.clean_pass(model, x)
    torch.testing.assert_close(terms["clean"], 0.3 * oracle.loss_of_logits(clean, y))
    torch.testing.assert_close(terms["ibp"], 0.7 * bounds_of(model, x, y))


def test_gradient_of_the_whole_loss_agrees_with_autograd_through_the_oracle(model):
    x, y = oracle.images()
    found = oracle.loss_of(IBP()(oracle.views_of(model, x, y, EPS, ramp=0.5)))
    clean, _ = oracle.clean_pass(model, x)
    expected = 0.75 * oracle.loss_of_logits(clean, y).mean() + 0.25 * bounds_of(model, x, y).mean()
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(expected, model))
