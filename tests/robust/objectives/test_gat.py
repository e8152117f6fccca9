"""GAT: what is shown to the network, and the losses of all its heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks.threat import LinfBall
from certify.tracing import capture
from robust.active import RunFacts
from robust.objectives.gat import GAT, jigsaw, shortest_combination, turned
from robust.views import Views
from tests.robust.objectives import oracle

SHAPE = (2, 4, 4)


def begun(gat: GAT, model: nn.Module, shape=SHAPE):
    return gat.start(RunFacts(model, shape, 3, 8, 1, 1, lambda text: model))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def test_sections_are_swapped_row_by_row_and_images_turned_by_quarters():
    x = torch.arange(2 * 16.0).view(2, 1, 4, 4)
    found = jigsaw(x, torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]]))
    assert found[0, 0].tolist() == [[10, 11, 0, 1], [14, 15, 4, 5], [2, 3, 8, 9], [6, 7, 12, 13]]
    assert torch.equal(found[1], x[1])
    assert torch.equal(jigsaw(x, torch.zeros(2, 1, dtype=torch.long)), x)
    quarter = turned(x, torch.tensor([1, 2]))
    assert quarter[0, 0, 0].tolist() == [3, 7, 11, 15] and torch.equal(quarter[1], x[1].flip(1, 2))


def test_all_heads_see_the_attacked_transformed_image_by_hand():
    model = small()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((8, *SHAPE), dtype=torch.float64, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    active = begun(GAT(sections=4, permutations=5, attack=oracle.Fixed(), seed=1), model)
    views = Views(capture(model, x), x, y, LinfBall(0.05), torch.Generator().manual_seed(0))
    terms = active(views)
    drawn = torch.rand((8, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order, turn = (5 * drawn[:, 0]).long(), (4 * drawn[:, 1]).long()
    assert len(set(turn.tolist())) > 2 and len(set(order.tolist())) > 2
    images = []
    for b in range(8):
        sections = [x[b, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
        a, c, d, e = (sections[k] for k in active.orders[order[b]].tolist())
        image = torch.cat([torch.cat([a, c], 2), torch.cat([d, e], 2)], 1)
        images.append(torch.rot90(image, int(turn[b]), (1, 2)))
    shown = torch.stack(images)
    x_adv = oracle.Fixed()(None, shown, y, LinfBall(0.05))
    features = model[:3](x_adv)
    targets = {
        "adversarial": oracle.loss_of_logits(model(x_adv), y),
        "jigsaw": oracle.loss_of_logits(active.heads["jigsaw"](features), order),
        "rotation": oracle.loss_of_logits(active.heads["rotation"](features), turn),
    }
    assert terms.keys() == targets.keys()
    for name, target in targets.items():
        torch.testing.assert_close(terms[name], target)
    found, target = oracle.loss_of(terms), oracle.loss_of(targets)
    for net in (model, active.heads):
        oracle.assert_same_gradients(oracle.gradients(found, net), oracle.gradients(target, net))
    assert {id(p) for p in active.parameters()} == {id(p) for p in active.heads.parameters()}
    views.generator = None
    torch.testing.assert_close(oracle.loss_of(active(views)), found)


def test_heads_and_permutations_come_from_the_seed_and_are_restored():
    model = small()
    first, again = (begun(GAT(sections=4, seed=1), model) for _ in range(2))
    other = begun(GAT(sections=4, seed=2), model)
    assert torch.equal(first.orders, again.orders) and not torch.equal(first.orders, other.orders)
    other.restore(first.state())
    for a, b in zip(first.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="gat: 4x4 images do not fall into sections=9 equal parts"):
        begun(GAT(sections=9), small())
    with pytest.raises(ValueError, match="sections=8 equal parts, a square number"):
        begun(GAT(sections=8), small())
    with pytest.raises(ValueError, match="gat: 4x8 images cannot be turned; set turns=1"):
        begun(GAT(sections=4), small(), (1, 4, 8))


def test_the_shortest_combination_by_hand():
    def found(*vectors):
        return shortest_combination(torch.tensor(vectors, dtype=torch.float64)).tolist()

    assert found((3.0, 0.0), (0.0, 1.0)) == pytest.approx([0.1, 0.9])
    assert found((1.0, 1.0), (-2.0, -2.0)) == pytest.approx([2 / 3, 1 / 3])
    assert found((4.0, 1.0), (1.0, 0.0)) == pytest.approx([0.0, 1.0])
    assert found((2.0, 0.0), (0.0, 2.0), (5.0, 5.0)) == pytest.approx([0.5, 0.5, 0.0])
    assert found((0.0, 0.0), (1.0, 0.0)) == pytest.approx([1.0, 0.0])
    assert found((7.0, -1.0)) == pytest.approx([1.0])
    assert sum(found((1.0, 2.0), (1.0, 2.0))) == pytest.approx(1.0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_shortest_combination_turns_away_from_no_vector_and_none_drawn_is_shorter(count):
    generator = torch.Generator().manual_seed(count)
    for size in (1, 2, 20):
        for _ in range(10):
            vectors = torch.randn(count, size, dtype=torch.float64, generator=generator)
            weights = shortest_combination(vectors)
            assert (weights >= 0).all() and float(weights.sum()) == pytest.approx(1.0)
            shortest = weights @ vectors
            assert (vectors @ shortest >= shortest.square().sum() - 1e-9).all()
            drawn = torch.rand(2000, count, dtype=torch.float64, generator=generator).log().neg()
            lengths = (drawn / drawn.sum(1, keepdim=True) @ vectors).norm(dim=1)
            assert shortest.norm() <= lengths.min() + 1e-9


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mgda_weighs_the_tasks_by_their_gradients_in_the_shared_layers(batch_norm):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(6)] if batch_norm else []
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), *norm, nn.ReLU(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((8, *SHAPE), dtype=torch.float64, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    settings = {"sections": 4, "permutations": 5, "attack": oracle.Fixed(), "seed": 1}

    def terms(**more):
        active = begun(GAT(**settings, **more), model)
        return active(Views(capture(model, x), x, y, LinfBall(0.05), torch.Generator().manual_seed(0)))

    equal, balanced = terms(), terms(weights="mgda")
    shared = [p for name, p in model.named_parameters() if not name.startswith(str(len(model) - 1))]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])

    weights = shortest_combination(torch.stack([gradient(term.mean()) for term in equal.values()]))
    assert float(weights.min()) < 0.9 and sorted(weights.tolist())[1] > 0.01
    for weight, name in zip(weights, equal, strict=True):
        torch.testing.assert_close(balanced[name], weight * equal[name])
    step = gradient(oracle.loss_of(balanced))
    for term in equal.values():
        assert gradient(term.mean()) @ step >= step.square().sum() - 1e-9
