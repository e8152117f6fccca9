"""GAIRAT, MAIL, WEAT, KL-DRO and HR: weights by hand, gradients that do not flow through them, and their limits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from robust.active import Moment
from robust.objectives.mart import MART
from robust.objectives.pgd import PGDTraining
from robust.objectives.trades import TRADES
from robust.weightings.gairat import GAIRAT
from robust.weightings.hr import HolisticRobustness, worst_weights
from robust.weightings.kl_dro import KLDRO
from robust.weightings.mail import MAIL
from robust.weightings.weat import WEAT
from tests.robust.objectives import oracle

EPS = 0.06
AT = PGDTraining(attack=oracle.Fixed(), batch_norm="own")
MOMENT = Moment(None, 0, 0.0, lambda: iter(()))


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def weighed(weighting, objective, model, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(terms, weighted terms)."""
    views = oracle.views_of(model, *oracle.images(), EPS, **options)
    terms = objective(views)
    return terms, weighting(views, terms)


def check(found: dict[str, Tensor], terms: dict[str, Tensor], weights: dict[str, Tensor], model) -> None:
    """Terms are as weighted by constants; gradients too."""
    target = {name: weights[name].detach() * value if name in weights else value for name, value in terms.items()}
    assert found.keys() == target.keys()
    for name in target:
        torch.testing.assert_close(found[name], target[name])
    gradients = [oracle.gradients(oracle.loss_of(each), model) for each in (found, target)]
    oracle.assert_same_gradients(*gradients)


def attacked(model) -> Tensor:
    x, y = oracle.images()
    return oracle.clean_pass(model, oracle.Fixed()(None, x, y, LinfBall(EPS)))[0].detach()


def test_gairat_weighs_by_the_share_of_the_path_that_is_still_right(model):
    objective = PGDTraining(attack=PGD(steps=4, step_size=3.0, keep="last", mode="keep"), batch_norm="own")
    views = oracle.views_of(model, *oracle.images(), EPS, count_correct=True, epoch=60.0)
    terms = objective(views)
    kappa = views.kappa.tolist()
    assert views.path_length == 4 and len(set(kappa)) > 1
    raw = torch.tensor([(1 + math.tanh(-1 + 5 * (1 - 2 * k / 4))) / 2 for k in kappa], dtype=torch.float64)
    check(GAIRAT()(views, terms), terms, {"adversarial": raw * len(raw) / raw.sum()}, model)
    views.epoch = 59.9
    assert GAIRAT()(views, terms) is terms


def test_mail_weighs_by_the_probabilistic_margin_and_names_the_term_that_is_missing(model):
    z, y = attacked(model), oracle.images()[1]
    p = z.softmax(1)
    behind = torch.stack([max(p[b, k] for k in range(4) if k != y[b]) - p[b, y[b]] for b in range(len(y))])
    terms, found = weighed(MAIL(), AT, model, epoch=75.0)
    check(found, terms, {"adversarial": 3 / (1 + torch.exp(-10 * (behind - 0.5)))}, model)
    weight = 3 / (1 + torch.exp(-2 * behind))
    other = oracle.small_net(batch_norm=True)
    terms, found = weighed(MAIL(2.0, 0.0, term="kl"), TRADES(attack=oracle.Fixed()), model, epoch=80.0)
    check(found, terms, {"kl": weight}, model)
    terms, found = weighed(MAIL(2.0, 0.0), MART(attack=oracle.Fixed()), model, epoch=80.0)
    check(found, terms, {"adversarial": weight}, model)
    with pytest.raises(ValueError, match="mail weights the term 'adversarial', and the objective has clean, kl"):
        weighed(MAIL(), TRADES(attack=oracle.Fixed()), other, epoch=80.0)


@pytest.mark.parametrize(("method", "name", "start"), [(GAIRAT(), "gairat", 60), (MAIL(), "mail", 75)])
def test_a_run_that_ends_before_the_weights_act_is_refused(method, name, start):
    assert method.start(SimpleNamespace(epochs=start + 1)) is method
    with pytest.raises(ValueError, match=f"{name}: start_epoch={start} of 40 epochs .* {name}:start_epoch=20"):
        method.start(SimpleNamespace(epochs=40))


def test_weat_weighs_both_terms_by_the_clean_energy(model):
    clean = oracle.clean_pass(model, oracle.images()[0])[0]
    energy = -clean.exp().sum(1).log()
    weight = 1 / torch.log(1 + energy.abs().exp())
    terms, found = weighed(WEAT(), TRADES(attack=oracle.Fixed()), model)
    check(found, terms, {"clean": weight, "kl": weight}, model)
    large = SimpleNamespace(clean=torch.tensor([[1e4, 0.0]]), y=torch.tensor([0]))
    assert WEAT()(large, {"kl": torch.ones(1)})["kl"].item() == pytest.approx(1e-4)


