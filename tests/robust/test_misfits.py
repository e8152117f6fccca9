"""Methods that would do nothing, or something else than they say, in a run are refused before its first epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robust.run_setup import TrainingError
from robust.trainer import train
from tests.robust.runs import tiny, trained

STEP = "attack=(pgd:steps=2,step_size=0.5,keep=last,mode=keep)"
ADVERSARIAL = {"objective": f"pgd:{STEP}", "eps_schedule": "constant", "init": "default"}

MISFITS = {
    "tightness without a ramp": (
        {**ADVERSARIAL, "regularizers": ("shi",)},
        r"shi acts while the radius grows, and eps_schedule=constant has no such time; give a ramp",
    ),
    "balance without ReLUs": (
        {"model": "mlp:hidden=", "regularizers": ("shi",)},
        "shi balances the inputs of ReLU layers, and the network has none; leave it out",
    ),
    "an average of what is taken back": (
        {**ADVERSARIAL, "hooks": ("catastrophic_overfitting", "ema")},
        "catastrophic_overfitting puts earlier weights back, and the average of ema has the later ones in it",
    ),
    "a weight for every example of one mean": (
        {"objective": f"exp_ibp:{STEP}", "weightings": ("kl_dro",)},
        "kl_dro: every image has the same loss in exp_ibp, .* mtl_ibp and cc_ibp have a loss for each",
    ),
    "noise of a box in a ball": (
        {**ADVERSARIAL, "norm": "l2", "regularizers": ("grad_align",)},
        "grad_align draws noise of the radius in every pixel: it needs norm=linf, got l2",
    ),
    "two terms of one name": (
        {**ADVERSARIAL, "regularizers": ("elle", "elle_a")},
        "two methods of the run add a term 'elle' to the loss; keep one of them",
    ),
    "class steps of an attack without steps": (
        {**ADVERSARIAL, "objective": "pgd:attack=(square:queries=5)", "weightings": ("dafa:warmup_epochs=1",)},
        r"dafa gives every class a radius and steps of its own, and the attack square:queries=5 has no such steps",
    ),
    "class steps of an attack inside another method": (
        {**ADVERSARIAL, "objective": "edac:objective=(pgd:attack=(apgd))", "weightings": ("frl",)},
        r"frl gives every class a radius and steps of its own, and the attack apgd has no such steps",
    ),
    "a weight of a weighted term": (
        {**ADVERSARIAL, "objective": f"trades:{STEP}", "weightings": ("cfa:start_epoch=1",)},
        "cfa: the term kl gets its weight here, and the objective has kl_weight=6; set it to 1, as in trades:kl_weig",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_methods_that_do_not_fit_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, message = MISFITS[case]
    with pytest.raises((TrainingError, ValueError), match=message):
        train(tiny(**{"epochs": 2, "batch_size": 650, **changes}), tmp_path, progress=False)


def test_images_without_labels_are_for_objectives_that_take_them(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "more.npz", x_train=x, y_train=np.full(40, -1))
    data = f"extra:own=(digits),extra=(npz:path={tmp_path / 'more.npz'}),fraction=0.5"
    settings = {**ADVERSARIAL, "data": data, "epochs": 1, "batch_size": 650}
    with pytest.raises(TrainingError, match=r"some training images have no label \(-1\); only awr takes them"):
        train(tiny(**settings), tmp_path / "refused", progress=False)
    trained(tiny(epochs=1, batch_size=650, **ADVERSARIAL), tmp_path / "teacher")
    taught = f"awr:teacher={tmp_path / 'teacher' / 'checkpoint.safetensors'},{STEP}"
    found = trained(tiny(**{**settings, "objective": taught}), tmp_path / "taught")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_what_watches_the_run_sees_the_steps_at_radius_0_as_well(tmp_path: Path) -> None:
    # DAFA's table comes from the first epoch, in which the radius is 0.
    ramp = {**ADVERSARIAL, "eps_schedule": "linear:start=1,end=2", "epochs": 3, "batch_size": 650}
    with_table = trained(tiny(**ramp, weightings=("dafa:warmup_epochs=1",)), tmp_path / "dafa")
    without = trained(tiny(**ramp), tmp_path / "plain")
    assert max(float((with_table[name] - without[name]).abs().max()) for name in without) > 1e-4
    for number, changes in enumerate(
        (
            {"weightings": ("kl_dro:momentum=0.5",)},
            {"objective": "free_at:replays=2"},
            {"regularizers": ("saf:start_epoch=1,epochs_back=1",)},
        )
    ):
        trained(tiny(**{**ramp, **changes}), tmp_path / str(number))


def test_statistics_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robust import trainer

    step = trainer._Run._step

    def overflowing(self: trainer._Run, index: torch.Tensor) -> dict[str, float]:
        values = step(self, index)
        next(tensor for name, tensor in self.model.named_buffers() if "running_var" in name).fill_(float("inf"))
        return values

    monkeypatch.setattr(trainer._Run, "_step", overflowing)
    with pytest.raises(TrainingError, match=r"largest weight of .*running_var is inf"):
        train(tiny(epochs=1, batch_size=650), tmp_path, progress=False)
