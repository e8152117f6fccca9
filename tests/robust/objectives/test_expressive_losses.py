"""CC-IBP, MTL-IBP and Exp-IBP: three paths from adversarial training to interval training."""

from __future__ import annotations

import pytest
import torch

from attacks.threat import LinfBall
from robust.objectives.cc_ibp import CCIBP
from robust.objectives.exp_ibp import ExpIBP
from robust.objectives.mtl_ibp import MTLIBP
from tests.robust.objectives import oracle

EPS = 0.06
FIXED = oracle.Fixed()
LOSSES = [CCIBP, MTLIBP, ExpIBP]
WEIGHTS = [0.02, 0.3, 0.7, 0.95]


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def margins_of(model, x, y, factor=1.0):
    """(lower bounds, margins at the point) [B, K], by the oracle."""
    _, stats = oracle.clean_pass(model, x)
    lowest = oracle.margin_bounds(oracle.segments(model, stats), *oracle.pixel_box(x, EPS), y)
    z = oracle.logits(model, FIXED(None, x, None, LinfBall(factor * EPS)), stats)
    return lowest, z.gather(1, y[:, None]) - z


def loss(objective, model, x, y):
    return oracle.loss_of(objective(oracle.views_of(model, x, y, EPS)))


@pytest.mark.parametrize("kind", LOSSES)
def test_weight_zero_is_adversarial_training_and_weight_one_interval_training(kind, model):
    x, y = oracle.images()
    lowest, margins = margins_of(model, x, y)
    for weight, expected in ((0.0, margins), (1.0, lowest)):
        found = loss(kind(ibp_weight=weight, attack=FIXED), model, x, y)
        target = oracle.loss_of_margins(expected, y).mean()
        torch.testing.assert_close(found, target)
        oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_mixed_values_and_gradients_agree_with_the_oracle(weight, model):
    x, y = oracle.images()
    lowest, margins = margins_of(model, x, y, factor=2.1)
    bound, attacked = oracle.loss_of_margins(lowest, y).mean(), oracle.loss_of_margins(margins, y).mean()
    expected = {
        CCIBP: oracle.loss_of_margins(weight * lowest + (1 - weight) * margins, y).mean(),
        MTLIBP: weight * bound + (1 - weight) * attacked,
        ExpIBP: (weight * bound.log() + (1 - weight) * attacked.log()).exp(),
    }
    for kind, target in expected.items():
        found = loss(kind(ibp_weight=weight, attack=FIXED, attack_factor=2.1), model, x, y)
        torch.testing.assert_close(found, target)
        oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_cc_and_exp_never_exceed_mtl_inside_the_ball(weight, model):
    for seed in range(5):
        x, y = oracle.images(seed=seed)
        cc, mtl, exp = (loss(kind(ibp_weight=weight), model, x, y) for kind in LOSSES)
        assert cc <= mtl + 1e-12 and exp <= mtl + 1e-12
        low = loss(MTLIBP(ibp_weight=0.0), model, x, y)
        high = loss(MTLIBP(ibp_weight=1.0), model, x, y)
        assert all(low - 1e-12 <= value <= high + 1e-12 for value in (cc, mtl, exp))


@pytest.mark.parametrize("kind", LOSSES)
def test_robust_weight_leaves_the_rest_to_the_clean_images(kind, model):
    x, y = oracle.images()
    terms = kind(attack=FIXED, robust_weight=0.9)(oracle.views_of(model, x, y, EPS))
    alone = kind(attack=FIXED)(oracle.views_of(model, x, y, EPS))
    assert terms.keys() == {"clean"} | alone.keys()
    torch.testing.assert_close(terms["clean"], 0.1 * oracle.loss_of_logits(oracle.clean_pass(model, x)[0], y))
    for name, value in alone.items():
        torch.testing.assert_close(terms[name], 0.9 * value)


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.5, 1.0])
def test_exp_keeps_finite_gradients_when_a_loss_vanishes(weight):
    model = oracle.small_net()
    x, y = oracle.images()
    with torch.no_grad():
        # One class wins by so much that both losses are exactly 0, where a power's gradient is infinite.
        model[-1].bias[0] = 1e6
    value = loss(ExpIBP(ibp_weight=weight), model, x, torch.zeros_like(y))
    assert value <= 1e-11
    assert all(g.isfinite().all() for g in oracle.gradients(value, model))


def test_the_powers_of_exp_act_on_batch_means():
    model = oracle.small_net()
    x, y = oracle.images()
    lowest, margins = margins_of(model, x, y)
    bound, attacked = oracle.loss_of_margins(lowest, y), oracle.loss_of_margins(margins, y)
    found = ExpIBP(ibp_weight=0.5, attack=FIXED)(oracle.views_of(model, x, y, EPS))["exp_ibp"]
    torch.testing.assert_close(found, (bound.mean() * attacked.mean()).sqrt().expand(len(y)))
    assert (found.mean() - (bound * attacked).sqrt().mean()).abs() > 1e-3