def test_kl_dro_of_a_batch_is_the_gradient_of_the_log_mean_exponential(model):
    """The worst weights make the weighted loss's gradient that of r log mean exp(l / r)."""
    active = KLDRO(temperature=0.3).start(None)
    terms, found = weighed(active, AT, model)
    losses = terms["adversarial"]
    check(found, terms, {"adversarial": len(losses) * (losses / 0.3).softmax(0)}, model)
    robust = 0.3 * (losses / 0.3).exp().mean().log()
    oracle.assert_same_gradients(
        oracle.gradients(oracle.loss_of(found), model), oracle.gradients(robust, model), tolerance=1e-9
    )
    cold = weighed(KLDRO(temperature=1e9).start(None), AT, model)
    torch.testing.assert_close(cold[0]["adversarial"], cold[1]["adversarial"])


def test_kl_dro_follows_the_mean_of_past_batches_behind_each_step_only():
    dro = KLDRO(temperature=0.5, momentum=0.75)
    active, u = dro.start(None), None
    for losses in (torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]), torch.tensor([800.0, 1.0])):
        losses = losses.double()
        mean = (losses / 0.5).exp().mean()
        u = mean if u is None else 0.75 * u + 0.25 * mean
        for _ in range(2):  # a step whose loss is computed twice
            found = active(None, {"adversarial": losses})["adversarial"]
            torch.testing.assert_close(found, losses * (losses / 0.5 - u.log()).exp() if u.isfinite() else found)
            assert found.isfinite().all()
        active.see(None, MOMENT)
        active.after_step(MOMENT)
        other = dro.start(None)
        other.restore(active.state())
        active = other


def solved(losses: Tensor, alpha: float, r: float) -> float:
    """The value of program HD by a generic solver, over p and s."""
    n = len(losses)
    gains = np.append(losses.numpy(), float(losses.max()))

    def split(v):
        p, s = v[: n + 1], v[n + 1 :]
        return p, np.append(1 / n - s, s.sum())

    def divergence(v):
        p, q = split(v)
        q = np.maximum(q, 1e-15)
        return r - float((q * np.log(q / np.maximum(p, 1e-15))).sum())

    start = np.concatenate([np.full(n + 1, 1 / (n + 1)), np.full(n, min(alpha / n, 1 / n) / 2)])
    found = minimize(
        lambda v: -float(gains @ v[: n + 1]),
        start,
        jac=lambda v: np.concatenate([-gains, np.zeros(n)]),
        bounds=[(1e-9, 1)] * (n + 1) + [(0, 1 / n)] * n,
        constraints=[
            {"type": "eq", "fun": lambda v: v[: n + 1].sum() - 1},
            {"type": "ineq", "fun": lambda v: alpha - v[n + 1 :].sum()},
            {"type": "ineq", "fun": divergence},
        ],
        options={"maxiter": 500, "ftol": 1e-10},
        method="SLSQP",
    )
    return -found.fun


@pytest.mark.parametrize(("alpha", "r"), [(0.0, 0.2), (0.1, 0.05), (0.35, 0.5), (0.25, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_hr_in_closed_form_is_the_convex_programs_solution(alpha, r, seed):
    losses = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    p = worst_weights(losses, alpha, r)
    q = torch.full((6,), 1 / 6, dtype=torch.float64)
    left = alpha
    for i in losses.argsort().tolist():
        taken = min(left, 1 / 6)
        q[i], left = q[i] - taken, left - taken
    q = torch.cat([q, torch.tensor([alpha], dtype=torch.float64)])
    used = q > 0
    assert float(p.sum()) == pytest.approx(1) and (p >= 0).all()
    assert float((q[used] * (q[used] / p[used]).log()).sum()) == pytest.approx(r, abs=1e-9)
    value = float(p[:-1] @ losses + p[-1] * losses.max())
    assert value == pytest.approx(solved(losses, alpha, r), rel=2e-4)


def test_hr_goes_from_the_mean_to_the_worst_loss():
    losses = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(worst_weights(losses, 0.0, 0.0)[:-1], torch.full_like(losses, 0.25))
    value = [
        float(p[:-1] @ losses + p[-1] * 2) for p in (worst_weights(losses, 0.0, r) for r in (0.1, 1.0, 10.0, 50.0))
    ]
    assert sorted(value) == value and value[-1] == pytest.approx(2.0)
    torch.testing.assert_close(
        worst_weights(losses, 0.4, 0.0), torch.tensor([0.1, 0.25, 0.25, 0, 0.4], dtype=torch.float64)
    )
    even = torch.full_like(losses, 1.5)
    torch.testing.assert_close(worst_weights(even, 0.0, 0.3)[:-1], torch.full_like(losses, 0.25))


def test_hr_weighs_whole_examples_and_gives_the_extra_atom_to_the_worst(model):
    terms, found = weighed(HolisticRobustness(0.2, 0.3), TRADES(attack=oracle.Fixed()), model)
    losses = (terms["clean"] + terms["kl"]).detach()
    p = worst_weights(losses, 0.2, 0.3)
    target = p[:-1] @ losses + p[-1] * losses.max()
    torch.testing.assert_close(oracle.loss_of(found), target)
    weight = len(losses) * p[:-1].clone()
    weight[losses.argmax()] += len(losses) * p[-1]
    check(found, terms, {"clean": weight, "kl": weight}, model)
