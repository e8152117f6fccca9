"""CROWN-IBP and its fused loss."""

from __future__ import annotations

import pytest
import torch

from robust.objectives.crown_ibp import CrownIBP
from robust.objectives.shi_ibp import ShiIBP
from tests.robust.objectives import oracle

EPS = 0.05


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=3)


def bounds_of(model, x, y, eps=EPS):
    """Interval lower and upper bounds of the margins, and a function that gives the CROWN lower bounds of any rows."""
    _, stats = oracle.clean_pass(model, x)
    stretches, box = oracle.segments(model, stats), oracle.pixel_box(x, eps)
    boxes = oracle.hidden_boxes(stretches, *box)
    low = oracle.margin_bounds(stretches, *box, y)
    matrix, offset = stretches[-1]
    negated = [*stretches[:-1], (-matrix, -offset)]
    high = -oracle.margin_bounds(negated, *box, y)
    return low, high, lambda rows: oracle.crown_rows(stretches, boxes, *box, rows)


def fused_oracle(model, x, y, beta, eps=EPS):
    """Unshifted form: chords of exp over the interval bounds of z_k - z_y, their sum bounded by one CROWN row."""
    low, high, crown = bounds_of(model, x, y, eps)
    other = torch.ones_like(low).scatter(1, y[:, None], 0.0)
    width = torch.where(other.bool(), high - low, 1.0)
    slope = other * ((-low).exp() - (-high).exp()) / width
    rows = (slope[:, :, None] * oracle.margin_rows(y)).sum(1, keepdim=True)
    total = 1 + (other * ((-low).exp() + slope * low)).sum(1) - crown(rows)[:, 0]
    plain = 1 + (other * (-low).exp()).sum(1)
    return (beta * total + (1 - beta) * plain).log()


def margins_oracle(model, x, y, beta, eps=EPS):
    low, _, crown = bounds_of(model, x, y, eps)
    return oracle.loss_of_margins(beta * crown(oracle.margin_rows(y)) + (1 - beta) * low, y)


@pytest.mark.parametrize("fused", [False, True], ids=["margins", "fused"])
@pytest.mark.parametrize(
    ("end", "fraction", "beta"),
    [(0.0, 0.0, 1.0), (0.0, 0.25, 0.75), (1.0, 0.25, 1.0), (1.0, 1.0, 1.0), (0.5, 0.8, 0.6)],
)
def test_values_and_gradients_agree_with_the_dense_oracle(model, fused, end, fraction, beta):
    x, y = oracle.images(batch=3)
    objective = CrownIBP(loss_fusion=fused, crown_weight=end)
    terms = objective(oracle.views_of(model, x, y, EPS, eps_fraction=fraction))
    assert terms.keys() == {"crown_ibp"}
    expected = (fused_oracle if fused else margins_oracle)(model, x, y, beta)
    torch.testing.assert_close(terms["crown_ibp"], expected)
    oracle.assert_same_gradients(
        oracle.gradients(terms["crown_ibp"].mean(), model), oracle.gradients(expected.mean(), model)
    )


@pytest.mark.parametrize("fused", [False, True], ids=["margins", "fused"])
def test_weight_zero_at_the_full_radius_is_interval_training(model, fused):
    x, y = oracle.images()
    terms = CrownIBP(loss_fusion=fused, crown_weight=0.0)(oracle.views_of(model, x, y, EPS, eps_fraction=1.0))
    torch.testing.assert_close(terms, ShiIBP()(oracle.views_of(model, x, y, EPS)))


@pytest.mark.parametrize("fused", [False, True], ids=["margins", "fused"])
def test_just_above_the_skipped_weight_the_loss_is_continuous(model, fused):
    x, y = oracle.images()
    objective = CrownIBP(loss_fusion=fused)
    near, end = (objective(oracle.views_of(model, x, y, EPS, eps_fraction=f)) for f in (1 - 2e-5, 1.0))
    assert near.keys() == {"crown_ibp"} and end.keys() == {"ibp"}
    torch.testing.assert_close(near["crown_ibp"], end["ibp"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("end", "fraction", "kappa"), [(0.5, 0.0, 1.0), (0.5, 0.5, 0.75), (0.5, 1.0, 0.5), (1.0, 0.3, 1.0)]
)
def test_clean_weight_falls_along_the_radius_to_its_end(model, end, fraction, kappa):
    x, y = oracle.images(batch=3)
    terms = CrownIBP(clean_weight=end)(oracle.views_of(model, x, y, EPS, eps_fraction=fraction, ramp=0.123))
    pure = CrownIBP()(oracle.views_of(model, x, y, EPS, eps_fraction=fraction))
    (name,) = pure
    torch.testing.assert_close(terms["clean"], kappa * oracle.loss_of_logits(oracle.clean_pass(model, x)[0], y))
    torch.testing.assert_close(terms[name], (1 - kappa) * pure[name])


def test_without_a_clean_weight_the_loss_is_robust_from_the_start(model):
    x, y = oracle.images(batch=3)
    for fraction in (0.0, 0.5, 1.0):
        assert "clean" not in CrownIBP()(oracle.views_of(model, x, y, EPS, eps_fraction=fraction))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_fused_bound_covers_the_worst_case_and_every_sampled_point(model, weight):
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, EPS, eps_fraction=0.7)
    with torch.no_grad():
        fused = CrownIBP(loss_fusion=True, crown_weight=weight)(views)["crown_ibp"]
        low, high = oracle.pixel_box(x, EPS)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            share = torch.rand(x.shape, generator=generator, dtype=x.dtype).round()
            assert (oracle.loss_of_logits(views.snapshot(low + share * (high - low)), y) <= fused + 1e-9).all()


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_fused_loss_stays_finite_where_the_exponentials_overflow(scale):
    model = oracle.small_net(hidden=3).float()
    with torch.no_grad():
        model[-1].weight *= scale
        model[-1].bias *= scale
    x, y = (value.float() if value.is_floating_point() else value for value in oracle.images())
    views = oracle.views_of(model, x, y, 0.2, eps_fraction=0.5)
    (term,) = CrownIBP(loss_fusion=True, crown_weight=1.0)(views).values()
    assert term.isfinite().all()
    assert all(g.isfinite().all() for g in oracle.gradients(term.mean(), model))
    low = views.margins(views.box)
    if scale >= 1e3:
        assert (-low).exp().isinf().any()
    # At such sizes the loss of the point itself and the largest interval margin enclose it.
    floor = torch.nn.functional.cross_entropy(views.snapshot(x), y, reduction="none")
    ceiling = (-low).amax(1) + torch.tensor(oracle.CLASSES).log()
    tolerance = 1e-4 * scale
    assert (term >= floor - tolerance).all() and (term <= ceiling + tolerance).all()


def test_fused_gradient_is_accurate_at_a_radius_near_zero():
    # Chords over very short stretches: a difference of exponentials would lose all digits in float32.
    found = []
    for dtype in (torch.float32, torch.float64):
        model = oracle.small_net(hidden=3).to(dtype)
        x, y = (value.to(dtype) if value.is_floating_point() else value for value in oracle.images())
        (term,) = CrownIBP()(oracle.views_of(model, x, y, 1e-6, eps_fraction=1e-4)).values()
        found.append([term.double(), *(g.double() for g in oracle.gradients(term.mean(), model))])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-4)
