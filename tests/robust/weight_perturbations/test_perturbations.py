"""AWP, RWP and SAM: directions and lengths by hand, statistics, and what the optimiser's step leaves behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from certify.tracing import capture
from robust.objectives.mtl_ibp import MTLIBP
from robust.objectives.pgd import PGDTraining
from robust.objectives.trades import TRADES
from robust.regularizers.l1 import L1
from robust.seeds import seeded
from robust.settings import Settings
from robust.step import BatchLoss, StepPlan
from robust.weight_perturbation import WEIGHT_PERTURBATIONS, Perturbed
from robust.weight_perturbations.awp import AWP
from robust.weight_perturbations.rwp import RWP
from robust.weight_perturbations.sam import SAM
from tests.robust.objectives import oracle

EPS = 0.05
OBJECTIVE = TRADES(attack=oracle.Fixed())
ALL = [AWP(), AWP(scope="global", parameters="all", proxy=False), RWP(iterations=2), SAM(), SAM(adaptive=True)]


def problem(objective=OBJECTIVE, micro_batch: int = 0) -> tuple[nn.Sequential, BatchLoss]:
    net = oracle.small_net(batch_norm=True)
    x, y = oracle.images()
    plan = StepPlan(objective, [], 1.0, 1.0, seeded("cpu", 0))
    return net, BatchLoss(capture(net, x[:1]), x, y, plan, Settings(eps=EPS, micro_batch=micro_batch))


def raw_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Of the same loss at the model's own weights, from a copy."""
    twin = copy.deepcopy(net)
    views = oracle.views_of(twin, *oracle.images(), EPS)
    oracle.loss_of(OBJECTIVE(views)).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


def named(net: nn.Module, offsets) -> dict[str, Tensor]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: v for p, v in offsets}


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_awp_moves_every_weight_of_two_dimensions_and_more_along_its_gradient_by_gamma_of_its_length():
    net, loss = problem()
    gradients = raw_gradients(net)
    offsets = named(net, AWP(gamma=0.02)(net, loss))
    assert set(offsets) == {name for name, p in net.named_parameters() if p.dim() > 1} and len(offsets) == 3
    for name, v in offsets.items():
        w, g = dict(net.named_parameters())[name].detach(), gradients[name]
        torch.testing.assert_close(v, 0.02 * w.norm() * g / g.norm())
        torch.testing.assert_close(v.norm(), 0.02 * w.norm())


def test_mairs_global_form_has_one_length_over_all_parameters():
    net, loss = problem()
    gradients = raw_gradients(net)
    offsets = named(net, AWP(gamma=0.02, scope="global", parameters="all", proxy=False)(net, loss))
    assert set(offsets) == set(gradients)
    w = torch.cat([p.detach().flatten() for p in net.parameters()]).norm()
    g = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, v in offsets.items():
        torch.testing.assert_close(v, 0.02 * w / g * gradients[name])


def test_rwp_of_one_iteration_with_every_example_is_the_global_direction_and_with_none_nothing():
    net, loss = problem()
    gradients = raw_gradients(net)
    offsets = named(net, RWP(gamma=0.02, max_loss=float("inf"), iterations=1)(net, loss))
    weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
    assert set(offsets) == set(weights)
    w = torch.cat([value.flatten() for value in weights.values()]).norm()
    g = torch.cat([gradients[name].flatten() for name in weights]).norm()
    for name, v in offsets.items():
        torch.testing.assert_close(v, 0.02 * w / g * gradients[name])
    nothing = RWP(max_loss=float("-inf"))(net, loss)
    assert all(not v.any() for _, v in nothing)
    # A regulariser has no examples that could qualify.
    loss.plan = dataclasses.replace(loss.plan, regularizers=[L1(weight=1e-3)])
    assert all(not v.any() for _, v in RWP(max_loss=float("-inf"))(net, loss))


