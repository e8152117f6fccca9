"""Shorter and smaller runs: shares are kept, everything still fits together, and nothing passes for what it is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attacks.attack import ATTACKS
from certify.verifier import VERIFIERS
from robust.dataset import parse_dataset
from robust.model import MODELS
from robust.run_setup import check_texts
from robust.schedule import SCHEDULES
from robust.settings import load_recipe, recipe_names
from scripts.reproduction.reduce import CLASSES, IMAGES, cheaper_judge, image_counts, scaled, with_epochs

RECIPES = [name for name in recipe_names() if not name.startswith("digits")]


@pytest.mark.parametrize("name", recipe_names())
def test_a_shorter_run_has_its_ramp_and_its_rates_at_the_same_shares(name):
    whole = load_recipe(name).settings
    short = with_epochs(whole, max(2, whole.epochs // 5))
    check_texts(short)
    for kind in ("eps_schedule", "lr_schedule"):
        before, after = SCHEDULES.parse(getattr(whole, kind)), SCHEDULES.parse(getattr(short, kind))
        for share in (0.0, 0.03, 0.21, 0.4, 0.63, 0.87, 0.99):
            steps = [(before, whole.epochs), (after, short.epochs)]
            first, second = (schedule(round(share * 1000 * epochs), 1000, epochs) for schedule, epochs in steps)
            assert second == pytest.approx(first, abs=0.01), (kind, share)
    assert dataclasses.replace(short, **{f: getattr(whole, f) for f in ("epochs", "validate_every")}).eps == whole.eps


def test_warm_ups_and_starts_keep_their_share_and_their_type():
    dafa = with_epochs(load_recipe("cifar10_8_255_trades_dafa_resnet18").settings, 11)
    assert dafa.weightings == ("dafa:warmup_epochs=7",)
    assert with_epochs(load_recipe("cifar10_8_255_trades_dafa_resnet18").settings, 2).weightings == (
        "dafa:warmup_epochs=1",
    )
    awp = with_epochs(load_recipe("cifar10_8_255_trades_awp_wrn34").settings, 100)
    assert awp.weight_perturbation == "awp:start_epoch=4.5"


def test_all_its_epochs_leave_a_run_as_it_is():
    settings = load_recipe("cifar10_2_255_sabr").settings
    assert with_epochs(settings, settings.epochs) is settings


@pytest.mark.parametrize("name", RECIPES)
def test_a_scaled_recipe_is_smaller_fits_together_and_says_so(name, tmp_path):
    whole = load_recipe(name).settings
    small, words = scaled(whole, 0.01, tmp_path)
    check_texts(small)
    data = parse_dataset(small.data)(tmp_path)
    assert data.name.startswith("stand-in for ") and any("STAND-IN" in word for word in words)
    assert any(word.startswith("scale 0.01: ") for word in words)
    # Generated images fill up mini-batches beside at most 200 own ones.
    assert len(data.train) <= 400 and len(data.test) <= 20 and small.epochs <= max(2, 0.02 * whole.epochs)
    model = MODELS.parse(small.model)(data.input_shape, len(data.classes), data.mean, data.std).eval()
    x, _ = data.test.batch(torch.arange(2))
    assert model(x).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    unchanged = ("objective", "norm", "eps", "train_eps_factor", "regularizers", "init", "seed", "validator", "select")
    for field in unchanged:
        assert getattr(small, field) == getattr(whole, field), field


def test_a_data_set_at_hand_is_taken_in_part_and_not_stood_in_for(tmp_path):
    small, words = scaled(load_recipe("digits_sabr").settings, 0.2, tmp_path)
    assert small.data.startswith("subset:train=287") and not any("STAND-IN" in word for word in words)


@pytest.mark.parametrize("scale", [0.14, 0.5])
def test_what_is_held_out_of_a_scaled_run_has_images_of_every_class(scale, tmp_path):
    whole = dataclasses.replace(load_recipe("digits_sabr").settings, validation=0.01)
    small, _ = scaled(whole, scale, tmp_path)
    held_out = parse_dataset(small.data)(tmp_path).split(small.validation, 0).test
    assert set(held_out.labels.tolist()) == set(range(10)) and len(held_out) < 40
    assert scaled(dataclasses.replace(whole, validation=0.0), scale, tmp_path)[0].validation == 0
    assert scaled(dataclasses.replace(whole, validation=0.2), scale, tmp_path)[0].validation == 0.2


def test_images_are_counted_without_reading_any():
    settings = load_recipe("cifar10_8_255_wang2023_wrn28").settings
    assert image_counts(settings) == (round(49_000 / 0.3), 10_000)
    assert image_counts(load_recipe("imagenet64_1_255_cc_ibp").settings) == (1_281_167, 50_000)
    assert set(CLASSES) <= set(IMAGES)


def test_a_scaled_judge_takes_less_and_says_what_it_is():
    verifier, attack = cheaper_judge("cascade:timeout=1000", "autoattack", 0.01)
    assert VERIFIERS.parse(verifier).timeout == 1
    assert attack == "autoattack:steps=5,queries=50"
    assert ATTACKS.parse(attack).steps == 5
    assert cheaper_judge("ibp", "pgd:steps=20", 0.01) == ("ibp", "pgd:steps=20")
    assert cheaper_judge("cascade:timeout=20", "", 0.01) == ("cascade:timeout=0.5", "")
