"""Settings of a run: round trip, types, and the text of what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from robust.settings import Settings, SettingsError, load_recipe, recipe_names


def changed() -> Settings:
    """Settings that differ from the default in every field."""
    return Settings(
        data="mnist",
        model="gowal_small",
        objective="sabr:box_ratio=0.1",
        norm="l2",
        eps=0.2,
        train_eps_factor=2.0,
        epochs=3,
        batch_size=64,
        micro_batch=16,
        optimizer="sgd",
        lr_schedule="milestones:at=1+2",
        eps_schedule="linear:start=0,end=2",
        regularizers=("shi", "l1:weight=1e-06"),
        weightings=("dafa",),
        weight_perturbation="awp:gamma=0.01",
        hooks=("precise_bn",),
        init="ibp",
        clip_norm=0.0,
        augment=False,
        validation=0.2,
        validate_every=2,
        validator="crown_ibp",
        select="best",
        seed=5,
    )


def test_settings_go_through_plain_values_and_json_unchanged():
    settings = changed()
    for name, value in settings.to_dict().items():
        assert value != getattr(Settings(), name), name
    assert Settings.from_dict(settings.to_dict()) == settings
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("name", recipe_names())
def test_the_settings_of_recipes_go_through_json_unchanged(name):
    settings = load_recipe(name).settings
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_absent_settings_keep_their_default():
    assert Settings.from_dict({"epochs": 3}) == dataclasses.replace(Settings(), epochs=3)


@pytest.mark.parametrize("value, eps", [("8/255", 8 / 255), ("0.1", 0.1), (0.1, 0.1), (0, 0.0)])
def test_a_radius_may_be_a_fraction_or_a_number(value, eps):
    settings = Settings.from_dict({"eps": value})
    assert settings.eps == eps and isinstance(settings.eps, float)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"eps": 8}, r"eps=8 leaves the pixel range \[0, 1\]; did you mean 8/255\?"),
        ({"eps": -0.1}, "eps"),
        ({"eps": "8/0"}, r"eps: expected a number such as 0\.1 or 8/255, got '8/0'"),
        ({"eps": True}, "eps: expected a number, got True"),
        ({"eps": [0.1]}, r"eps: expected a number, got \[0\.1\]"),
        ({"epoch": 3}, r"no setting 'epoch' \(did you mean 'epochs'\?\); settings: data, model"),
        ({"zzz": 3}, r"no setting 'zzz'; settings: data, model"),
        ({"epochs": "3"}, "epochs: expected int, got '3'"),
        ({"epochs": 3.0}, r"epochs: expected int, got 3\.0"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"augment": 1}, "augment: expected bool, got 1"),
        ({"model": 7}, "model: expected str, got 7"),
        ({"hooks": "precise_bn"}, "hooks: expected a list of texts, got 'precise_bn'"),
        ({"hooks": [1]}, r"hooks: expected a list of texts, got \[1\]"),
        ({"norm": "l3"}, "norm: expected one of linf, l2, l1, got 'l3'"),
        ({"init": "xavier"}, "init: expected one of default, ibp, kaiming_normal, as_built, got 'xavier'"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"validate_every": 0}, "validate_every=0: expected at least 1"),
        ({"validation": 1.0}, r"validation=1\.0: expected a share in \[0, 1\)"),
        ({"train_eps_factor": 0}, r"train_eps_factor=0\.0: expected a positive factor"),
        ({"select": "best", "validation": 0}, "select='best' needs validation images; set validation above 0"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected a number of 64 bits, at most 9223372036854775807"),
        ({"clip_norm": -5}, r"clip_norm=-5\.0: expected a positive norm, 0 for none or -1 for the default"),
        ({"batch_size": 8, "micro_batch": 9}, "micro_batch=9: expected 0 to batch_size=8"),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(values, message):
    with pytest.raises(ValueError, match=message) as refusal:
        Settings.from_dict(values)
    # The radius is checked by the ball, everything else by the settings.
    assert isinstance(refusal.value, SettingsError) or str(refusal.value).startswith("eps")


def test_the_radius_of_training_is_a_multiple_of_the_one_of_evaluation():
    settings = Settings(eps=0.1, train_eps_factor=2.0)
    assert (settings.ball().eps, settings.train_ball().eps) == (0.1, 0.2)


def test_an_linf_radius_of_training_stops_at_the_whole_pixel_range():
    assert Settings(eps=0.8, train_eps_factor=2.0).train_ball().eps == 1
    assert Settings(norm="l2", eps=0.8, train_eps_factor=2.0).train_ball().eps == 1.6
