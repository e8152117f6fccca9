"""HAT, LBGAT, MTARD, SRST-AWR and PubDef: losses and gradients by hand, and what becomes of their second networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attacks.threat import LinfBall
from robust.active import Moment
from robust.objectives.awr import AWR, labelled_cross_entropy
from robust.objectives.hat import HAT
from robust.objectives.lbgat import LBGAT
from robust.objectives.mtard import MTARD
from robust.objectives.pubdef import PubDef
from robust.objectives.trades import TRADES
from tests.robust.objectives import oracle

EPS = 0.06
FIXED = oracle.Fixed()
MOMENT = Moment(None, 1, 0.5, lambda: iter(()))


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def points() -> tuple[Tensor, Tensor, Tensor]:
    x, y = oracle.images()
    return x, FIXED(None, x, y, LinfBall(EPS)), y


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1)


def check(active, model, target: Tensor, eps: float = EPS) -> None:
    found = oracle.loss_of(active(oracle.views_of(model, *oracle.images(), eps)))
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


def test_hat_gives_points_beyond_the_adversarial_ones_the_standard_networks_label(model):
    x, _, y = points()
    x_adv = FIXED(None, x, y, LinfBall(0.4))
    active = oracle.begun(HAT("other", attack=FIXED), model)
    with torch.no_grad():  # no class outweighs the others at x, so that x_adv has other labels
        active.standard.model[-1].bias.sub_(oracle.logits(active.standard.model, x).mean(0))
    label = oracle.logits(active.standard.model, x_adv).argmax(1)
    assert (label != y).any() and (label != oracle.logits(active.standard.model, x).argmax(1)).any()
    clean, attacked, helper = (oracle.clean_pass(model, each)[0] for each in (x, x_adv, x + 2 * (x_adv - x)))
    target = oracle.loss_of_logits(clean, y) + 2.5 * divergence(clean, attacked)
    check(active, model, (target + 0.5 * oracle.loss_of_logits(helper, label)).mean(), eps=0.4)
    assert not any(parameter.requires_grad for parameter in active.standard.model.parameters())


def test_hat_without_helper_is_trades(model):
    active = oracle.begun(HAT("other", kl_weight=6.0, helper_weight=0.0, attack=FIXED), model)
    target = oracle.loss_of(TRADES(attack=FIXED)(oracle.views_of(model, *oracle.images(), EPS)))
    check(active, model, target)


def test_lbgat_by_hand_with_gradient_into_student_and_teacher(model):
    x, x_adv, y = points()
    active = oracle.begun(LBGAT("cnn7", kl_weight=1.5, attack=FIXED), model)
    teacher = active.teacher.model
    found = oracle.loss_of(active(oracle.views_of(model, x, y, EPS)))
    attacked, clean = (oracle.clean_pass(model, each)[0] for each in (x_adv, x))
    guide = oracle.clean_pass(teacher, x)[0]
    target = (attacked - guide).square().mean() + oracle.loss_of_logits(guide, y).mean()
    target = target + 1.5 * divergence(clean, attacked).mean()
    torch.testing.assert_close(found, target)
    for net in (model, teacher):
        oracle.assert_same_gradients(oracle.gradients(found, net), oracle.gradients(target, net))
    assert {id(p) for p in active.teacher.parameters()} == {id(p) for p in teacher.parameters()}
    assert int(teacher[2].num_batches_tracked) == 1


def teachers_say(active, x, x_adv, temperatures=(1.0, 1.0)) -> list[Tensor]:
    nets = (active.robust.model, active.clean.model)
    return [oracle.logits(n, at) / t for n, at, t in zip(nets, (x_adv, x), temperatures, strict=True)]


def test_mtard_by_hand_at_the_first_step_with_even_weights(model):
    x, x_adv, _ = points()
    active = oracle.begun(MTARD("robust", "clean", attack=FIXED), model)
    students = [oracle.clean_pass(model, each)[0] for each in (x_adv, x)]
    taught = teachers_say(active, x, x_adv)
    assert not torch.equal(*taught)
    losses = [divergence(t, s).mean() / 4 for t, s in zip(taught, students, strict=True)]
    check(active, model, 0.5 * losses[0] + 0.5 * losses[1])


def test_mtards_weights_follow_the_losses_within_the_step_and_stay_when_it_is_computed_again():
    x, x_adv, y = points()
    net = oracle.small_net()
    active = oracle.begun(MTARD("robust", "clean", rate=0.25, attack=FIXED), net)
    first = active(oracle.views_of(net, x, y, EPS))
    start = [float(2 * term.detach().mean()) for term in first.values()]
    active.after_step(MOMENT)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3)
    students = [oracle.clean_pass(net, each)[0] for each in (x_adv, x)]
    losses = [divergence(t, s).mean() / 4 for t, s in zip(teachers_say(active, x, x_adv), students, strict=True)]
    rates = [float(loss.detach()) / begin for loss, begin in zip(losses, start, strict=True)]
    clean = 0.5 - 0.25 * (0.5 - rates[1] / sum(rates))
    assert abs(clean - 0.5) > 1e-3
    for _ in range(2):
        check(active, net, (1 - clean) * losses[0] + clean * losses[1])
    active.after_step(MOMENT)
    assert active.shares.tolist() == pytest.approx([1 - clean, clean])
    other = oracle.begun(MTARD("robust", "clean", attack=FIXED), net)
    other.restore(active.state())
    assert torch.equal(other.first, active.first) and torch.equal(other.shares, active.shares)
    assert MTARD("a", "b").rate_factor(214.9) == 1 and MTARD("a", "b").rate_factor(285.0) == pytest.approx(1e-3)


def test_b_mtard_cools_the_teacher_of_larger_entropy_and_heats_the_other_from_one_upwards():
    x, x_adv, _ = points()
    net = oracle.small_net()
    method = MTARD("robust", "clean", rate=0.0, temperature_rate=0.5, hottest=1.7, attack=FIXED)
    active = oracle.begun(method, net)
    heats = [1.0, 1.0]
    for _ in range(4):
        taught = teachers_say(active, x, x_adv, heats)
        entropy = [float(-(t.softmax(1) * t.log_softmax(1)).sum(1).mean()) for t in taught]
        students = [oracle.clean_pass(net, each)[0] for each in (x_adv, x)]
        losses = [divergence(t, s).mean() / 4 for t, s in zip(taught, students, strict=True)]
        check(active, net, 0.5 * losses[0] + 0.5 * losses[1])
        active.after_step(MOMENT)
        up = 0 if entropy[0] < entropy[1] else 1
        heats[up] = min(heats[up] + 0.5, 1.7)
        heats[1 - up] = max(heats[1 - up] - 0.5, 1.0)
        assert active.temperatures.tolist() == pytest.approx(heats)
    assert max(heats) > 1


@pytest.mark.parametrize("unlabelled", [(), (0, 2, 3)])
def test_awr_by_hand_with_a_trained_weight_and_labels_for_some(model, unlabelled):
    x, x_adv, y = points()
    y = y.clone()
    y[list(unlabelled)] = -1
    active = oracle.begun(AWR("other", attack=FIXED), model)
    found = oracle.loss_of(active(oracle.views_of(model, x, y, EPS)))
    q = oracle.logits(active.teacher.model, x)
    clean, attacked = (oracle.clean_pass(model, each)[0] for each in (x, x_adv))
    p = clean.softmax(1)
    labelled = [b for b in range(len(y)) if y[b] >= 0]
    label = sum(-0.8 * p[b, y[b]].log() - 0.2 * p[b].log().mean() for b in labelled) / len(labelled)
    taught = divergence(q / 1.2, clean / 1.2).mean()

    def weight(p: Tensor, p_adv: Tensor) -> Tensor:
        return 0.5 * (q.softmax(1) * p).sum(1) + 0.5 * (1 - (q.softmax(1) * p_adv).sum(1))

    target = label + 4 * taught + 20 * (weight(p, attacked.softmax(1)) * divergence(clean, attacked)).mean()
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))


def test_awr_attacks_the_teachers_label_and_a_batch_without_labels_has_no_label_loss():
    x, _, y = points()
    net = oracle.small_net()
    seen = []

    def attack(network, x, y, ball, **options):
        seen.append(y)
        return x

    active = oracle.begun(AWR("other", attack=attack), net)
    terms = active(oracle.views_of(net, x, torch.full_like(y, -1), EPS))
    assert torch.equal(seen[0], oracle.logits(active.teacher.model, x).argmax(1))
    assert not terms["clean"].any() and terms["clean"].isfinite().all()
    loss = labelled_cross_entropy(torch.zeros(4, 2), torch.tensor([0, -1, 1, -1]), 0.0)
    assert float(loss.mean()) == pytest.approx(0.6931472)


@dataclass(frozen=True)
class Signed:
    """One step along the gradient of the network that is attacked, and a note of who was."""

    seen: list = field(default_factory=list, compare=False)
    seed: int = 0
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def __call__(self, model, x, y, ball, *, generator=None, index=None):
        self.seen.append(len(x))
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(oracle.loss_of_logits(model(leaf), y).sum(), leaf)
        return (x + EPS * gradient.sign()).clamp(0, 1)


def test_pubdef_trains_on_points_of_a_source_drawn_for_every_image(model):
    x, _, y = points()
    attack = Signed()
    active = oracle.begun(PubDef(("first", "second one"), attack=attack), model)
    chosen = (2 * torch.rand(len(x), dtype=x.dtype, generator=torch.Generator().manual_seed(0))).long().tolist()
    moved = []
    for b, number in enumerate(chosen):
        leaf = x[b : b + 1].clone().requires_grad_()
        loss = oracle.loss_of_logits(oracle.logits(active.sources[number].model, leaf), y[b : b + 1]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        moved.append((leaf + EPS * gradient.sign()).detach().clamp(0, 1))
    clean, transferred = (oracle.clean_pass(model, each)[0] for each in (x, torch.cat(moved)))
    target = oracle.loss_of_logits(clean, y) / 2 + oracle.loss_of_logits(transferred, y) / 2
    check(active, model, target.mean())
    assert attack.seen == [chosen.count(0), chosen.count(1)] and 0 < chosen.count(0) < 6
    with pytest.raises(ValueError, match=r"pubdef needs networks to be attacked: pubdef:sources=A"):
        PubDef(())
