"""One pass of an attack through the model."""

from __future__ import annotations

import pytest
import torch

from attacks.gradient import differentiate, measure
from attacks.losses import cross_entropy, kl_to_reference


def test_the_gradient_of_an_example_does_not_depend_on_the_size_of_the_batch(small_net, examples):
    net, x = small_net(dtype=torch.float64), examples(6, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.long)
    gradient, values, logits = differentiate(net, cross_entropy, x, (y,))
    single, value, _ = differentiate(net, cross_entropy, x[2:3], (y[2:3],))
    torch.testing.assert_close(gradient[2:3], single)
    torch.testing.assert_close(values[2:3], value)
    torch.testing.assert_close(logits, net(x))


def test_gradients_flow_to_the_input_alone_and_results_are_detached(small_net, examples):
    net, x = small_net(), examples(3)
    reference = net(x)
    with torch.no_grad():
        results = differentiate(net, kl_to_reference, x, (torch.zeros(3, dtype=torch.long), reference))
    assert not any(result.requires_grad for result in results)
    assert all(parameter.grad is None for parameter in net.parameters()) and x.grad is None and not x.requires_grad


def test_measuring_gives_the_same_values_without_a_gradient(small_net, examples):
    net, x = small_net(), examples(3)
    y = torch.zeros(3, dtype=torch.long)
    values, logits = measure(net, cross_entropy, x, (y,))
    _, expected, expected_logits = differentiate(net, cross_entropy, x, (y,))
    assert not values.requires_grad
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(logits, expected_logits)


def test_a_model_that_cuts_the_gradient_is_named_as_such(small_net, examples):
    net, x = small_net().requires_grad_(False), examples(3)
    with pytest.raises(ValueError, match=r"no gradient in its input .* as square does"):
        differentiate(lambda x: net(x.detach()), cross_entropy, x, (net(x).argmax(1),))
