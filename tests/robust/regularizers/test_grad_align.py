"""GradAlign: its value and its gradient in the weights, through a gradient in the input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robust.regularizers.grad_align import GradAlign, mean_cosine
from tests.robust.objectives import oracle

EPS = 0.2


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param)


def by_hand(model, fix_first: bool = True):
    x, y = oracle.images()
    noise = EPS * (2 * torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) - 1)
    gradients = []
    for point in (x, x + noise):
        point = point.clone().requires_grad_()
        loss = F.cross_entropy(oracle.clean_pass(model, point)[0], y)
        gradients.append(torch.autograd.grad(loss, point, create_graph=True)[0].flatten(1))
    first, second = gradients
    return 0.7 * (1 - F.cosine_similarity(first.detach() if fix_first else first, second).mean())


def test_value_and_gradient_are_those_of_the_formula_with_the_gradient_at_the_image_fixed(model):
    target = by_hand(model)
    value = GradAlign(weight=0.7)(oracle.views_of(model, *oracle.images(), EPS))["grad_align"]
    assert value > 0.01
    torch.testing.assert_close(value, target)
    found = oracle.gradients(value, model)
    oracle.assert_same_gradients(found, oracle.gradients(target, model), 1e-7)
    with pytest.raises(AssertionError):
        oracle.assert_same_gradients(found, oracle.gradients(by_hand(model, fix_first=False), model), 1e-7)


def test_only_the_pass_at_the_moved_images_moves_running_statistics():
    model = oracle.small_net(batch_norm=True)
    GradAlign()(oracle.views_of(model, *oracle.images(), EPS))
    assert int(model[2].num_batches_tracked) == 1


def test_without_a_radius_gradients_agree_and_zero_gradients_are_left_out(model):
    value = GradAlign()(oracle.views_of(model, *oracle.images(), 0.0))["grad_align"]
    assert value.item() == pytest.approx(0, abs=1e-12)
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 3.0]])
    assert float(mean_cosine(a, b)) == pytest.approx(0.5)
    assert float(mean_cosine(a[1:2], b[1:2])) == 1
