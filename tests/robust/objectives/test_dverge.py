"""DVERGE: the distilled points and the members' losses by hand, and what training them does to transfer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks.methods.pgd import PGD
from attacks.threat import LinfBall
from robust.active import RunFacts
from robust.dataset import parse_dataset
from robust.models.ensemble import Ensemble
from robust.objectives.dverge import DVERGE, hidden_part
from robust.settings import Settings
from robust.trainer import train
from robust.transfer import transfer
from tests.robust.objectives import oracle

EPS = 0.2


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def ensemble(request) -> Ensemble:
    return Ensemble([oracle.small_net(request.param, seed) for seed in range(3)]).train()


def begun(dverge: DVERGE, model: nn.Module):
    return dverge.start(RunFacts(model, oracle.SHAPE, oracle.CLASSES, 6, 9, 1, lambda text: model))


def descend(front: nn.Sequential, x: Tensor, wanted: Tensor, steps: int, length: float) -> Tensor:
    """Sign descent with momentum on the mean square, one example at a time, in training mode throughout."""
    point, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        leaf = point.clone().requires_grad_()
        distance = (oracle.clean_pass(front, leaf)[0] - wanted).square().flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(distance.sum(), leaf)
        for b in range(len(x)):
            velocity[b] += gradient[b] / gradient[b].abs().sum()
        point = (point - length * velocity.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    return point


def test_members_learn_each_others_distilled_points_by_hand(ensemble):
    x, y = oracle.images()
    start = copy.deepcopy(ensemble)
    active = begun(DVERGE(eps=EPS, steps=3, step_size=0.25, weight=0.5, seed=1), ensemble)
    views = oracle.views_of(ensemble, x, y, 0.05, epoch=4.5)
    terms = active(views)
    lengths = [len(hidden_part(active.members[0], 1, epoch).steps) for epoch in range(20)]
    relus = [place for place, layer in enumerate(start.members[0]) if isinstance(layer, nn.ReLU)]
    assert len(set(lengths)) == len(relus) == 2
    count = relus[sorted(set(lengths)).index(lengths[4])]
    targets = x[torch.rand(len(x), dtype=x.dtype, generator=torch.Generator().manual_seed(0)).argsort()]
    points = []
    for member in start.members:
        front = member[:count]
        points.append(descend(front, x, oracle.clean_pass(front, targets)[0].detach(), 3, 0.25 * EPS))
    losses = [
        oracle.loss_of_logits(oracle.clean_pass(member, points[j])[0], y)
        for i, member in enumerate(start.members)
        for j in range(3)
        if i != j
    ]
    target = 0.5 * torch.stack(losses).sum(0)
    assert terms.keys() == {"distilled"}
    torch.testing.assert_close(terms["distilled"], target)
    found = oracle.gradients(oracle.loss_of(terms), ensemble)
    oracle.assert_same_gradients(found, oracle.gradients(target.mean(), start))
    torch.testing.assert_close(oracle.loss_of(active(views)), target.mean())  # the same points when computed again


def test_without_room_for_distillation_every_member_is_trained_on_the_images(ensemble):
    x, y = oracle.images()
    terms = begun(DVERGE(eps=0.0), ensemble)(oracle.views_of(ensemble, x, y, 0.05))
    clean = [oracle.loss_of_logits(oracle.clean_pass(member, x)[0], y) for member in ensemble.members]
    torch.testing.assert_close(terms["distilled"], 2 * torch.stack(clean).sum(0))


def test_adversarial_points_of_each_member_are_added_where_there_is_an_attack(ensemble):
    x, y = oracle.images()
    terms = begun(DVERGE(attack=oracle.Fixed()), ensemble)(oracle.views_of(ensemble, x, y, 0.1))
    x_adv = oracle.Fixed()(None, x, y, LinfBall(0.1))
    own = [oracle.loss_of_logits(oracle.clean_pass(member, x_adv)[0], y) for member in ensemble.members]
    assert list(terms) == ["distilled", "adversarial"]
    torch.testing.assert_close(terms["adversarial"], torch.stack(own).sum(0))


def test_a_single_network_is_refused():
    with pytest.raises(ValueError, match="dverge trains an ensemble; set model=ensemble"):
        begun(DVERGE(), oracle.small_net())
    with pytest.raises(ValueError, match="dverge trains an ensemble"):
        begun(DVERGE(), Ensemble([oracle.small_net()]))


@pytest.mark.slow
def test_points_transfer_less_between_members_that_were_trained_to_diverge(tmp_path: Path):
    """Against members that were trained on the images alone (eps=0)."""
    survived = []
    for number, eps in enumerate((0.0, 0.2)):
        settings = Settings(
            model="ensemble:model=(cnn3:width=8),members=3",
            objective=f"dverge:eps={eps}",
            eps=0.15,
            epochs=12,
            batch_size=100,
            optimizer="adam:lr=0.002",
            validation=0.0,
        )
        model = train(settings, tmp_path / str(number), progress=False).model
        x, y = parse_dataset("digits")(None).test.batch(torch.arange(200))
        members = {str(place): member for place, member in enumerate(model.members)}
        found = transfer(members, x, y, LinfBall(0.15), PGD(steps=10, step_size=0.25, start="clean"))
        assert min(found.clean) > 0.8
        others = [found.accuracy[i][j] for i in range(3) for j in range(3) if i != j]
        survived.append(sum(others) / len(others))
    assert survived[1] > survived[0] + 0.1, survived
