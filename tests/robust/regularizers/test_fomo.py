"""FOMO: the consistency loss by hand, and what is forgotten when."""

from __future__ import annotations

import copy

import pytest
import torch

from attacks.threat import LinfBall
from robust.active import Moment
from robust.objectives.natural import Natural
from robust.objectives.pgd import PGDTraining
from robust.regularizers.fomo import FOMO, forget_
from tests.robust.objectives import oracle

EPS = 0.06


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_is_held_to_its_average_at_the_adversarial_points(batch_norm):
    model = oracle.small_net(batch_norm)
    x, y = oracle.images()
    active = oracle.begun(FOMO(weight=0.7, start_epoch=2), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    x_adv = oracle.Fixed()(None, x, y, LinfBall(EPS))
    for epoch in (1.9, 2.0):
        views = oracle.views_of(model, x, y, EPS, epoch=epoch)
        PGDTraining(attack=oracle.Fixed(), batch_norm="own")(views)
        found = active(views)["consistency"]
    p = oracle.logits(active.stable.model, x_adv).softmax(1)
    q = oracle.clean_pass(model, x_adv)[0].softmax(1)
    target = 0.7 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))
    early = oracle.views_of(model, x, y, EPS, epoch=1.9)
    PGDTraining(attack=oracle.Fixed(), batch_norm="own")(early)
    assert not active(early)["consistency"]
    natural = oracle.views_of(model, x, y, EPS, epoch=2.0)
    Natural()(natural)
    with pytest.raises(ValueError, match="try pgd"):
        active(natural)


def test_a_share_of_the_weights_is_drawn_anew_and_nothing_else_moves():
    model = oracle.small_net(batch_norm=True, hidden=4)
    before = copy.deepcopy(model)
    stream = torch.get_rng_state()
    forget_(model, 0.3, seed=5)
    assert torch.equal(stream, torch.get_rng_state())
    moved = total = 0
    for name, value in model.state_dict().items():
        changed = value != before.state_dict()[name]
        layer = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            moved, total = moved + int(changed.sum()), total + value.numel()
            assert value.abs().max() <= before.state_dict()[name].abs().max()
        else:
            assert not changed.any(), name
    assert 0.2 < moved / total < 0.4
    again = copy.deepcopy(before)
    forget_(again, 0.3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    forget_(again, 1.0, seed=6)
    assert (again[-1].weight != before[-1].weight).all()


def test_it_forgets_behind_its_epochs_only_and_needs_a_run_that_reaches_them():
    model = oracle.small_net()
    # Not behind the last epoch: what is forgotten there is never learnt again.
    active = oracle.begun(FOMO(start_epoch=2, every=3, share=0.5), model, epochs=11)
    forgot = []
    for epoch in range(1, 12):
        before = model[-1].weight.clone()
        active.after_epoch(Moment(model, 0, float(epoch), lambda: iter(())))
        if not torch.equal(before, model[-1].weight):
            forgot.append(epoch)
    assert forgot == [2, 5, 8]
    with pytest.raises(ValueError, match=r"fomo: start_epoch=100 of 30 epochs forgets nothing; .* fomo:start_epoch=15"):
        oracle.begun(FOMO(), model, epochs=30)
