"""FGSM-AT, FGSM-RS, N-FGSM and Free AT against their algorithms written out on the module itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.methods.fgsm import FGSM
from attacks.threat import L2Ball, LinfBall
from certify.tracing import capture
from robust.active import Moment
from robust.objectives.fgsm_at import FGSMTraining
from robust.objectives.fgsm_rs import FGSMRandomStart
from robust.objectives.free_at import FreeAT
from robust.objectives.n_fgsm import NFGSM
from robust.seeds import seeded
from robust.settings import Settings
from robust.step import BatchLoss, StepPlan
from robust.views import Views
from robust.weight_perturbations.awp import AWP
from tests.robust.objectives import oracle

EPS = 0.06


def sign_of_gradient(net: nn.Module, point: Tensor, y: Tensor) -> Tensor:
    """Sign of the input gradient in training mode; moves the running statistics."""
    point = point.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(point), y), point)[0].sign()


def check(objective, published) -> None:
    """The objective's loss, gradients and running statistics are those of `published(net, x, y, noise)`."""
    for batch_norm in (False, True):
        net = oracle.small_net(batch_norm)
        twin = copy.deepcopy(net)
        x, y = oracle.images()
        found = oracle.loss_of(objective(oracle.views_of(net, x, y, EPS)))
        noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        target = F.cross_entropy(twin(published(twin, x, y, noise)), y)
        torch.testing.assert_close(found, target)
        oracle.assert_same_gradients(oracle.gradients(found, net), oracle.gradients(target, twin))
        for name, value in twin.named_buffers():
            torch.testing.assert_close(dict(net.named_buffers())[name], value)


def test_fgsm_at_is_one_step_of_eps_from_the_image_in_training_mode():
    check(FGSMTraining(), lambda net, x, y, noise: (x + EPS * sign_of_gradient(net, x, y)).clamp(0, 1))


def test_fgsm_rs_is_a_longer_step_from_a_random_point_cut_to_ball_and_pixels():
    def published(net, x, y, noise):
        low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
        start = low + noise * (high - low)
        return torch.minimum(torch.maximum(start + 1.25 * EPS * sign_of_gradient(net, start, y), low), high)

    check(FGSMRandomStart(), published)


def test_n_fgsm_steps_from_noise_of_twice_the_radius_and_cuts_nothing():
    seen = []

    def published(net, x, y, noise):
        start = x + 2 * EPS * (2 * noise - 1)
        seen.append(start + EPS * sign_of_gradient(net, start, y))
        assert ((seen[-1] - x).abs().max() > 2 * EPS) and (seen[-1].min() < 0)
        return seen[-1]

    check(NFGSM(), published)
    assert len(seen) == 2


def test_n_fgsm_without_noise_and_away_from_the_pixels_limits_is_fgsm_at():
    net = oracle.small_net()
    x, y = oracle.images()
    x = x.clamp(0.2, 0.8)
    first, second = (oracle.loss_of(o(oracle.views_of(net, x, y, EPS))) for o in (NFGSM(noise=0.0), FGSMTraining()))
    torch.testing.assert_close(first, second)


def test_n_fgsm_refuses_other_norms():
    views = Views(capture(oracle.small_net(), oracle.images()[0]), *oracle.images(), L2Ball(0.5))
    with pytest.raises(ValueError, match="n_fgsm steps along signs, which is for linf; the run's norm is l2"):
        NFGSM()(views)


def test_the_step_of_every_example_follows_its_pace():
    net, (x, y) = oracle.small_net(), oracle.images()
    pace = torch.linspace(0.2, 1.0, len(x), dtype=x.dtype)
    moved = (FGSM(mode="keep")(net, x, y, LinfBall(EPS), pace=pace) - x).abs().flatten(1).amax(1)
    torch.testing.assert_close(moved, pace * EPS, rtol=1e-6, atol=1e-9)


# --- Free AT


def run_free(perturbation=None, sizes=(6, 4, 6), replays=3, micro_batch=0, batch_norm=True):
    """(network, active objective) behind the replays of some mini-batches under plain gradient descent."""
    net = oracle.small_net(batch_norm)
    run = SimpleNamespace(model=net, input_shape=oracle.SHAPE)
    active = FreeAT(replays=replays).start(run)
    active.delta = active.delta.double()
    moment = Moment(net, 0, 0.0, None)
    graph = capture(net, oracle.images()[0])
    for number, size in enumerate(sizes):
        x, y = oracle.images(size, seed=number)
        for _ in range(replays):
            plan = StepPlan(active, [], 1.0, 1.0, seeded("cpu", 0), watchers=[active], moment=moment)
            loss = BatchLoss(graph, x, y, plan, Settings(eps=EPS, micro_batch=micro_batch))
            net.zero_grad()
            if perturbation is not None:
                perturbation(net, loss)
            loss.backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
            active.after_step(moment)
    return net, active


def published_free(sizes=(6, 4, 6), replays=3, batch_norm=True):
    """The same as its authors' loop: one backward pass for weights and perturbation."""
    net = oracle.small_net(batch_norm)
    delta = torch.zeros(6, *oracle.SHAPE, dtype=torch.float64)
    for number, size in enumerate(sizes):
        x, y = oracle.images(size, seed=number)
        for _ in range(replays):
            leaf = delta[:size].clone().requires_grad_()
            net.zero_grad()
            F.cross_entropy(net(x + leaf), y).backward()
            moved = (leaf + EPS * leaf.grad.sign()).clamp(-EPS, EPS).detach()
            delta[:size] = torch.minimum(torch.maximum(moved, -x), 1 - x)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
    return net, delta


def same_state(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_free_at_is_the_authors_loop_with_a_perturbation_that_outlives_a_smaller_mini_batch():
    net, active = run_free()
    twin, delta = published_free()
    same_state(net, twin)
    torch.testing.assert_close(active.delta, delta)
    assert float(delta.abs().max()) == pytest.approx(EPS)


def test_free_at_in_parts_keeps_every_place_its_own():
    net, active = run_free(micro_batch=4, batch_norm=False)
    twin, delta = published_free(batch_norm=False)
    same_state(net, twin)
    torch.testing.assert_close(active.delta, delta)


def test_a_weight_perturbation_does_not_move_the_perturbation_of_free_at_twice():
    first, second = run_free(perturbation=AWP()), run_free()
    torch.testing.assert_close(first[1].delta, second[1].delta)


def test_free_at_goes_on_from_its_state_and_refuses_no_replays():
    _, active = run_free(sizes=(6,))
    other = FreeAT().start(SimpleNamespace(model=nn.Linear(1, 1), input_shape=oracle.SHAPE))
    other.restore(active.state())
    assert torch.equal(other.delta, active.delta)
    with pytest.raises(ValueError, match="replays=0: expected at least 1"):
        FreeAT(replays=0)
