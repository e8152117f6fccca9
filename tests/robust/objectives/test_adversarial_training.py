"""PGD-AT, TRADES, MART and SOVR: losses and gradients written out by hand, and the limits in which they agree."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attacks.methods.pgd import PGD
from attacks.threat import L2Ball, LinfBall
from certify.tracing import capture
from robust.objective import OBJECTIVES
from robust.objectives.mart import MART
from robust.objectives.pgd import PGDTraining
from robust.objectives.sovr import SOVR, one_versus_rest, smallest_margins
from robust.objectives.trades import TRADES
from robust.views import Views
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


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(p(x) || p(x_adv)) from its definition, [B]."""
    p, q = clean.softmax(1), attacked.softmax(1)
    return (p * (p / q).log()).sum(1)


def check(objective, model, target: Tensor) -> None:
    found = oracle.loss_of(objective(oracle.views_of(model, *oracle.images(), EPS)))
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


def test_pgd_with_own_statistics_is_cross_entropy_in_training_mode(model):
    y, _, attacked = passes(model)
    target = oracle.loss_of_logits(attacked, y).mean()
    check(PGDTraining(attack=FIXED, batch_norm="own"), model, target)


def test_trades_by_hand_with_gradient_through_both_arguments_of_the_divergence(model):
    y, clean, attacked = passes(model)
    target = (oracle.loss_of_logits(clean, y) + 3.5 * divergence(clean, attacked)).mean()
    check(TRADES(kl_weight=3.5, attack=FIXED), model, target)
    detached = (oracle.loss_of_logits(clean, y) + 3.5 * divergence(clean.detach(), attacked)).mean()
    with pytest.raises(AssertionError):
        check(TRADES(kl_weight=3.5, attack=FIXED), model, detached)


def test_the_second_clean_pass_of_trades_moves_statistics_and_nothing_else():
    found = []
    for twice in (False, True):
        net = oracle.small_net(batch_norm=True)
        views = oracle.views_of(net, *oracle.images(), EPS)
        found.append((oracle.loss_of(TRADES(attack=FIXED, second_clean_pass=twice)(views)), net))
    (once, first), (again, second) = found
    torch.testing.assert_close(once, again)
    oracle.assert_same_gradients(oracle.gradients(once, first), oracle.gradients(again, second))
    x = oracle.images()[0]
    twin = oracle.small_net(batch_norm=True)
    for batch in (x, FIXED(None, x, None, LinfBall(EPS)), x):
        twin(batch)
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(second.named_buffers())[name], value)
    assert int(first[2].num_batches_tracked) == 2 and int(second[2].num_batches_tracked) == 3


def test_mart_by_hand_with_a_weight_that_is_trained(model):
    y, clean, attacked = passes(model)

    def loss(doubt: Tensor) -> Tensor:
        q = attacked.softmax(1)
        rows = []
        for b, label in enumerate(y.tolist()):
            wrong = max(q[b, k] for k in range(oracle.CLASSES) if k != label)
            rows.append(-q[b, label].log() - (1.0001 - wrong).log())
        return (torch.stack(rows) + 5 * divergence(clean, attacked) * doubt).mean()

    doubt = 1.0000001 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
    check(MART(attack=FIXED), model, loss(doubt))
    with pytest.raises(AssertionError):
        check(MART(attack=FIXED), model, loss(doubt.detach()))


def test_ovr_in_one_piece_is_ovr_in_two_parts():
    z = 5 * torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for b, label in enumerate(y.tolist()):
        rest = sum(torch.log1p(z[b, k].exp()) for k in range(4) if k != label)
        torch.testing.assert_close(one_versus_rest(z, y)[b], torch.log1p((-z[b, label]).exp()) + rest)


def test_sovr_switches_the_examples_with_the_smallest_margins_rounded_down(model):
    y, _, attacked = passes(model)
    margins = [min(z[y_] - z[k] for k in range(4) if k != y_) for z, y_ in zip(attacked, y.tolist(), strict=True)]
    order = torch.stack(margins).argsort()
    chosen = set(order[: int(0.4 * len(y))].tolist())
    assert len(chosen) == 2
    assert set(smallest_margins(attacked, y, 40).nonzero().flatten().tolist()) == chosen
    rows = [
        0.7 * one_versus_rest(attacked, y)[b] if b in chosen else oracle.loss_of_logits(attacked, y)[b]
        for b in range(len(y))
    ]
    check(SOVR(percent=40, ovr_weight=0.7, attack=FIXED), model, torch.stack(rows).mean())


