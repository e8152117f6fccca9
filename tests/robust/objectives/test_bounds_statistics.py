"""Which batch's BatchNorm statistics the expressive losses use for bounds and adversarial logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks.threat import LinfBall
from certify.tracing import capture
from robust.objective import OBJECTIVES
from robust.training_attack import adversarial
from robust.views import Views


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    return model, torch.rand(12, 1, 8, 8), torch.randint(0, 5, (12,))


def views_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Views:
    return Views(capture(model, x[:1]), x, y, LinfBall(0.1), torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["mtl_ibp", "cc_ibp", "exp_ibp"])
def test_adversarial_statistics_are_those_of_a_second_training_pass(name: str) -> None:
    model, x, y = problem()
    attacked = copy.deepcopy(model)
    objective = OBJECTIVES.parse(f"{name}:ibp_weight=0.0,bounds_statistics=adversarial")
    (value,) = [v for v in objective(views_of(model.train(), x, y)).values() if v.abs().sum() > 0]
    # The same two passes by torch itself: the attack climbs the network with the clean batch's statistics.
    views = views_of(attacked.train(), x, y)
    x_adv = adversarial(views, objective.attack)
    expected = F.cross_entropy(attacked(x_adv), y, reduction="none")
    torch.testing.assert_close(value.mean(), expected.mean())
    torch.testing.assert_close(model[1].running_mean, attacked[1].running_mean)
    assert int(model[1].num_batches_tracked) == 2


def test_bounds_with_adversarial_statistics_hold_for_the_network_with_these_statistics() -> None:
    model, x, y = problem()
    objective = OBJECTIVES.parse("mtl_ibp:ibp_weight=1.0,bounds_statistics=adversarial")
    copied = copy.deepcopy(model).train()
    bound = objective(views_of(model.train(), x, y))["ibp"]
    views = views_of(copied, x, y)
    x_adv = adversarial(views, objective.attack)
    mean_before = copied[0](x_adv).mean((0, 2, 3)).detach()
    variance_before = copied[0](x_adv).var((0, 2, 3), unbiased=False).detach()
    fixed = copy.deepcopy(copied).eval()
    fixed[1].running_mean.copy_(mean_before)
    fixed[1].running_var.copy_(variance_before)
    for _ in range(50):
        point = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert (F.cross_entropy(fixed(point), y, reduction="none") <= bound + 1e-5).all()
    assert bool((bound > F.cross_entropy(fixed(x_adv), y, reduction="none") - 1e-5).all())


def test_adversarial_statistics_refuse_a_part_of_a_batch() -> None:
    model, x, y = problem()
    graph = capture(model, x[:1])
    _, statistics = graph.forward_train(x)
    views = Views(graph, x[:4], y[:4], LinfBall(0.1), torch.Generator().manual_seed(3), statistics=statistics)
    with pytest.raises(ValueError, match="micro_batch=0"):
        OBJECTIVES.parse("mtl_ibp:bounds_statistics=adversarial")(views)
