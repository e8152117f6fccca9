"""Small boxes around adversarial points, and the ReLU shrinkage that goes with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from certify.interval import Interval
from certify.tracing import capture
from robust.objectives.pgd import PGDTraining
from robust.objectives.sabr import SABR, small_box
from robust.objectives.shi_ibp import ShiIBP
from robust.relu_shrinkage import with_shrunk_relus
from robust.training_attack import SABR_PGD
from robust.views import Views
from tests.robust.objectives import oracle

EPS = 0.08
FIXED = oracle.Fixed()


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def fixed_point(x, eps=EPS):
    return FIXED(None, x, None, LinfBall(eps))


def test_a_box_as_large_as_the_ball_is_interval_training(model):
    x, y = oracle.images()
    found, expected = (objective(oracle.views_of(model, x, y, EPS)) for objective in (SABR(box_ratio=1.0), ShiIBP()))
    torch.testing.assert_close(found["sabr"], expected["ibp"])
    oracle.assert_same_gradients(
        oracle.gradients(oracle.loss_of(found), model), oracle.gradients(oracle.loss_of(expected), model)
    )


def test_a_vanishing_box_is_adversarial_training(model):
    x, y = oracle.images()
    found, expected = (
        objective(oracle.views_of(model, x, y, EPS))
        for objective in (SABR(box_ratio=1e-9, attack=FIXED), PGDTraining(attack=FIXED))
    )
    torch.testing.assert_close(found["sabr"], expected["adversarial"])
    _, stats = oracle.clean_pass(model, x)
    z = oracle.logits(model, fixed_point(x), stats)
    torch.testing.assert_close(found["sabr"], oracle.loss_of_logits(z, y))


@pytest.mark.parametrize("shrink", [1.0, 0.8])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.9])
def test_loss_and_gradient_agree_with_the_oracle_on_the_small_box(model, ratio, shrink):
    x, y = oracle.images()
    found = SABR(box_ratio=ratio, attack=FIXED, relu_shrink=shrink)(oracle.views_of(model, x, y, EPS))["sabr"]
    low, high = oracle.pixel_box(x, EPS)
    radius = ratio * (high - low) / 2
    center = torch.minimum(torch.maximum(fixed_point(x), low + radius), high - radius)
    _, stats = oracle.clean_pass(model, x)
    margins = oracle.margin_bounds(oracle.segments(model, stats), center - radius, center + radius, y, shrink)
    expected = oracle.loss_of_margins(margins, y)
    torch.testing.assert_close(found, expected)
    oracle.assert_same_gradients(oracle.gradients(found.mean(), model), oracle.gradients(expected.mean(), model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_the_small_box_lies_in_the_ball_and_the_pixel_range(ratio, dtype):
    x = oracle.images(batch=50)[0].to(dtype)
    assert (x == 0).any() and (x == 1).any()
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for eps in (0.0, 1 / 255, 0.3, 0.8):
        big = oracle.views_of(model, x, torch.zeros(50, dtype=torch.int64), eps).box
        share = torch.rand(x.shape, generator=generator).to(dtype).round(decimals=1)
        x_adv = LinfBall(eps).project(x + (2 * share - 1) * eps, x)
        small = small_box(big, x_adv, ratio)
        assert (small.lb >= (x - eps).clamp(min=0) - tolerance).all()
        assert (small.ub <= (x + eps).clamp(max=1) + tolerance).all()
        torch.testing.assert_close(small.radius, ratio * big.radius)
        # As near as it fits: the point is in the box unless the ball's border pushes the box inwards, never outside it.
        assert ((small.center - x_adv).abs() <= small.radius + tolerance).all()
        inner = (x_adv - small.radius >= big.lb) & (x_adv + small.radius <= big.ub)
        torch.testing.assert_close(small.center[inner], x_adv[inner])


def test_no_gradient_flows_through_the_search(model):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS)
    x_adv = SABR_PGD(views.frozen, x, y, views.ball, generator=torch.Generator().manual_seed(0))
    constant = oracle.loss_of_margins(views.margins(small_box(views.box, x_adv, 0.4)), y).mean()
    found = oracle.loss_of(SABR(box_ratio=0.4)(oracle.views_of(model, x, y, EPS)))
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(constant, model))


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_search_climbs_the_network_with_the_named_statistics(statistics):
    model = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    attack = PGD(steps=1, step_size=10.0, unit="box", start="clean", keep="last", mode="keep")
    _, stats = oracle.clean_pass(model, x)
    views = oracle.views_of(model, x, y, EPS)
    found = SABR(box_ratio=1e-9, attack=attack, statistics=statistics)(views)["sabr"]
    point = x.clone().requires_grad_()
    under_attack = stats if statistics == "batch" else None
    (slope,) = torch.autograd.grad(oracle.loss_of_logits(oracle.logits(model, point, under_attack), y).sum(), point)
    low, high = oracle.pixel_box(x, EPS)
    corner = torch.where(slope > 0, high, torch.where(slope < 0, low, x))
    # Whatever the attack sees, the loss is taken with the clean batch's statistics.
    torch.testing.assert_close(found, oracle.loss_of_logits(oracle.logits(model, corner, stats), y))


def test_shrinkage_by_hand():
    # Before the ReLU: [-1, 2] unstable, [1, 3] active, [-3, -1] inactive, [0, 2] active. Only the first shrinks.
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 4)).double()
    snapshot = capture(model, torch.zeros(1, 1, 2, 2, dtype=torch.float64)).snapshot()
    relu = with_shrunk_relus(snapshot, 0.8).nodes[2].op
    box = Interval.from_box(
        torch.tensor([[-1.0, 1.0, -3.0, 0.0]]).double(), torch.tensor([[2.0, 3.0, -1.0, 2.0]]).double()
    )
    after = relu.interval(box)
    torch.testing.assert_close(after.lb, torch.tensor([[0.0, 1.0, 0.0, 0.0]]).double())
    torch.testing.assert_close(after.ub, torch.tensor([[1.6, 3.0, 0.0, 2.0]]).double())
    assert with_shrunk_relus(snapshot, 1.0) is snapshot
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64) - 0.5
    assert torch.equal(with_shrunk_relus(snapshot, 0.8)(x), snapshot(x))


def test_shrinkage_tightens_the_training_bound_and_leaves_the_search_alone(model):
    x, y = oracle.images()
    losses = [
        SABR(box_ratio=0.9, relu_shrink=factor)(oracle.views_of(model, x, y, EPS))["sabr"] for factor in (1.0, 0.8, 0.5)
    ]
    assert (losses[0] > losses[1]).all() and (losses[1] > losses[2]).all()


def test_the_radius_of_the_search_is_the_steps_own():
    model = oracle.small_net()
    x, y = oracle.images()
    whole, half = (Views(capture(model, x), x, y, LinfBall(EPS).scaled(s)) for s in (1.0, 0.5))
    expected = SABR(box_ratio=0.4, attack=FIXED)(oracle.views_of(model, x, y, EPS / 2))["sabr"]
    torch.testing.assert_close(SABR(box_ratio=0.4, attack=FIXED)(half)["sabr"], expected)
    assert not torch.allclose(SABR(box_ratio=0.4, attack=FIXED)(whole)["sabr"], expected)
