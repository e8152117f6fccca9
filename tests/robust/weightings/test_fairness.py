"""CFA, FRL and effective numbers: what classes weigh, when that changes, and what it acts on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from robust.active import Moment
from robust.class_errors import class_errors
from robust.objectives.pgd import PGDTraining
from robust.objectives.trades import TRADES
from robust.weightings.cfa import CFA
from robust.weightings.effective_number import EffectiveNumber, effective_weights
from robust.weightings.frl import FRL, fair_weights, limited
from tests.robust.objectives import oracle

EPS = 0.06


def moment(epoch: float, model=None, held_out=(), labelled=()) -> Moment:
    return Moment(model, 0, epoch, lambda: iter(()), lambda: iter(labelled), lambda: iter(held_out))


def terms_of(objective, batch_norm=False):
    views = oracle.views_of(oracle.small_net(batch_norm), *oracle.images(), EPS)
    return views, objective(views)


def test_cfa_scales_radii_and_mixes_terms_by_last_epochs_class_accuracies():
    active = CFA(start_epoch=2).start(SimpleNamespace(epochs=5, classes=4, objective=None))
    views, terms = terms_of(TRADES(kl_weight=1.0, attack=oracle.Fixed()))
    share = 6 / 7
    found = active(views, terms)
    torch.testing.assert_close(found["clean"], (1 - share) * terms["clean"])
    torch.testing.assert_close(found["kl"], share * terms["kl"])
    right = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 3])
    for epoch in (1.0, 2.0):
        seen = SimpleNamespace(adversarial=torch.cat([right, torch.zeros(4, 2)], 1), y=labels)
        active.see(seen, moment(epoch - 0.5))
        assert active.radius(labels) is None
        active.after_epoch(moment(epoch))
    accuracy = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    eps, step = active.radius(labels)
    torch.testing.assert_close(eps, 0.5 + accuracy[labels])
    assert torch.equal(step, torch.ones(4, dtype=torch.float64))
    b = (0.5 + accuracy[views.y]) * 6
    b = b / (1 + b)
    found = active(views, terms)
    torch.testing.assert_close(found["clean"], (1 - b) * terms["clean"])
    torch.testing.assert_close(found["kl"], b * terms["kl"])
    assert not active.counts.any()
    other = CFA(start_epoch=2).start(SimpleNamespace(epochs=5, classes=4, objective=None))
    other.restore(active.state())
    assert torch.equal(other.radius(labels).eps, eps)


def test_cfa_leaves_the_terms_of_adversarial_training_alone_or_says_what_it_needs():
    views, terms = terms_of(PGDTraining(attack=oracle.Fixed()))
    run = SimpleNamespace(epochs=20, classes=4, objective=None)
    assert CFA(kl_weight=0.0).start(run)(views, terms) is terms
    with pytest.raises(ValueError, match=r"cfa mixes the terms clean and kl .* has adversarial; .* cfa:kl_weight=0"):
        CFA().start(run)(views, terms)
    with pytest.raises(ValueError, match="cfa: start_epoch=10 of 10 epochs leaves none"):
        CFA().start(SimpleNamespace(epochs=10, classes=4))


class Threshold(nn.Module):
    """Class 1 where the pixel is above 0.5, with a layer whose mode can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Identity().eval()

    def forward(self, x):
        assert not self.training
        above = x.flatten(1)[:, 0] - 0.5
        return torch.stack([-above, above], 1) * 9


HELD_OUT = [
    (torch.tensor([0.1, 0.45, 0.6]).view(3, 1, 1, 1), torch.tensor([0, 0, 0])),
    (torch.tensor([0.9, 0.52, 0.56, 0.3]).view(4, 1, 1, 1), torch.tensor([1, 1, 1, 1])),
]
ATTACK = PGD(steps=3, step_size=1.0, keep="last")


def test_class_errors_are_counted_clean_and_under_attack_in_evaluation_mode():
    model = Threshold().train()
    model.frozen.eval()
    found = class_errors(model, iter(HELD_OUT), ATTACK, LinfBall(0.1), 2)
    assert found.clean.tolist() == pytest.approx([1 / 3, 1 / 4])
    assert found.attacked.tolist() == pytest.approx([2 / 3, 3 / 4])
    assert found.images.tolist() == [3, 4]
    assert model.training and not model.frozen.training
    with pytest.raises(ValueError, match=r"held-out images of every class, got \[3, 0\]; set validation=0.1"):
        class_errors(model, iter(HELD_OUT[:1]), ATTACK, LinfBall(0.1), 2)


