"""ARoW, encouraging, comp-sum, BETA, SRAT, FAT and LAT: losses and gradients written out by hand, and limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from attacks.losses import logit_differences_moved
from attacks.methods.friendly_pgd import FriendlyPGD
from attacks.methods.pgd import PGD
from attacks.threat import L2Ball, LinfBall
from robust.objectives.arow import ARoW
from robust.objectives.beta import BETA
from robust.objectives.encouraging import Encouraging, encouraging_loss
from robust.objectives.fat import FAT
from robust.objectives.hat import HAT
from robust.objectives.lat import LAT
from robust.objectives.pgd import PGDTraining
from robust.objectives.sabr import SABR
from robust.objectives.smooth_comp_sum import SmoothCompSum, comp_sum
from robust.objectives.srat import SRAT, supervised_contrast
from robust.objectives.trades import TRADES
from tests.robust.objectives import oracle

EPS = 0.06
FIXED = oracle.Fixed()


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def passes(model) -> tuple[Tensor, Tensor, Tensor]:
    """(y, logits of x, logits of x_adv), each pass with the statistics of its own batch."""
    x, y = oracle.images()
    x_adv = FIXED(None, x, y, LinfBall(EPS))
    return y, oracle.clean_pass(model, x)[0], oracle.clean_pass(model, x_adv)[0]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1)


def of_label(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack([z[b, label] for b, label in enumerate(y.tolist())])


def check(objective, model, target: Tensor) -> None:
    found = oracle.loss_of(objective(oracle.views_of(model, *oracle.images(), EPS)))
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


def test_arow_by_hand_with_a_weight_of_the_adversarial_prediction_that_is_trained(model):
    y, clean, attacked = passes(model)
    smoothed = 0.8 * oracle.loss_of_logits(clean, y) - 0.2 * clean.softmax(1).log().mean(1)
    doubt = 1 - of_label(attacked.softmax(1), y)
    check(ARoW(attack=FIXED), model, (smoothed + 7 * divergence(clean, attacked) * doubt).mean())
    with pytest.raises(AssertionError):
        check(ARoW(attack=FIXED), model, (smoothed + 7 * divergence(clean, attacked) * doubt.detach()).mean())


def test_arow_without_weights_and_smoothing_is_trades_data_term(model):
    y, clean, _ = passes(model)
    check(ARoW(0.0, 0.0, attack=FIXED), model, oracle.loss_of_logits(clean, y).mean())


@pytest.mark.parametrize("end", [0.3, 0.5, 1.0])
def test_encouraging_loss_by_hand_on_both_sides_of_the_bonus_end(model, end):
    y, _, attacked = passes(model)
    p = of_label(attacked.softmax(1), y)
    assert (p > end).any() or end == 1
    bonus = [
        math.log(1 - end) - (each - end) / (1 - end) if each > end else torch.log(1 - each)
        for each in p  # the tangent of log(1 - p) at p = end
    ]
    check(Encouraging(end, attack=FIXED), model, (-p.log() + torch.stack(bonus)).mean())


def test_the_bonus_is_bounded_and_its_gradient_vanishes_where_it_is():
    z = torch.tensor([[40.0, 0.0]], requires_grad=True)
    loss = encouraging_loss(z, torch.tensor([0]), 1.0)
    assert loss.item() == pytest.approx(math.log(1e-5))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_comp_sum_by_hand_and_its_named_members(tau):
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0])
    u = torch.stack([sum((z[b, k] - z[b, y[b]]).exp() for k in range(4) if k != y[b]) for b in range(5)])
    expected = torch.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
    torch.testing.assert_close(comp_sum(z, y, tau), expected)
    named = {0.0: u, 1.0: oracle.loss_of_logits(z, y), 2.0: 1 - of_label(z.softmax(1), y)}
    torch.testing.assert_close(expected, named.get(tau, expected))
    torch.testing.assert_close(comp_sum(z, y, 1 + 1e-9), comp_sum(z, y, 1.0), rtol=1e-6, atol=1e-6)


def test_smooth_comp_sum_by_hand(model):
    y, clean, attacked = passes(model)

    def differences(z: Tensor) -> Tensor:
        return torch.stack([torch.stack([z[b, y[b]] - z[b, k] for k in range(4) if k != y[b]]) for b in range(len(y))])

    length = (differences(attacked) - differences(clean)).square().sum(1).sqrt()
    torch.testing.assert_close(logit_differences_moved(attacked, y, clean), length)
    objective = SmoothCompSum(tau=1.5, rho=0.8, smooth_weight=0.3, attack=FIXED)
    check(objective, model, (comp_sum(clean / 0.8, y, 1.5) + 0.3 * length).mean())


def test_smooth_comp_sum_attacks_what_it_penalises():
    net = oracle.small_net()
    x, y = oracle.images()
    moved = []
    for loss in ("logit_differences", "cross_entropy"):
        attack = PGD(steps=10, step_size=0.25, loss=loss, start="gaussian", keep="last", mode="keep")
        moved.append(SmoothCompSum(attack=attack)(oracle.views_of(net, x, y, EPS))["smooth"].mean())
    assert moved[0] > moved[1]


@pytest.mark.parametrize("sharpness", [None, 2.0])
def test_beta_takes_the_cross_entropy_at_the_point_of_largest_margin_of_all_targets(model, sharpness):
    """One sign step for every wrong class, by hand."""
    x, y = oracle.images()
    objective = BETA(sharpness, steps=1, step_size=0.5)
    generator = torch.Generator().manual_seed(0)
    low, high = oracle.pixel_box(x, EPS)
    wide = [side.repeat_interleave(3, 0) for side in (low, high)]
    noise = torch.rand(wide[0].shape, dtype=x.dtype, generator=generator)
    start = (wide[0] + noise * (wide[1] - wide[0])).view(len(x), 3, *x.shape[1:])
    ranked = oracle.logits(model, x).detach()
    points, margins = [], []
    for b, label in enumerate(y.tolist()):
        targets = sorted((k for k in range(4) if k != label), key=lambda k: -float(ranked[b, k]))
        for rank, target in enumerate(targets):
            leaf = start[b, rank : rank + 1].clone().requires_grad_()
            z = oracle.logits(model, leaf)[0]
            (gradient,) = torch.autograd.grad(z[target] - z[label], leaf)
            point = (leaf + 0.5 * EPS * gradient.sign()).detach().clamp(low[b : b + 1], high[b : b + 1])
            z = oracle.logits(model, point)[0].detach()
            points.append(point)
            margins.append(float(z[target] - z[label]))
    points = torch.cat(points).view(len(x), 3, *x.shape[1:])
    margins = torch.tensor(margins, dtype=torch.float64).view(len(x), 3)
    if sharpness is None:
        best = points[torch.arange(len(x)), margins.argmax(1)]
        check(objective, model, oracle.loss_of_logits(oracle.clean_pass(model, best)[0], y).mean())
        return
    every = oracle.loss_of_logits(oracle.clean_pass(model, points.flatten(0, 1))[0], y.repeat_interleave(3)).view(-1, 3)
    check(objective, model, ((2 * margins).softmax(1) * every).sum(1).mean())


def test_sbeta_goes_to_beta_and_one_target_is_the_runner_up():
    net = oracle.small_net()
    found = [
        oracle.loss_of(BETA(sharpness=sharpness)(oracle.views_of(net, *oracle.images(), EPS)))
        for sharpness in (None, 1e6)
    ]
    torch.testing.assert_close(*found)
    one = [
        oracle.loss_of(BETA(sharpness=s, targets=1)(oracle.views_of(net, *oracle.images(), EPS))) for s in (None, 1.0)
    ]
    torch.testing.assert_close(*one)


def test_supervised_contrast_by_hand():
    features = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 0, 2])
    found = supervised_contrast(features, y, 0.5)
    for i in range(5):
        s = [float(torch.cosine_similarity(features[i], features[a], dim=0)) / 0.5 for a in range(5)]
        log_all = math.log(sum(math.exp(s[a]) for a in range(5) if a != i))
        positives = [p for p in range(5) if p != i and y[p] == y[i]]
        expected = -sum(s[p] - log_all for p in positives) / len(positives) if positives else 0.0
        assert float(found[i]) == pytest.approx(expected)


def test_srat_adds_the_separability_of_the_last_layers_inputs(model):
    y, _, attacked = passes(model)
    x_adv = FIXED(None, oracle.images()[0], y, LinfBall(EPS))
    features = oracle.clean_pass(model[:-1], x_adv)[0]
    target = oracle.loss_of_logits(attacked, y) + 0.3 * supervised_contrast(features, y, 0.2)
    check(SRAT(0.3, 0.2, attack=FIXED), model, target.mean())
    check(SRAT(0.0, attack=FIXED), model, oracle.loss_of_logits(attacked, y).mean())


@pytest.mark.parametrize(
    ("kind", "loss", "options"),
    [(PGDTraining, "cross_entropy", {"statistics": "eval", "batch_norm": "own"}), (TRADES, "kl", {})],
)
def test_fat_with_much_patience_and_no_noise_is_the_inner_objective_with_pgd(model, kind, loss, options):
    quiet = FriendlyPGD(loss=loss, noise=0.0, step_size=0.3, mode="keep")
    fat = FAT(kind(attack=quiet, **options), (0.0,) * 11)
    plain = kind(attack=PGD(steps=10, step_size=0.3, loss=loss, keep="last", mode="keep"), **options)
    found = []
    for objective in (plain, fat):
        net = copy.deepcopy(model)  # each with the same running statistics
        loss = oracle.loss_of(objective(oracle.views_of(net, *oracle.images(), EPS)))
        found.append((loss, oracle.gradients(loss, net)))
    torch.testing.assert_close(found[0][0], found[1][0])
    oracle.assert_same_gradients(found[0][1], found[1][1])


def test_fats_patience_grows_at_its_epochs_and_points_are_searched_once_a_step():
    net = oracle.small_net()
    x, y = oracle.images()
    fat = FAT(patience_epochs=(2.0, 3.0))
    for epoch, patience in ((0.0, 0), (1.99, 0), (2.0, 1), (3.5, 2)):
        views = oracle.views_of(net, x, y, EPS, epoch=epoch)
        found = fat(views)["adversarial"]
        (points,) = views.kept.values()
        attack = FriendlyPGD(patience=patience, mode="keep")
        expected = attack(lambda x: oracle.logits(net, x), x, y, LinfBall(EPS), generator=_fresh())
        torch.testing.assert_close(points, expected)
        views.generator = None
        torch.testing.assert_close(fat(views)["adversarial"], found)
        assert len(views.kept) == 1
    with pytest.raises(ValueError, match=r"fat needs an objective whose attack is friendly_pgd, such as pgd:attack="):
        FAT(PGDTraining())
    friendly = FriendlyPGD(mode="keep")
    with pytest.raises(ValueError, match="fat: hat remembers things from step to step; give an objective that does"):
        FAT(HAT(standard="a", attack=friendly))
    assert FAT(SABR(attack=friendly)).defaults == SABR.defaults != FAT().defaults


@pytest.mark.parametrize("relus", [1])
def test_lat_moves_scaled_activations_by_one_step_of_its_own_length_by_hand(model, relus):
    """The second part of the network behind its first ReLU, attacked from the points that the start draws."""
    x, y = oracle.images()
    stats = oracle.clean_pass(model, x)[1]
    cut = next(place for place, layer in enumerate(model) if isinstance(layer, torch.nn.ReLU)) + 1
    tail = model[cut:]
    inner = {place - cut: pair for place, pair in stats.items() if place >= cut}
    latent = oracle.logits(model[:cut], x, stats)
    scale = ((latent - latent.mean(0)) ** 2).mean(0).sqrt().detach()
    start = L2Ball(0.7, pixel_range=None).sample(torch.zeros_like(latent), _fresh())
    leaf = start.clone().requires_grad_()
    value = oracle.loss_of_logits(oracle.logits(tail, latent.detach() + scale * leaf, inner), y).sum()
    (gradient,) = torch.autograd.grad(value, leaf)

    def length(d: Tensor) -> Tensor:
        return d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    d = start + 0.5 * 0.7 * gradient / length(gradient)
    d = d * (0.7 / length(d)).clamp(max=1)
    target = oracle.loss_of_logits(oracle.logits(tail, latent + scale * d, inner), y).mean()
    found = oracle.loss_of(LAT(relus, 0.7, steps=1, step_size=0.5)(oracle.views_of(model, x, y, EPS)))
    torch.testing.assert_close(found, target, rtol=1e-5, atol=1e-6)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model), 1e-5)


def test_lat_of_radius_zero_is_natural_training_and_grows_with_the_radius(model):
    losses = []
    for radius in (0.0, 0.5, 2.0):
        net = copy.deepcopy(model)
        losses.append(float(oracle.loss_of(LAT(radius=radius)(oracle.views_of(net, *oracle.images(), EPS))).detach()))
    y, clean, _ = passes(model)
    assert losses[0] == pytest.approx(float(oracle.loss_of_logits(clean, y).mean().detach()))
    assert losses == sorted(losses)


def _fresh() -> torch.Generator:
    return torch.Generator().manual_seed(0)
