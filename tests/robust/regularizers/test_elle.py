"""ELLE's error by hand, and the controller of ELLE-A step by step."""

from __future__ import annotations

import statistics

import pytest
import torch

from attacks.threat import L2Ball
from robust.active import Moment
from robust.regularizers.elle import ELLE, ELLEAdaptive
from tests.robust.objectives import oracle

EPS = 0.3
MOMENT = Moment(None, 1, 0.5, lambda: iter(()))


def by_hand(model, own: bool) -> torch.Tensor:
    x, y = oracle.images()
    generator = torch.Generator().manual_seed(0)
    a, b = (x + EPS * (2 * torch.rand(x.shape, dtype=x.dtype, generator=generator) - 1) for _ in range(2))
    t = torch.rand((len(x), 1, 1, 1), dtype=x.dtype, generator=generator)
    assert (a < 0).any() and (a > 1).any()
    points = torch.cat([a, b, (1 - t) * a + t * b])
    stats = None if own else oracle.clean_pass(model, x)[1]
    logits = oracle.clean_pass(model, points)[0] if own else oracle.logits(model, points, stats)
    la, lb, lc = oracle.loss_of_logits(logits, y.repeat(3)).view(3, -1)
    t = t.flatten()
    return sum((lc[i] - (1 - t[i]) * la[i] - t[i] * lb[i]) ** 2 for i in range(len(x))) / len(x)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_elle_by_hand_value_and_gradient(batch_norm, own):
    model = oracle.small_net(batch_norm)
    views = oracle.views_of(model, *oracle.images(), EPS)
    found = ELLE(7.0, "own" if own else "clean")(views)["elle"]
    target = 7 * by_hand(model, own)
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))
    views.generator = None
    torch.testing.assert_close(ELLE(7.0, "own" if own else "clean")(views)["elle"], found)


def test_elle_vanishes_at_radius_zero_and_needs_a_box():
    model = oracle.small_net()
    assert float(ELLE()(oracle.views_of(model, *oracle.images(), 0.0))["elle"].detach()) == pytest.approx(0, abs=1e-20)
    views = oracle.views_of(model, *oracle.images(), EPS)
    views.ball = L2Ball(0.1)
    with pytest.raises(ValueError, match="needs an linf ball, got l2"):
        ELLE()(views)


def test_elle_a_waits_for_three_errors_jumps_above_two_deviations_and_acts_on_the_next_step():
    method = ELLEAdaptive(weight=4000.0)
    active = method.start(None)
    past: list[float] = []
    weight = 0.0
    jumps = []
    for error in (1.0, 2.0, 50.0, 200.0, 240.0, 2.0, 40.0, 300.0, 5000.0, 1.0):
        assert active.weight == pytest.approx(weight)
        active.error = error
        active.after_step(MOMENT)
        high = len(past) > 2 and error > statistics.mean(past) + 2 * statistics.pstdev(past)
        weight = 4000.0 if high else 0.99 * weight
        jumps.append(high)
        past.append(error)
        other = method.start(None)
        other.restore(active.state())
        active = other
    # 240 is above mean + 2 deviations of the four before it, and would not be with the deviation of a sample.
    assert [step for step, jump in enumerate(jumps) if jump] == [3, 4, 7, 8] and active.weight == pytest.approx(
        0.99 * 4000
    )


def test_elle_a_starts_without_weight_and_then_weighs_elles_error():
    model = oracle.small_net(batch_norm=True)
    active = ELLEAdaptive().start(None)
    assert float(active(oracle.views_of(model, *oracle.images(), EPS))["elle"].detach()) == 0
    assert active.error == pytest.approx(float(by_hand(model, own=True).detach()))
    active.weight = 3.0
    found = active(oracle.views_of(model, *oracle.images(), EPS))["elle"]
    torch.testing.assert_close(found, 3 * by_hand(model, own=True))