def test_frl_moves_multipliers_by_hand_and_the_loss_is_divided_by_all_weights():
    run = SimpleNamespace(epochs=80, classes=2, ball=LinfBall(0.1), objective=None)
    frl = FRL(rate=0.4, radius_rate=0.5, clean_bound=-0.1, boundary_bound=-0.2, limit=0.2, attack=ATTACK)
    active = frl.start(run)
    model = Threshold()
    active.after_epoch(moment(1.0, model, HELD_OUT))
    clean, boundary, all_clean, all_boundary = (1 / 3, 1 / 4), (1 / 3, 1 / 2), 2 / 7, 3 / 7
    excess = [error - all_clean + 0.1 for error in clean]
    boundary_excess = [error - all_boundary + 0.2 for error in boundary]

    def cut(values):
        positive = [max(v, 0) for v in values]
        scale = min(1, 0.2 / sum(positive))
        return [scale * v for v in positive]

    assert active.clean.tolist() == pytest.approx(cut([0.4 * v for v in excess]))
    assert active.boundary.tolist() == pytest.approx(cut([0.8 * v for v in boundary_excess]))
    eps, step = active.radius(torch.tensor([0, 1]))
    expected = [min(max(math.exp(2 * 0.5 * v), 0.98), 3) for v in boundary_excess]
    assert eps.tolist() == pytest.approx(expected) and step.tolist() == [1, 1]
    views = SimpleNamespace(x=torch.zeros(3, 1).double(), y=torch.tensor([0, 1, 1]))
    terms = {"clean": torch.tensor([1.0, 2, 3]).double(), "kl": torch.tensor([5.0, 6, 7]).double()}
    w = [[0.5 + v - sum(m) / 2 for v in m] for m in (active.clean.tolist(), active.boundary.tolist())]
    a, b = ([pair[y] for y in (0, 1, 1)] for pair in w)
    total = sum(x * t for x, t in zip(a, (1, 2, 3), strict=True)) + sum(
        x * t for x, t in zip(b, (5, 6, 7), strict=True)
    )
    assert float(oracle.loss_of(active(views, terms))) == pytest.approx(total / (sum(a) + sum(b)))
    other = frl.start(run)
    other.restore(active.state())
    assert torch.equal(other.radius(views.y).eps, active.radius(views.y).eps)


def test_frl_starts_even_halves_its_rate_and_keeps_weights_positive():
    run = SimpleNamespace(epochs=80, classes=2, ball=LinfBall(0.1), objective=None)
    active = FRL(attack=ATTACK).start(run)
    views, terms = terms_of(TRADES(kl_weight=1.0, attack=oracle.Fixed()))
    active.clean, active.boundary = torch.zeros(2, 4, dtype=torch.float64)
    found = active(views, terms)
    torch.testing.assert_close(found["clean"], terms["clean"] / 2)
    torch.testing.assert_close(found["kl"], terms["kl"] / 2)
    gains = []
    for epoch in (38.0, 39.0, 79.0):
        active = FRL(clean_bound=-0.1, limit=9.0, attack=ATTACK).start(run)
        active.after_epoch(moment(epoch, Threshold(), HELD_OUT))
        gains.append(float(active.clean[0]))
    assert gains[0] == pytest.approx(2 * gains[1]) and gains[0] == pytest.approx(4 * gains[2])
    worst = limited(torch.tensor([0.0, 0.0, 7.0], dtype=torch.float64), 0.5)
    assert worst.tolist() == [0, 0, 0.5] and float(fair_weights(worst).min()) > 0
    assert FRL(radius_rate=0.0).start(run).radius(views.y) is None
    with pytest.raises(
        ValueError, match=r"frl weights the terms clean and kl \(use trades\), the objective has adversar"
    ):
        active(views, {"adversarial": terms["clean"]})


def test_effective_numbers_go_from_even_weights_to_inverse_counts_and_wait_for_their_epoch():
    counts = torch.tensor([2, 8, 0])
    torch.testing.assert_close(effective_weights(counts, 0.0), torch.ones(3, dtype=torch.float64))
    raw = [(1 - 0.9) / (1 - 0.9**n) for n in (2, 8, 1)]
    assert effective_weights(counts, 0.9).tolist() == pytest.approx([3 * w / sum(raw) for w in raw])
    rare = effective_weights(torch.tensor([10, 40]), 1 - 1e-9)
    assert float(rare[0] / rare[1]) == pytest.approx(4, rel=1e-5)
    active = EffectiveNumber(beta=0.9, start_epoch=2).start(SimpleNamespace(epochs=3, classes=4))
    views, terms = terms_of(TRADES(attack=oracle.Fixed()))
    labelled = [(None, torch.tensor([0, 0, 1])), (None, torch.tensor([2, 3, 3]))]
    active.after_epoch(moment(1.0, labelled=labelled))
    assert active(views, terms) is terms
    active.after_epoch(moment(2.0, labelled=labelled))
    found = active(views, terms)
    table = effective_weights(torch.tensor([2, 1, 1, 2]), 0.9)
    torch.testing.assert_close(found["clean"], table[views.y] * terms["clean"])
    assert torch.equal(found["kl"], terms["kl"])
    with pytest.raises(ValueError, match="effective_number: start_epoch=160 of 30 epochs"):
        EffectiveNumber().start(SimpleNamespace(epochs=30, classes=4))
