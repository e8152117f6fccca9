"""VAT: the direction and the loss by hand, and what it does to a linear model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust.regularizers.vat import VAT
from tests.robust.objectives import oracle


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vat_by_hand_with_batch_statistics_that_leave_the_running_ones_alone(batch_norm):
    model = oracle.small_net(batch_norm)
    x, y = oracle.images()
    views = oracle.views_of(model, x, y, 0.1)
    found = VAT(weight=1.5, eps=0.8, xi=1e-3, iterations=2, entropy_weight=0.3)(views)
    clean = oracle.clean_pass(model, x)[0]
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    d = d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for _ in range(2):
        leaf = d.clone().requires_grad_()
        value = divergence(clean.detach(), oracle.clean_pass(model, x + 1e-3 * leaf)[0]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        d = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    moved = oracle.clean_pass(model, x + 0.8 * d)[0]
    targets = {
        "vat": 1.5 * divergence(clean.detach(), moved).mean(),
        "entropy": -0.3 * (clean.softmax(1) * clean.softmax(1).log()).sum(1).mean(),
    }
    assert found.keys() == targets.keys()
    for name, target in targets.items():
        torch.testing.assert_close(found[name], target, rtol=1e-5, atol=1e-8)
        oracle.assert_same_gradients(oracle.gradients(found[name], model), oracle.gradients(target, model), 1e-5)
    if batch_norm:
        assert int(model[2].num_batches_tracked) == 1


def test_on_two_linear_classes_the_direction_is_that_of_the_weights_difference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2)).double()
    x, _ = oracle.images()
    views = oracle.views_of(model, x, torch.zeros(len(x), dtype=torch.long), 0.1)
    VAT(eps=2.0)(views)
    (r,) = (value for key, value in views.kept.items() if key[0] == "vat")
    w = model[1].weight[0] - model[1].weight[1]
    cosine = torch.cosine_similarity(r.flatten(1), w.detach()[None], dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((len(x),), 2.0, dtype=torch.float64))


def test_without_a_weight_and_a_radius_nothing_is_lost():
    model = oracle.small_net()
    terms = VAT(eps=0.0)(oracle.views_of(model, *oracle.images(), 0.1))
    assert terms.keys() == {"vat"} and float(terms["vat"].detach()) == pytest.approx(0, abs=1e-15)