def test_rwp_looks_at_the_examples_below_the_threshold_anew_at_each_perturbed_weight():
    net, loss = problem()
    views = oracle.views_of(copy.deepcopy(net), *oracle.images(), EPS)
    losses = torch.stack(list(OBJECTIVE(views).values())).sum(0)
    limit = float(losses.detach().median()) + 1e-9
    weights = [p for p in net.parameters() if p.dim() > 1]
    length = torch.cat([p.detach().flatten() for p in weights]).norm()
    total = [torch.zeros_like(p) for p in weights]
    twin = copy.deepcopy(net)
    moved = [p for p in twin.parameters() if p.dim() > 1]
    for _ in range(3):
        twin.zero_grad()
        terms = OBJECTIVE(oracle.views_of(twin, *oracle.images(), EPS))
        each = torch.stack(list(terms.values())).sum(0)
        (each * (each < limit)).mean().backward()
        total = [t + p.grad for t, p in zip(total, moved, strict=True)]
        scale = 0.1 * length / torch.cat([t.flatten() for t in total]).norm()
        with torch.no_grad():
            for p, w, t in zip(moved, weights, total, strict=True):
                p.copy_(w + scale * t)
    offsets = RWP(gamma=0.1, max_loss=limit, iterations=3)(net, loss)
    for (p, v), other in zip(offsets, moved, strict=True):
        torch.testing.assert_close(p + v, other)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_moves_all_parameters_by_rho_along_the_gradient(adaptive):
    net, loss = problem()
    gradients = raw_gradients(net)
    offsets = named(net, SAM(rho=0.3, adaptive=adaptive)(net, loss))
    scale = {name: p.detach().abs() if adaptive else torch.ones_like(p) for name, p in net.named_parameters()}
    length = torch.cat([(scale[name] * g).flatten() for name, g in gradients.items()]).norm()
    assert set(offsets) == set(gradients)
    for name, v in offsets.items():
        torch.testing.assert_close(v, 0.3 * scale[name] ** 2 * gradients[name] / length)


@pytest.mark.parametrize("method", ALL, ids=WEIGHT_PERTURBATIONS.spell)
def test_looking_for_a_perturbation_leaves_weights_gradients_and_statistics_as_they_were(method):
    net, loss = problem()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = state(net)
    method(net, loss)
    after = state(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert moved == (set() if method.statistics_follow == "perturbed" else statistics)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())


def step(method, optimizer, net, loss) -> None:
    perturbed = Perturbed(method(net, loss), method.restore)
    loss.backward(move_statistics=method.statistics_follow != "unperturbed")
    perturbed.restore("before_step")
    optimizer.step()
    perturbed.restore("after_step")


def test_awp_steps_at_the_perturbed_weights_weight_decay_included_and_sam_at_the_old_ones():
    for method in (AWP(gamma=0.05), SAM(rho=0.2)):
        net, loss = problem()
        old = {name: p.detach().clone() for name, p in net.named_parameters()}
        offsets = named(net, method(net, loss))
        step(method, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5), net, loss)
        for name, p in net.named_parameters():
            v = offsets.get(name, torch.zeros_like(p))
            decayed = old[name] + v if isinstance(method, AWP) else old[name]
            torch.testing.assert_close(p.detach(), old[name] - 0.1 * (p.grad + 0.5 * decayed))


@pytest.mark.parametrize("method", ALL, ids=WEIGHT_PERTURBATIONS.spell)
def test_the_gradient_of_the_step_is_that_of_the_loss_at_the_perturbed_weights(method):
    net, loss = problem()
    twin = copy.deepcopy(net)
    offsets = method(net, loss)
    perturbed = Perturbed(offsets, method.restore)
    loss.backward()
    with torch.no_grad():
        for p, q in zip(twin.parameters(), net.parameters(), strict=True):
            p.copy_(q)
    expected = raw_gradients(twin)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    perturbed.restore(method.restore)


def test_a_step_moves_statistics_as_often_as_the_objective_passes_in_training_mode():
    """TRADES passes twice; MAIR's AWP lets both evaluations count, AWP and SAM one of them."""
    for method in ALL:
        net, loss = problem()
        step(method, torch.optim.SGD(net.parameters(), lr=0.1), net, loss)
        assert int(net[2].num_batches_tracked) == (4 if method.statistics_follow == "both" else 2)


def test_points_are_searched_once_at_the_unperturbed_weights_in_evaluation_mode():
    net, loss = problem(TRADES())
    points = []
    before = oracle.small_net(batch_norm=True)
    AWP(gamma=0.5)(net, loss)
    points.append(dict(loss.kept[0]))
    step(AWP(gamma=0.5), torch.optim.SGD(net.parameters(), lr=0.1), net, loss)
    assert [torch.equal(value, loss.kept[0][key]) for key, value in points[0].items()] == [True]
    views = oracle.views_of(before, *oracle.images(), EPS)
    views.generator = seeded("cpu", 0)
    TRADES()(views)
    torch.testing.assert_close(*(next(iter(kept.values())) for kept in (views.kept, loss.kept[0])))


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("objective", [MTLIBP(attack=oracle.Fixed()), PGDTraining(attack=oracle.Fixed())])
def test_certified_objectives_are_perturbed_too_and_in_parts_alike(objective, micro_batch):
    whole, loss = problem(objective)
    net, parts = problem(objective, micro_batch)
    for one, other in zip(AWP()(whole, loss), AWP()(net, parts), strict=True):
        torch.testing.assert_close(one[1], other[1])
        assert one[1].any()
