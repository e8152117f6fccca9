"""DAFA: the class weights, what they act on, and when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from certify.tracing import capture
from robust.active import Moment
from robust.objectives.pgd import PGDTraining
from robust.objectives.trades import TRADES
from robust.seeds import seeded
from robust.settings import Settings
from robust.step import BatchLoss, StepPlan
from robust.weighting import Radius, Weighting
from robust.weightings.dafa import DAFA, class_weights
from tests.robust.objectives import oracle


def confusion(seed: int, classes: int = 6) -> Tensor:
    return torch.rand(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(1)


def pair_by_pair(s: Tensor, strength: float) -> list[float]:
    weights = [1.0] * len(s)
    for i in range(len(s)):
        for j in range(len(s)):
            if i != j and s[i, i] < s[j, j]:
                weights[i] += strength * float(s[i, j] * s[j, j])
            elif i != j:
                weights[i] -= strength * float(s[j, i] * s[i, i])
    return weights


@pytest.mark.parametrize("seed", range(4))
def test_class_weights_go_pair_by_pair_and_sum_to_the_number_of_classes(seed):
    s = confusion(seed)
    found = class_weights(s, 1.5)
    torch.testing.assert_close(found, torch.tensor(pair_by_pair(s, 1.5), dtype=torch.float64))
    assert float(found.sum()) == pytest.approx(6)
    assert int(found.argmax()) != int(s.diagonal().argmax())


def test_a_harder_class_that_is_taken_for_an_easier_one_gains():
    s = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    assert class_weights(s, 1.0).tolist() == pytest.approx([1 - 0.4 * 0.9, 1 + 0.4 * 0.9])


def test_predictions_are_gathered_in_the_last_warm_up_epoch_only_and_small_weights_are_clamped():
    active = DAFA(strength=30.0, warmup_epochs=2, least=0.2).start(SimpleNamespace(epochs=3, classes=3, objective=None))
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    for epoch in (0.0, 0.5, 1.0, 1.5):
        views = SimpleNamespace(adversarial=z + epoch, y=y, x=z)
        active.see(views, Moment(None, 0, epoch, None))
        assert active.radius(y) is None
    active.after_epoch(Moment(None, 0, 1.0, None))
    assert active.radius(y) is None and float(active.counts.sum()) == 16
    active.after_epoch(Moment(None, 0, 2.0, None))
    means = torch.stack([z.softmax(1)[y == k].double().mean(0) for k in range(3)])
    expected = class_weights(means, 30.0).clamp(min=0.2)
    torch.testing.assert_close(active.table, expected, rtol=1e-6, atol=1e-6)
    assert float(expected.min()) == 0.2
    other = DAFA(strength=30.0, warmup_epochs=2).start(SimpleNamespace(epochs=3, classes=3, objective=None))
    other.restore(active.state())
    assert all(torch.equal(a, b) for a, b in zip(other.radius(y), active.radius(y), strict=True))


def test_a_run_too_short_for_its_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"dafa: warmup_epochs=70 of 20 epochs leaves none .* dafa:warmup_epochs=10"):
        DAFA().start(SimpleNamespace(epochs=20, classes=3, objective=None))
    with pytest.raises(ValueError, match="dafa needs at least 2 epochs"):
        DAFA(warmup_epochs=0).start(SimpleNamespace(epochs=1, classes=3, objective=None))


class Table(Weighting):
    """Weights of the classes, and factors on radius and steps, as they are given."""

    def __init__(self, table: Tensor, step: Tensor | None = None) -> None:
        self.table, self.step = table, table if step is None else step

    def radius(self, y):
        return Radius(self.table[y], self.step[y])


def attacked_with(weightings, objective) -> tuple[Tensor, Tensor, BatchLoss]:
    net = oracle.small_net()
    x, y = oracle.images()
    plan = StepPlan(objective, [], 1.0, 1.0, seeded("cpu", 0), weightings)
    loss = BatchLoss(capture(net, x[:1]), x, y, plan, Settings(eps=0.01))
    loss.backward()
    (points,) = loss.kept[0].values()
    return (points - x).abs().flatten(1).amax(1), y, loss


@pytest.mark.parametrize("steps", [1, 10])
def test_radius_and_steps_of_every_example_are_scaled_by_its_own_factors(steps):
    from attacks.methods.pgd import PGD

    table = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    objective = TRADES(attack=PGD(steps=steps, step_size=0.25, start="clean", keep="last"))
    moves, y, _ = attacked_with([Table(table)], objective)
    share = 0.25 if steps == 1 else 1.0
    torch.testing.assert_close(moves, share * 0.01 * table[y], rtol=1e-6, atol=1e-9)
    # The radius alone: one step is as long as without factors.
    moves, y, _ = attacked_with([Table(table, torch.ones(4, dtype=torch.float64))], objective)
    expected = 0.0025 * torch.ones(len(y)) if steps == 1 else 0.01 * table[y]
    torch.testing.assert_close(moves, expected.double(), rtol=1e-6, atol=1e-9)
    both = [Table(table), Table(2 / table)]
    moves, y, _ = attacked_with(both, objective)
    torch.testing.assert_close(moves, share * torch.full((len(y),), 0.02, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_the_label_terms_are_weighted_by_class_and_the_divergence_is_not():
    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    active = DAFA(warmup_epochs=1).start(SimpleNamespace(epochs=2, classes=4, objective=None))
    active.table = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    views = oracle.views_of(net, x, y, 0.05)
    terms = TRADES(attack=oracle.Fixed())(views)
    found = active(views, terms)
    torch.testing.assert_close(found["clean"], active.table[y] * terms["clean"])
    assert torch.equal(found["kl"], terms["kl"])


def test_even_similarity_gives_weight_one_up_to_ties(tmp_path: Path):
    even = torch.full((4, 4), 0.25, dtype=torch.float64)
    # Every diagonal entry is equal, so both sides of a pair lose: the published rule, kept.
    assert class_weights(even, 1.0).tolist() == pytest.approx([1 - 3 * 0.0625] * 4)
    nearly = even + torch.diag(torch.tensor([0.0, 1e-9, 2e-9, 3e-9], dtype=torch.float64))
    assert float(class_weights(nearly, 1.0).sum()) == pytest.approx(4)


def test_on_adversarial_training_the_one_term_is_weighted_and_the_attack_keeps_the_radius_of_each_class():
    """Not the authors' branch for PGD, whose second step undoes the class radius."""
    from attacks.methods.pgd import PGD

    table = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    attack = PGD(steps=10, step_size=0.25, start="clean", keep="last", mode="keep")
    moves, y, _ = attacked_with([Table(table)], PGDTraining(attack=attack, batch_norm="own"))
    torch.testing.assert_close(moves, 0.01 * table[y], rtol=1e-6, atol=1e-9)
    active = DAFA(warmup_epochs=1).start(SimpleNamespace(epochs=2, classes=4, objective=None))
    active.table = table
    views = oracle.views_of(oracle.small_net(), *oracle.images(), 0.05)
    terms = PGDTraining(attack=oracle.Fixed(), batch_norm="own")(views)
    found = active(views, terms)
    assert list(found) == ["adversarial"]
    torch.testing.assert_close(found["adversarial"], table[views.y] * terms["adversarial"])