def test_sovr_of_nothing_is_adversarial_training_and_of_everything_ovr(model):
    y, clean, attacked = passes(model)
    check(SOVR(percent=0, attack=FIXED), model, oracle.loss_of_logits(attacked, y).mean())
    check(SOVR(percent=100, ovr_weight=0.4, attack=FIXED), model, 0.4 * one_versus_rest(attacked, y).mean())
    both = 0.4 * one_versus_rest(attacked, y).mean() + 6 * divergence(clean, attacked).mean()
    check(SOVR(percent=100, kl_weight=6.0, attack=FIXED), model, both)
    with pytest.raises(ValueError, match=r"percent=101: expected a share of the batch from 0 to 100"):
        SOVR(percent=101)


@dataclass(frozen=True)
class Looking:
    """An attack that notes what the network says of the images, twice."""

    seen: list = field(default_factory=list, compare=False)
    seed: int = 0
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __call__(self, model, x, y, ball, *, generator=None, index=None):
        self.seen.extend(model(x).detach().clone() for _ in range(2))
        return x.clone()


@pytest.mark.parametrize("statistics", ["eval", "train", "train_frozen", "batch", "running"])
def test_each_convention_of_attack_statistics_shows_the_network_it_names(statistics):
    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    before = copy.deepcopy(net)
    attack = Looking()
    views = oracle.views_of(net, x, y, EPS)
    PGDTraining(attack=attack, statistics=statistics, batch_norm="own")(views)
    twin = copy.deepcopy(before)
    if statistics == "running":
        twin(x)
    expected = {
        "eval": oracle.logits(before, x),
        "running": oracle.logits(twin, x),
    }.get(statistics, oracle.clean_pass(before, x)[0])
    for logits in attack.seen:
        torch.testing.assert_close(logits, expected.detach())
    # Passes that moved the running statistics: train's two iterates or the clean pass; and always the loss's own.
    moves = {"train": 2, "batch": 1, "running": 1}.get(statistics, 0) + 1
    assert int(net[2].num_batches_tracked) == moves


def test_attacking_in_evaluation_after_a_training_pass_is_refused_with_what_to_do():
    net = oracle.small_net(batch_norm=True)
    views = oracle.views_of(net, *oracle.images(), EPS)
    _ = views.clean
    with pytest.raises(ValueError, match="moved the running statistics already; set micro_batch=0, and attack before"):
        TRADES()(views)


def test_trades_attacks_with_the_clean_prediction_in_evaluation_mode_as_reference():
    """One step by hand: x + noise, up the gradient of KL(p(x) || .), cut to the ball and the pixels."""
    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    objective = TRADES(attack=PGD(steps=1, step_size=0.25, loss="kl", start="gaussian", keep="last"))
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    start = (x + 1e-3 * noise).clamp(0, 1).clamp(x - EPS, x + EPS).requires_grad_()
    reference = oracle.logits(net, x).detach()
    (gradient,) = torch.autograd.grad(divergence(reference, oracle.logits(net, start)).sum(), start)
    point = (start + 0.25 * EPS * gradient.sign()).clamp(x - EPS, x + EPS).clamp(0, 1).detach()
    clean, attacked = oracle.clean_pass(net, x)[0], oracle.clean_pass(net, point)[0]
    found = objective(oracle.views_of(net, x, y, EPS))
    torch.testing.assert_close(found["kl"], 6 * divergence(clean, attacked))


# --- published algorithms written out on the module itself


