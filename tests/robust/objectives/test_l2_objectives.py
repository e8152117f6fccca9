"""What the losses of l2-certified networks promise: terms, gradients, one clear line where they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attacks.threat import Ball, L2Ball, LinfBall
from certify import capture
from robust.initialization import default_init_
from robust.l2_margins import L2Logits, l2_logits
from robust.l2_net import L2Net
from robust.model import MODELS
from robust.objective import OBJECTIVES, cross_entropy
from robust.objectives.emma import raised
from robust.objectives.gloro import with_bottom
from robust.views import Views
from tests.robust.objectives import oracle

SHAPE, CLASSES = (2, 8, 8), 4
NAMES = [name for name in OBJECTIVES.names() if getattr(OBJECTIVES[name], "norms", ()) == ("l2",)]


def network(text: str = "liresnet:depth=1,width=4,hidden=6") -> L2Net:
    model = MODELS.parse(text)(SHAPE, CLASSES, (0.5,) * 2, (1.0,) * 2)
    default_init_(model, torch.Generator().manual_seed(0))
    return model.double().train()


def views(model: torch.nn.Module, ball: Ball) -> Views:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, *SHAPE, dtype=torch.float64, generator=generator)
    return Views(capture(model, x), x, torch.randint(CLASSES, (6,), generator=generator), ball)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("ball", [L2Ball(0.3), L2Ball(torch.linspace(0, 1, 6))], ids=["one", "each"])
def test_terms_are_one_value_per_example_and_gradients_reach_every_parameter(name: str, ball: Ball) -> None:
    model = network()
    terms = OBJECTIVES[name]()(views(model, ball))
    assert terms and all(value.shape == (6,) for value in terms.values())
    oracle.loss_of(terms).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-9, 1e3])
def test_single_precision_gradients_are_finite_at_extreme_radii_and_for_rows_that_agree(name: str, eps: float) -> None:
    model = network().float()
    model[-1].parametrizations.weight.original.data[1] = model[-1].parametrizations.weight.original.data[0]
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    loss = oracle.loss_of(OBJECTIVES[name]()(Views(capture(model, x), x, torch.arange(6) % CLASSES, L2Ball(eps))))
    assert loss.isfinite() and all(g.isfinite().all() for g in oracle.gradients(loss, model))


def test_a_larger_radius_never_lowers_the_loss(name: str) -> None:
    before: Tensor | None = None
    for eps in (0.0, 0.1, 0.5, 2.0):
        loss = sum(OBJECTIVES[name]()(views(network(), L2Ball(eps))).values())
        assert isinstance(loss, Tensor)
        assert before is None or bool((loss >= before - 1e-12).all())
        before = loss


def test_the_estimate_is_asked_for_once_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def estimate(model: L2Net, iterations: int) -> Tensor:
        asked.append(iterations)
        return torch.ones((), dtype=torch.float64)

    monkeypatch.setattr(L2Net, "trunk_lipschitz", estimate)
    OBJECTIVES.parse(f"{name}:power_iterations=7")(views(network(), L2Ball(0.3)))
    assert asked == [7]


def test_text_and_value_convert_without_loss(name: str) -> None:
    objective = OBJECTIVES.parse(f"{name}:power_iterations=3")
    assert OBJECTIVES.parse(OBJECTIVES.spell(objective)) == objective


def test_a_ball_of_another_norm_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"^l2-certified training needs norm='l2', got 'linf'$"):
        OBJECTIVES[name]()(views(network(), LinfBall(0.1)))


def test_a_model_without_an_estimate_is_refused_in_one_line(name: str) -> None:
    model = oracle.small_net()
    x, y = oracle.images()
    with pytest.raises(ValueError, match=r"needs a model that estimates its Lipschitz constant \(liresnet, gloro_cnn"):
        OBJECTIVES[name]()(Views(capture(model, x), x, y, L2Ball(0.1)))


def test_logits_are_the_models_and_constants_those_of_unit_rows() -> None:
    model = network()
    seen = views(model, L2Ball(0.3))
    found = l2_logits(seen, 100)
    torch.testing.assert_close(found.logits, model(seen.x))
    weight = model[-1].weight
    by_hand = torch.stack([(weight - row).norm(dim=1) for row in weight]) * model.eval().trunk_lipschitz(0)
    torch.testing.assert_close(found.constants, by_hand)
    assert found.constants.diagonal().tolist() == [0] * CLASSES
    assert found.constants.max() <= 2 * float(model.trunk_lipschitz(0).detach()) * (1 + 1e-12)


def hand() -> L2Logits:
    """Two classes far apart and one between them, radius 0.5."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    constants = torch.tensor([[0.0, 8.0, 1.0], [8.0, 0.0, 3.0], [1.0, 3.0, 0.0]])
    return L2Logits(logits, torch.tensor([0.5, 0.5]), constants)


def test_the_bottom_logit_of_a_case_by_hand() -> None:
    # Example 0 predicts 0: class 1 can come to 1 + 4, class 2 to 2.5. Example 1 has a tie, of which the first counts.
    assert with_bottom(hand())[:, -1].tolist() == [5.0, 5.0]


def test_emma_raises_classes_within_reach_to_the_label_and_others_by_all_they_have() -> None:
    found, y = hand(), torch.tensor([0, 2])
    # Label 0 of example 0: class 1 is 2 behind and can gain 4, class 2 is 1 behind and can gain 0.5.
    # Label 2 of example 1: both others are ahead and count the least share, 0.01 of 0.5 and of 1.5.
    expected = torch.tensor([[3.0, 3.0, 2.5], [1.005, 1.015, 0.0]])
    torch.testing.assert_close(raised(found, y, 0.01), expected)
    full = torch.tensor([[3.0, 5.0, 2.5], [1.5, 2.5, 0.0]])
    torch.testing.assert_close(raised(found, y, 1.0), full)


def test_emma_at_radius_zero_is_the_cross_entropy() -> None:
    seen = views(network(), L2Ball(0.0))
    (term,) = OBJECTIVES["emma"]()(seen).values()
    torch.testing.assert_close(term, cross_entropy(seen.clean, seen.y))
