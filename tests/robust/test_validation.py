"""Validation by a verifier or by an attack, and what a run takes from its objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from attacks.methods.pgd import PGD
from attacks.registry import UnknownName
from attacks.threat import LinfBall
from certify.verifier import VERIFIERS
from robust import validation
from robust.checkpoint import load
from robust.cli import main
from robust.dataset import DataSet
from robust.images import MemoryImages
from robust.objective import ADVERSARIAL, CERTIFIED, L2_CERTIFIED, OBJECTIVES, defaults_of
from robust.run_setup import CHECKPOINT, LAST
from robust.settings import Settings
from robust.trainer import train
from robust.validation import decisive, parse_validator, validate
from tests.robust.objectives import oracle
from tests.robust.runs import records, tiny


class Threshold(nn.Module):
    """Class 1 where the only pixel is above 0.5."""

    def forward(self, x):
        z = 10 * (x.flatten(1) - 0.5)
        return torch.cat([-z, z], 1)


def line_of_pixels() -> DataSet:
    """300 pixels from 0 to 1, of which those within 0.1 of 0.5 are not robust at eps 0.1; the first is mislabelled."""
    pixels = torch.linspace(0, 1, 300).view(-1, 1, 1, 1)
    labels = (pixels.flatten() > 0.5).long()
    labels[0] = 1
    images = MemoryImages(pixels, labels)
    return DataSet("line", images, images, ("low", "high"), (0.0,), (1.0,), None, (1, 1, 1))


def test_an_attack_measures_the_share_that_is_right_and_holds_out() -> None:
    data, model = line_of_pixels(), Threshold().train()
    robust = int(((data.test.pixels.flatten() - 0.5).abs() > 0.1).sum()) - 1
    found = validate(model, data, LinfBall(0.1), PGD(steps=5), torch.device("cpu"))
    assert found == {"clean": pytest.approx(100 * 299 / 300), "under_attack": pytest.approx(100 * robust / 300)}
    assert model.training and decisive(found) == found["under_attack"]
    assert decisive({"clean": 3.0, "certified": 2.0}) == 2.0


def test_an_image_that_is_wrong_stays_wrong_whatever_the_attack_makes_of_it() -> None:
    def mirrored(model: nn.Module, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return 1 - x

    x, y = torch.tensor([0.1, 0.9]).view(-1, 1, 1, 1), torch.tensor([1, 1])
    found = validation._attacked(Threshold(), x, y, LinfBall(1.0), mirrored, torch.arange(2))
    assert found == (1, 0)


def test_a_validators_text_names_an_attack_or_a_verifier() -> None:
    assert parse_validator("pgd:steps=3") == PGD(steps=3)
    assert parse_validator("crown_ibp") == VERIFIERS.parse("crown_ibp")
    with pytest.raises(UnknownName, match="crwon"):
        parse_validator("crwon")


def test_best_weights_under_attack_are_kept_and_the_last_ones_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robust import trainer

    script = iter([{"clean": 90.0, "under_attack": value} for value in (20.0, 40.0, 30.0)])
    monkeypatch.setattr(trainer, "validate", lambda *_: next(script))
    settings = tiny(objective="fgsm_at", eps_schedule="auto", epochs=3, batch_size=400, select="best")
    best = train(settings, tmp_path, progress=False)
    assert best.metrics["validation/under_attack"] == 40
    last = load(tmp_path / LAST)
    assert last.metrics["validation/under_attack"] == 30 and last.settings == load(tmp_path / CHECKPOINT).settings
    assert not torch.equal(last.model[1].weight, best.model[1].weight)
    assert [record["eps"] for record in records(tmp_path)] == [pytest.approx(0.1)] * 3


def test_every_objective_has_the_defaults_of_its_kind_and_certified_ones_say_so() -> None:
    certified = {"ibp", "shi_ibp", "crown_ibp", "sabr", "cc_ibp", "mtl_ibp", "exp_ibp", "taps", "staps"}
    for name in OBJECTIVES.names():
        by_lipschitz = getattr(OBJECTIVES[name], "norms", ()) == ("l2",)
        expected = CERTIFIED if name in certified else L2_CERTIFIED if by_lipschitz else ADVERSARIAL
        assert getattr(oracle.objective(name), "defaults", ADVERSARIAL) == expected, name
    assert (defaults_of("mtl_ibp"), defaults_of("trades:kl_weight=3")) == (CERTIFIED, ADVERSARIAL)


def test_what_is_left_open_is_the_objectives_and_what_is_given_stays() -> None:
    for settings in (Settings(objective="trades"), Settings.from_dict({"objective": "trades:kl_weight=3"})):
        assert (settings.eps_schedule, settings.clip_norm) == ("constant", 0)
        assert isinstance(parse_validator(settings.validator), PGD)
    settings = Settings()
    assert (settings.eps_schedule, settings.clip_norm, settings.validator) == ("smooth:start=0,end=10", 10, "ibp")
    given = Settings(objective="trades", eps_schedule="linear", clip_norm=5, validator="crown")
    assert (given.eps_schedule, given.clip_norm, given.validator) == ("linear", 5, "crown")
    assert Settings.from_dict(given.to_dict()) == given and dataclasses.replace(given, seed=1).clip_norm == 5


def test_trades_in_one_line_trains_at_the_full_radius_and_is_selected_under_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "train --objective trades --model cnn3:width=2 --epochs 1 --batch-size 500 --select best --quiet"
    assert main([*command.split(), "--device", "cpu", "--out", str(tmp_path)]) == 0
    (record,) = records(tmp_path)
    assert record["eps"] == pytest.approx(0.1) and "validation/under_attack" in record
    assert f"next: robust attack {tmp_path / CHECKPOINT}" in capsys.readouterr().out