@pytest.mark.parametrize("idle", [False, True])
def test_adversarial_training_of_rice_et_al_is_their_loop_in_training_mode_throughout(idle):
    """Points, loss, gradients and running statistics, with and without the passes that only feed their log."""
    net = oracle.small_net(batch_norm=True)
    twin = copy.deepcopy(net)
    x, y = oracle.images()
    attack = PGD(steps=3, step_size=0.25, keep="last", mode="keep")
    objective = PGDTraining(attack=attack, statistics="train", batch_norm="own", idle_passes=idle)
    found = oracle.loss_of(objective(oracle.views_of(net, x, y, EPS)))

    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    point = low + noise * (high - low)
    for _ in range(3):
        point.requires_grad_()
        loss = torch.nn.functional.cross_entropy(twin(point), y)
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + 0.25 * EPS * gradient.sign()).clamp(low, high)
    if idle:
        twin(point)
    target = torch.nn.functional.cross_entropy(twin(point), y)
    if idle:
        twin(x)
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, net), oracle.gradients(target, twin))
    for name, value in twin.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], value)
    assert int(net[2].num_batches_tracked) == (6 if idle else 4)


def test_trades_in_l2_steps_along_the_normalised_gradient_and_cuts_to_the_pixels_before_the_radius():
    net, eps = oracle.small_net(batch_norm=True), 0.8
    x, y = oracle.images()
    reference = oracle.logits(net, x).detach()
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    # Theirs starts at the noise itself; ours cuts it to the feasible points first.
    delta = (x + 1e-3 * noise).clamp(0, 1) - x
    other = delta.clone()
    for _ in range(4):
        gradients = []
        for d in (delta, other):
            d = d.clone().requires_grad_()
            value = divergence(reference, oracle.logits(net, x + d)).sum()
            (gradient,) = torch.autograd.grad(value, d)
            gradients.append(gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        delta = (x + delta + 2 * eps / 4 * gradients[0]).clamp(0, 1) - x
        delta = delta.renorm(2, 0, eps)
        other = (other + 2 * eps / 4 * gradients[1]).renorm(2, 0, eps)
        other = (x + other).clamp(0, 1) - x
    text = "trades:attack=(pgd:steps=4,step_size=0.5,loss=kl,start=gaussian,keep=last,mode=keep,cut_first=true)"
    views = Views(capture(net, x), x, y, L2Ball(eps), torch.Generator().manual_seed(0))
    OBJECTIVES.parse(text)(views)
    (points,) = views.kept.values()
    torch.testing.assert_close(points, x + delta, rtol=1e-4, atol=1e-5)
    assert (delta - other).abs().max() > 0.01  # the order matters here
    assert L2Ball(eps).contains(points, x).all()


def test_sovr_and_tsovr_reach_adversarial_training_and_its_trades_form_where_nothing_is_switched(model):
    y, clean, attacked = passes(model)
    ce = oracle.loss_of_logits(attacked, y).mean()
    check(SOVR(percent=0, kl_weight=2.0, attack=FIXED), model, ce + 2 * divergence(clean, attacked).mean())
    # Rounded down: a fifth of six examples is one, and a tenth none.
    worst = (attacked.gather(1, y[:, None]).squeeze(1) - attacked.scatter(1, y[:, None], -1e9).amax(1)).argmin()
    rows = oracle.loss_of_logits(attacked, y).clone()
    rows[worst] = 0.4 * one_versus_rest(attacked, y)[worst]
    check(SOVR(percent=20, attack=FIXED), model, rows.mean())
    check(SOVR(percent=10, attack=FIXED), model, ce)


def test_label_smoothing_of_trades_spreads_the_label_of_the_clean_term_alone(model):
    y, clean, attacked = passes(model)
    log_p = clean.log_softmax(1)
    smooth = -0.9 * log_p.gather(1, y[:, None]).squeeze(1) - 0.1 * log_p.mean(1)
    check(TRADES(label_smoothing=0.1, attack=FIXED), model, (smooth + 6 * divergence(clean, attacked)).mean())


def test_batch_statistics_of_an_attack_that_leaves_examples_out_are_refused():
    x, y = oracle.images()
    views = oracle.views_of(oracle.small_net(batch_norm=True, hidden=3), x, y, 0.3)
    attack = PGD(steps=5, step_size=0.5, keep="first_fooled", mode="keep")
    with pytest.raises(ValueError, match=r"needs the whole batch in every pass.*keep=last"):
        PGDTraining(attack=attack, statistics="train", batch_norm="own")(views)
