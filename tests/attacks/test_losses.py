"""Losses that attacks climb, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from attacks import losses

Z = torch.tensor([[2.0, 5.0, 1.0, 3.0]], dtype=torch.float64)
ANSWER = torch.tensor([3])
TARGET = torch.tensor([0])


def test_values_of_a_hand_worked_example():
    assert losses.margin(Z, ANSWER).item() == 2.0
    assert losses.targeted_margin(Z, ANSWER, TARGET).item() == -1.0
    assert losses.dlr(Z, ANSWER).item() == pytest.approx(2 / (5 - 2))
    assert losses.targeted_dlr(Z, ANSWER, TARGET).item() == pytest.approx(-1 / (5 - 1.5))
    total = sum(math.exp(z) for z in (2, 5, 1, 3))
    assert losses.cross_entropy(Z, ANSWER).item() == pytest.approx(math.log(total) - 3)
    p, q = Z.softmax(1)[0], torch.full((4,), 0.25, dtype=torch.float64)
    divergence = (p * (p / q).log()).sum().item()
    assert losses.kl_to_reference(torch.zeros_like(Z), ANSWER, Z).item() == pytest.approx(divergence)


def test_the_margin_ignores_the_true_class_also_where_all_logits_are_negative():
    logits = torch.tensor([[-5.0, -7.0, -9.0]])
    assert losses.margin(logits, torch.tensor([0])).item() == -2.0
    assert losses.runner_up(logits, torch.tensor([1])).item() == -5.0


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_every_loss_is_positive_exactly_where_misclassified_and_has_a_finite_gradient(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(classes, (50,), generator=generator)
    wrong = losses.misclassified(logits, y)
    target = losses.strongest_targets(logits.detach(), y)[:, 0]
    for value in (
        losses.margin(logits, y),
        losses.dlr(logits, y),
        losses.targeted_margin(logits, y, target),
        losses.targeted_dlr(logits, y, target),
    ):
        assert torch.equal(value > 0, wrong)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert gradient.isfinite().all() and (gradient.abs().sum(1) > 0).float().mean() > 0.7


@pytest.mark.parametrize("loss", [losses.dlr, lambda z, y: losses.targeted_dlr(z, y, TARGET)])
@pytest.mark.parametrize("classes", [3, 4])
def test_dlr_losses_do_not_see_shift_and_scale_of_the_logits(loss, classes):
    y = torch.tensor([1])
    torch.testing.assert_close(loss(Z[:, :classes], y), loss(100 * Z[:, :classes] - 7, y))


def test_gradient_of_dlr_flows_through_its_denominator():
    z = Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.dlr(z, torch.tensor([1])).sum(), z)
    assert gradient[0, 0] != 0  # the third largest logit, which only the denominator contains


def test_targets_are_the_wrong_classes_by_falling_logit_and_at_most_all_of_them():
    assert losses.strongest_targets(Z, ANSWER).tolist() == [[1, 0, 2]]
    assert losses.strongest_targets(Z, ANSWER, 2).tolist() == [[1, 0]]
    assert losses.strongest_targets(Z, ANSWER, 9).tolist() == [[1, 0, 2]]
    assert losses.strongest_targets(Z[:, :2], TARGET, 9).tolist() == [[1]]


def test_the_divergence_has_no_slope_at_its_reference():
    z = Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.kl_to_reference(z, ANSWER, Z).sum(), z)
    assert gradient.abs().max() < 1e-12


def test_with_two_classes_the_dlr_losses_are_the_margin_because_in_units_of_their_gap_it_would_never_change():
    logits, y = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 1])
    assert losses.dlr(logits, y).tolist() == [-3.0, 0.5]
    assert losses.targeted_dlr(logits, y, 1 - y).tolist() == [-3.0, 0.5]
