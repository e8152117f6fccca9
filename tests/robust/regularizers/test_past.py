"""SAF and MESA: agreement with the past by hand, and what counts as the past."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robust.active import Moment
from robust.regularizers.saf import MESA, SAF, tempered_divergence
from tests.robust.objectives import oracle

MOMENT = Moment(None, 1, 0.5, lambda: iter(()))


def by_hand(past: Tensor, z: Tensor, temperature: float) -> Tensor:
    p, q = (past / temperature).softmax(1), (z / temperature).softmax(1)
    return temperature**2 * (p * (p / q).log()).sum(1)


def test_the_tempered_divergence_by_hand():
    past, z = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tempered_divergence(past, z, 5.0), by_hand(past, z, 5.0))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_saf_compares_with_the_images_own_logits_of_so_many_epochs_ago(batch_norm):
    model = oracle.small_net(batch_norm)
    x, y = oracle.images()
    active = oracle.begun(SAF(weight=0.7, temperature=2.0, start_epoch=2.0, epochs_back=2), model)
    (past,) = active.companions()
    past.table = past.table.double()
    seen = []
    for epoch in (0.5, 1.5, 2.5, 3.5):
        index = torch.tensor([5, 3, 0, 1, 2, 4])
        if epoch == 0.5:
            index = index[:4]  # two of the images are not seen in the first epoch
        views = oracle.views_of(model, x[: len(index)], y[: len(index)], 0.1, index=index, epoch=epoch)
        found = active(views)["saf"]
        z = oracle.clean_pass(model, x[: len(index)])[0]
        seen.append(z.detach())
        if epoch < 2:
            assert float(found) == 0
        else:
            old = seen[int(epoch) - 2]
            target = 0.7 * by_hand(old, z[: len(old)], 2.0).sum() / 6
            torch.testing.assert_close(found, target)
            oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))
        active.see(views, MOMENT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mesa_compares_with_the_average_of_the_weights_in_evaluation_mode(batch_norm):
    model = oracle.small_net(batch_norm)
    x, y = oracle.images()
    active = oracle.begun(MESA(weight=0.7, temperature=2.0, start_epoch=1.0, decay=0.9), model)
    early = active(oracle.views_of(model, x, y, 0.1, epoch=0.5))
    assert float(early["mesa"]) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = active(oracle.views_of(model, x, y, 0.1, epoch=1.0))["mesa"]
    past = oracle.logits(active.average.model, x)
    target = 0.7 * by_hand(past, oracle.clean_pass(model, x)[0], 2.0).mean()
    torch.testing.assert_close(found, target)
    oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))
    before = active.average.model[-1].weight.clone()
    active.average.after_step(Moment(model, 1, 1.0, lambda: iter(())))
    torch.testing.assert_close(active.average.model[-1].weight, 0.9 * before + 0.1 * model[-1].weight.detach())
