"""EDAC: the step before by hand, the objective's own step, and that nothing else of the run is in the step before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.threat import LinfBall
from robust.active import RunFacts
from robust.objective import ADVERSARIAL, CERTIFIED, defaults_of
from robust.objectives.edac import EDAC
from robust.objectives.pgd import PGDTraining
from robust.step import BatchLoss
from tests.robust.objectives import oracle
from tests.robust.runs import records, tiny, trained

FIXED = oracle.Fixed()
EPS = 0.06


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_first_step_is_the_deviation_of_the_logits_and_every_second_the_objectives(batch_norm):
    model = oracle.small_net(batch_norm)
    x, y = oracle.images()
    x_adv = FIXED(None, x, y, LinfBall(EPS))
    inner = PGDTraining(attack=FIXED)
    run = RunFacts(model, oracle.SHAPE, oracle.CLASSES, 6, 10, 4, lambda text: model)
    active = EDAC(inner, weight=0.5, attack=FIXED).start(run)
    z = oracle.logits(model, x_adv, oracle.clean_pass(model, x)[1])
    deviation = ((z - z.mean(1, keepdim=True)).square().sum(1) / (oracle.CLASSES - 1)).sqrt()
    for step, target in [(0, 0.5 * deviation.mean()), (2, 0.5 * deviation.mean()), (14, 0.5 * deviation.mean())]:
        found = oracle.loss_of(active(oracle.views_of(model, x, y, EPS, epoch=step / 4)))
        torch.testing.assert_close(found, target)
        oracle.assert_same_gradients(oracle.gradients(found, model), oracle.gradients(target, model))
    for step in (1, 3, 13):
        found = oracle.loss_of(active(oracle.views_of(model, x, y, EPS, epoch=step / 4)))
        torch.testing.assert_close(found, oracle.loss_of(inner(oracle.views_of(model, x, y, EPS))))


def test_without_weight_it_is_the_objective_also_with_regularisers_and_perturbed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Plain gradient descent without noise: a step before of weight 0 then changes nothing."""
    attack = "(pgd:steps=2,step_size=0.5,start=clean,keep=last,mode=keep)"
    plain = f"pgd:attack={attack}"
    more = {
        "optimizer": "sgd:lr=0.01,momentum=0,weight_decay=0",
        "eps_schedule": "constant",
        "regularizers": ("l1:weight=0.001",),
        "weight_perturbation": "awp:gamma=0.01",
        "weightings": ("dafa:warmup_epochs=1",),
        "batch_size": 400,
    }
    perturbed: list[BatchLoss] = []
    gradients = BatchLoss.gradients
    monkeypatch.setattr(
        BatchLoss, "gradients", lambda self, *rest, **more: perturbed.append(self) or gradients(self, *rest, **more)
    )
    base = trained(tiny(objective=plain, **more), tmp_path / "pgd")
    text = f"edac:objective=({plain}),attack={attack}"
    found = trained(tiny(objective=f"{text},weight=0", **more), tmp_path / "edac_0")
    assert len(perturbed) == 2 * records(tmp_path / "pgd")[-1]["step"] == records(tmp_path / "edac_0")[-1]["step"]
    learned = [name for name in base if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(base[name], found[name]) for name in learned)
    moved = trained(tiny(objective=f"{text},weight=0.3", **more), tmp_path / "edac")
    assert not all(torch.equal(base[name], moved[name]) for name in learned)
    for first, second in zip(records(tmp_path / "pgd"), records(tmp_path / "edac_0"), strict=True):
        assert second["loss/adversarial"] == pytest.approx(first["loss/adversarial"])
        assert second["step"] == 2 * first["step"] and second["loss/edac"] == 0


def test_a_run_takes_the_objectives_defaults_and_an_objective_that_repeats_batches_is_refused():
    assert defaults_of("edac") == ADVERSARIAL and defaults_of("edac:objective=(ibp)") == CERTIFIED
    with pytest.raises(ValueError, match="edac: free_at repeats mini-batches itself"):
        defaults_of("edac:objective=(free_at)")
