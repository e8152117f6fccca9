"""Recipes against the tables they stand for: which rows there are, what each text means, which figures are quoted."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from attacks.attack import ATTACKS
from certify.verifier import VERIFIERS
from robust.active import begin
from robust.dataset import DATASETS, parse_dataset
from robust.hook import HOOKS
from robust.min_max import MinMax
from robust.model import MODELS
from robust.objective import OBJECTIVES
from robust.optimizer import OPTIMIZERS
from robust.regularizer import REGULARIZERS
from robust.run_setup import refuse_misfits
from robust.schedule import SCHEDULES
from robust.settings import SettingsError, load_recipe, parse_recipe, recipe_names
from robust.trainer import train
from robust.weight_perturbation import WEIGHT_PERTURBATIONS
from robust.weighting import WEIGHTINGS

PROBLEMS = {  # data set -> channels, side, classes
    "digits": (1, 8, 10),
    "mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "svhn": (3, 32, 10),
    "tiny_imagenet": (3, 64, 200),
    "imagenet64": (3, 64, 1000),
    "imagenet": (3, 224, 1000),
}
TABLES = {  # source -> its rows
    "Shi et al. 2021": "mnist_04_shi_ibp cifar10_8_255_shi_ibp tinyimagenet_1_255_shi_ibp",
    "SABR": "mnist_01_sabr mnist_03_sabr cifar10_2_255_sabr cifar10_8_255_sabr tinyimagenet_1_255_sabr",
    "Expressive losses": """
        mnist_01_cc_ibp_expr mnist_01_mtl_ibp_expr mnist_03_cc_ibp_expr mnist_03_mtl_ibp_expr
        cifar10_2_255_cc_ibp_expr cifar10_2_255_mtl_ibp_expr cifar10_2_255_exp_ibp_expr cifar10_2_255_sabr_expr
        cifar10_8_255_cc_ibp_expr cifar10_8_255_mtl_ibp_expr cifar10_8_255_exp_ibp_expr cifar10_8_255_sabr_expr
        tinyimagenet_1_255_cc_ibp_expr tinyimagenet_1_255_mtl_ibp_expr tinyimagenet_1_255_exp_ibp_expr
        imagenet64_1_255_cc_ibp imagenet64_1_255_mtl_ibp imagenet64_1_255_exp_ibp""",
    "TAPS": """
        mnist_01_taps mnist_03_taps cifar10_2_255_taps cifar10_8_255_taps tinyimagenet_1_255_taps
        mnist_01_staps mnist_03_staps cifar10_2_255_staps cifar10_8_255_staps tinyimagenet_1_255_staps""",
    "CROWN-IBP": """
        mnist_01_crown_ibp mnist_03_crown_ibp_small mnist_04_crown_ibp
        cifar10_2_255_crown_ibp cifar10_8_255_crown_ibp cifar10_8_255_crown_ibp_medium""",
    "GloRo": "cifar10_l2_36_255_gloro tinyimagenet_l2_36_255_gloro",
    "LiResNet": """
        cifar10_l2_36_255_liresnet cifar100_l2_36_255_liresnet tinyimagenet_l2_36_255_liresnet
        imagenet_l2_36_255_liresnet imagenet_l2_1_liresnet
        cifar10_l2_36_255_liresnet_2024 cifar100_l2_36_255_liresnet_2024 tinyimagenet_l2_36_255_liresnet_2024
        imagenet_l2_36_255_liresnet_2024""",
    "BRONet": "cifar10_l2_36_255_bronet cifar100_l2_36_255_bronet tinyimagenet_l2_36_255_bronet",
    "Gowal et al. 2018": "mnist_01_gowal_medium_ibp mnist_03_gowal_large_ibp mnist_03_gowal_small_ibp",
    "auto_LiRPA": """
        cifar10_8_255_crown_ibp_lirpa tinyimagenet_1_255_crown_ibp_lirpa imagenet64_1_255_crown_ibp_lirpa""",
    "CTBench": """
        mnist_01_ibp_ctbench mnist_01_crown_ibp_ctbench mnist_01_sabr_ctbench mnist_01_taps_ctbench
        mnist_01_staps_ctbench mnist_01_mtl_ibp_ctbench mnist_01_cc_ibp_ctbench mnist_01_exp_ibp_ctbench
        mnist_01_pgd_ctbench mnist_01_edac_ctbench
        mnist_03_ibp_ctbench mnist_03_crown_ibp_ctbench mnist_03_sabr_ctbench mnist_03_taps_ctbench
        mnist_03_staps_ctbench mnist_03_mtl_ibp_ctbench mnist_03_pgd_ctbench
        mnist_03_edac_ctbench
        cifar10_2_255_ibp_ctbench cifar10_2_255_crown_ibp_ctbench cifar10_2_255_sabr_ctbench
        cifar10_2_255_taps_ctbench cifar10_2_255_staps_ctbench cifar10_2_255_mtl_ibp_ctbench
        cifar10_2_255_pgd_ctbench cifar10_2_255_edac_ctbench
        cifar10_8_255_ibp_ctbench cifar10_8_255_crown_ibp_ctbench cifar10_8_255_sabr_ctbench
        cifar10_8_255_taps_ctbench cifar10_8_255_staps_ctbench cifar10_8_255_mtl_ibp_ctbench
        cifar10_8_255_pgd_ctbench
        tinyimagenet_1_255_ibp_ctbench tinyimagenet_1_255_crown_ibp_ctbench tinyimagenet_1_255_sabr_ctbench
        tinyimagenet_1_255_taps_ctbench tinyimagenet_1_255_staps_ctbench tinyimagenet_1_255_mtl_ibp_ctbench
        tinyimagenet_1_255_cc_ibp_ctbench tinyimagenet_1_255_exp_ibp_ctbench tinyimagenet_1_255_pgd_ctbench
        tinyimagenet_1_255_edac_ctbench""",
}
ROWS = [row for rows in TABLES.values() for row in rows.split()]
ADVERSARIAL = {  # (clean, adversarial) of adversarial training, read at the source that the recipe names
    "cifar10_8_255_pgd_preact": (81.70, 52.79),
    "cifar10_8_255_awp_preact": (81.18, 55.39),
    "cifar100_8_255_pgd_preact": (53.48, 27.77),
    "cifar100_8_255_awp_preact": (54.19, 30.71),
    "svhn_8_255_pgd_preact": (89.85, 53.36),
    "svhn_8_255_awp_preact": (91.76, 59.12),
    "cifar10_l2_128_255_pgd_preact": (88.80, 69.15),
    "cifar10_l2_128_255_awp_preact": (90.11, 72.69),
    "cifar10_8_255_awp_wrn34": (86.23, 53.97),
    "cifar100_8_255_awp_wrn34": (60.38, 28.86),
    "cifar10_8_255_trades_wrn34": (84.92, 53.08),
    "cifar10_8_255_trades_awp_wrn34": (85.36, 56.17),
    "cifar10_8_255_mart_resnet18": (None, None),
    "cifar10_8_255_fgsm_rs_preact": (83.34, 43.21),
    "cifar10_8_255_grad_align_preact": (79.84, 43.93),
    "cifar10_8_255_free_preact": (None, None),
    "cifar10_8_255_trades_resnet18": (82.04, 49.80),
    "cifar10_8_255_trades_cfa_resnet18": (79.81, 50.78),
    "cifar10_8_255_trades_dafa_resnet18": (81.63, 49.05),
    "cifar100_8_255_trades_resnet18": (58.34, 25.60),
    "cifar100_8_255_trades_dafa_resnet18": (58.07, 25.08),
    "cifar100_8_255_trades_awp_wrn34": (60.17, 28.80),
    "imagenet_4_255_fgsm_rs_resnet50": (55.62, 26.24),
    "imagenet_2_255_fgsm_rs_resnet50": (60.90, 43.46),
    "cifar10_8_255_wang2023_wrn28": (92.44, 67.31),
}
CERTIFIED = [name for name in recipe_names() if name not in ADVERSARIAL]
OURS = """
    digits_mtl_ibp digits_sabr digits_shi_ibp mnist_01_cnn3_mtl_ibp cifar10_l2_36_255_liresnet_small
    mnist_01_gowal_small_mtl_ibp mnist_01_gowal_small_sabr mnist_01_gowal_small_shi_ibp""".split()

FIGURES = {  # (clean, certified) where the figure was read at its source or in released data; nothing from memory
    "mnist_04_shi_ibp": (None, 89.02),
    "cifar10_8_255_shi_ibp": (48.94, 34.97),
    "tinyimagenet_1_255_shi_ibp": (25.92, 17.87),
    "cifar10_2_255_sabr": (79.24, 62.84),
    "cifar10_8_255_sabr": (52.38, 35.13),
    "tinyimagenet_1_255_sabr": (28.85, 20.46),
    "mnist_03_mtl_ibp_expr": (98.80, 93.62),
    "cifar10_2_255_cc_ibp_expr": (80.09, 63.78),
    "cifar10_2_255_mtl_ibp_expr": (80.11, 63.24),
    "cifar10_2_255_exp_ibp_expr": (80.61, 61.65),
    "cifar10_8_255_cc_ibp_expr": (53.71, 35.27),
    "cifar10_8_255_mtl_ibp_expr": (53.35, 35.44),
    "cifar10_8_255_exp_ibp_expr": (53.97, 35.04),
    "tinyimagenet_1_255_mtl_ibp_expr": (37.56, 26.09),
    "cifar10_2_255_staps": (79.76, 62.98),
    "mnist_01_crown_ibp": (99.03, 97.75),
    "mnist_04_crown_ibp": (None, 87.54),
    "cifar10_2_255_crown_ibp": (None, 54.50),
    "cifar10_8_255_crown_ibp": (None, 32.89),
    "mnist_01_gowal_medium_ibp": (98.94, 97.08),
    "mnist_03_gowal_large_ibp": (98.34, 91.79),
    "mnist_03_ibp_ctbench": (98.54, 93.80),
    "mnist_03_crown_ibp_ctbench": (98.48, 93.90),
    "mnist_03_sabr_ctbench": (98.66, 93.68),
    "mnist_03_mtl_ibp_ctbench": (98.74, 93.90),
    "cifar10_2_255_ibp_ctbench": (67.49, 55.99),
    "cifar10_2_255_crown_ibp_ctbench": (67.60, 57.11),
    "cifar10_2_255_sabr_ctbench": (77.86, 63.61),
    "cifar10_2_255_mtl_ibp_ctbench": (78.82, 64.41),
    "cifar10_8_255_ibp_ctbench": (48.51, 35.28),
    "cifar10_8_255_crown_ibp_ctbench": (48.25, 32.59),
    "cifar10_8_255_sabr_ctbench": (52.71, 35.34),
    "cifar10_8_255_mtl_ibp_ctbench": (54.28, 35.41),
    "tinyimagenet_1_255_ibp_ctbench": (26.77, 19.82),
    "tinyimagenet_1_255_crown_ibp_ctbench": (28.44, 22.14),
    "tinyimagenet_1_255_sabr_ctbench": (30.58, 20.96),
    "tinyimagenet_1_255_mtl_ibp_ctbench": (35.97, 27.73),
    "cifar10_l2_36_255_gloro": (None, 60.0),
    "tinyimagenet_l2_36_255_gloro": (None, 22.4),
    "cifar10_l2_36_255_liresnet": (None, 70.1),
    "cifar100_l2_36_255_liresnet": (None, 41.5),
    "tinyimagenet_l2_36_255_liresnet": (None, 33.6),
    "imagenet_l2_36_255_liresnet": (None, 35.0),
    "imagenet_l2_1_liresnet": (None, 14.2),
    "cifar10_l2_36_255_liresnet_2024": (87.0, 78.1),
    "cifar100_l2_36_255_liresnet_2024": (62.1, 50.1),
    "tinyimagenet_l2_36_255_liresnet_2024": (48.4, 37.0),
    "imagenet_l2_36_255_liresnet_2024": (49.0, 38.3),
    "cifar10_l2_36_255_bronet": (81.57, 70.59),
}


def methods(name):
    """(registry, text) of every method that the recipe names."""
    s = load_recipe(name).settings
    yield OBJECTIVES, s.objective
    yield OPTIMIZERS, s.optimizer
    yield SCHEDULES, s.lr_schedule
    yield SCHEDULES, s.eps_schedule
    yield MODELS, s.model
    yield ATTACKS if s.validator.partition(":")[0] in ATTACKS else VERIFIERS, s.validator
    yield from ((REGULARIZERS, text) for text in s.regularizers)
    yield from ((HOOKS, text) for text in s.hooks)
    yield from ((WEIGHTINGS, text) for text in s.weightings)
    if s.weight_perturbation != "none":
        yield WEIGHT_PERTURBATIONS, s.weight_perturbation


def build(name):
    """The recipe's network on the meta device, which has shapes but no memory."""
    settings = load_recipe(name).settings
    data = parse_dataset(settings.data)
    data = getattr(data, "own", data)
    channels, side, classes = PROBLEMS[DATASETS.name_of(data)]
    side = getattr(data, "size", side)
    with torch.device("meta"):
        model = MODELS.parse(settings.model)((channels, side, side), classes, (0.0,) * channels, (1.0,) * channels)
    return model, torch.empty(1, channels, side, side, device="meta"), classes


def test_every_row_of_the_tables_has_a_recipe_and_every_recipe_is_a_row_or_ours():
    assert len(set(ROWS)) == len(ROWS)
    assert sorted([*ROWS, *OURS, *ADVERSARIAL]) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_every_method_of_a_recipe_is_known_and_spelled_back_to_the_same_method(name):
    for registry, text in methods(name):
        method = registry.parse(text)
        assert registry.parse(registry.spell(method)) == method, text
    data = parse_dataset(load_recipe(name).settings.data)
    assert parse_dataset(DATASETS.spell(data)) == data


@pytest.mark.parametrize("name", recipe_names())
def test_no_method_of_a_recipe_is_idle_or_weights_what_is_weighted(name):
    settings = load_recipe(name).settings
    refuse_misfits(settings, torch.zeros(3), 100)
    objective = OBJECTIVES.parse(settings.objective)
    run = SimpleNamespace(epochs=settings.epochs, classes=10, objective=objective, ball=None)
    for text in settings.weightings:
        begin(WEIGHTINGS.parse(text), run)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "wide_resnet" in load_recipe(name).settings.model])
def test_wide_residual_networks_start_as_their_authors_let_them(name):
    assert load_recipe(name).settings.init == "kaiming_normal"


@pytest.mark.parametrize("name", recipe_names())
def test_the_network_of_a_recipe_fits_its_data(name):
    model, x, classes = build(name)
    assert model.eval()(x).shape == (1, classes)


@pytest.mark.parametrize("name", CERTIFIED)
def test_the_radius_is_full_before_the_rate_falls_and_the_rate_falls_before_the_end(name):
    settings = load_recipe(name).settings
    ramp, drops = SCHEDULES.parse(settings.eps_schedule), SCHEDULES.parse(settings.lr_schedule)
    if settings.norm == "l2":  # a cosine or a geometric decay over the whole run: the radius is full at half of it
        assert ramp.start == 0 and ramp.end == settings.epochs / 2
        assert getattr(drops, "end", settings.epochs) == settings.epochs
        return
    assert 0 <= ramp.start < ramp.end <= min(drops.at)
    assert list(drops.at) == sorted(drops.at) and max(drops.at) < settings.epochs


@pytest.mark.parametrize("name", recipe_names())
def test_attacks_of_training_return_an_adversarial_point_for_every_image(name):
    objective = OBJECTIVES.parse(load_recipe(name).settings.objective)
    attack = getattr(objective, "attack", None)
    if attack is not None:
        # "first_fooled" would keep the clean input of images that are wrong already.
        assert getattr(attack, "keep", "last") != "first_fooled" and attack.mode == "keep"


@pytest.mark.parametrize("name", recipe_names())
def test_hooks_and_splits_suit_the_network(name):
    model, _, _ = build(name)
    settings = load_recipe(name).settings
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    relus = [m for m in model.modules() if isinstance(m, torch.nn.ReLU | torch.nn.SiLU | MinMax)]
    assert norms or "precise_bn" not in settings.hooks
    assert getattr(OBJECTIVES.parse(settings.objective), "classifier_relus", 1) < len(relus)


@pytest.mark.parametrize("name", ROWS)
def test_published_rows_train_on_all_images_and_quote_verified_figures_only(name):
    recipe = load_recipe(name)
    assert recipe.settings.validation == 0 and recipe.settings.select == "last"
    assert recipe.published is not None and recipe.published.source
    figures = (recipe.published.clean, recipe.published.certified)
    assert figures == FIGURES.get(name, (None, None))
    for figure in figures:
        assert figure is None or 0 <= figure <= 100
    if None not in figures:
        assert recipe.published.certified <= (recipe.published.adversarial or recipe.published.clean)
    if figures == (None, None):
        assert "No verified figure is known" in recipe.note
    else:
        assert "read in" in recipe.published.source


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_rows_select_on_held_out_images_and_quote_verified_figures_only(name):
    recipe = load_recipe(name)
    settings, row = recipe.settings, recipe.published
    assert settings.validation == 0.02 and settings.select == "best"
    assert (settings.eps_schedule, settings.clip_norm, settings.train_eps_factor) == ("constant", 0, 1)
    assert row is not None and row.certified is None
    assert (row.clean, row.adversarial) == ADVERSARIAL[name]
    if row.clean is None:
        assert "No verified figure is known" in recipe.note and not row.attack
    else:
        assert row.attack and "read in" in row.source and row.adversarial < row.clean
    drops = getattr(SCHEDULES.parse(settings.lr_schedule), "at", ())
    assert list(drops) == sorted(drops) and all(at < settings.epochs for at in drops)


def test_the_radius_of_the_trades_family_is_the_authors_own():
    for name in ADVERSARIAL:
        settings = load_recipe(name).settings
        attack = getattr(OBJECTIVES.parse(settings.objective), "attack", None)
        if settings.eps == 0.031:
            assert attack.step_size * settings.eps == pytest.approx(0.007)
            assert settings.data.endswith("mean=0,std=1")
        elif getattr(attack, "steps", 0):
            step = {"svhn": 1 / 255, "cifar10_l2": 15 / 255}
            expected = next((v for key, v in step.items() if name.startswith(key)), 2 / 255)
            assert attack.step_size * settings.eps == pytest.approx(expected)


@pytest.mark.parametrize("name", OURS)
def test_our_own_recipes_quote_nobody(name):
    assert load_recipe(name).published is None


def test_only_cifar10_at_2_255_shrinks_relus():
    shrunk = {name for name in recipe_names() if "relu_shrink" in load_recipe(name).settings.objective}
    assert shrunk == {
        "cifar10_2_255_sabr",
        "cifar10_2_255_staps",
        "cifar10_2_255_sabr_ctbench",
        "cifar10_2_255_taps_ctbench",
        "cifar10_2_255_staps_ctbench",
    }


@pytest.mark.parametrize(
    "name, radius",
    [
        ("mnist_01_sabr", 0.1),
        ("mnist_01_mtl_ibp_expr", 0.2),
        ("mnist_03_mtl_ibp_expr", 0.4002),
        ("mnist_03_taps", 0.4),
        ("mnist_01_ibp_ctbench", 0.2),
        ("mnist_03_ibp_ctbench", 0.3),
        ("mnist_03_taps_ctbench", 0.4),
        ("cifar10_2_255_sabr_ctbench", 3 / 255),
        ("cifar10_2_255_sabr_expr", 4.2 / 255),
        ("cifar10_2_255_crown_ibp", 2.2 / 255),
        ("cifar10_8_255_crown_ibp_lirpa", 8.8 / 255),
        ("mnist_03_gowal_small_ibp", 0.33),
        ("mnist_01_gowal_small_sabr", 0.2),
        ("imagenet64_1_255_exp_ibp", 1 / 255),
        ("cifar10_l2_36_255_gloro", 1.1 * 36 / 255),
        ("tinyimagenet_l2_36_255_gloro", 0.16),
        ("cifar10_l2_36_255_liresnet", 1.5 * 36 / 255),
        ("cifar10_l2_36_255_liresnet_2024", 3 * 36 / 255),
        ("imagenet_l2_36_255_liresnet_2024", 2 * 36 / 255),
        ("imagenet_l2_1_liresnet", 1.5),
    ],
)
def test_the_radius_of_training_is_the_sources(name, radius):
    assert load_recipe(name).settings.train_ball().eps == pytest.approx(radius, rel=1e-12)


def test_sabr_lowers_the_rate_one_epoch_before_its_milestones():
    for name in TABLES["SABR"].split():
        settings = load_recipe(name).settings
        drops = SCHEDULES.parse(settings.lr_schedule).at
        assert drops[1] - drops[0] in (10, 20) and all(at % 10 == 9 for at in drops)
        assert settings.clip_norm == 0


def test_gowals_schedules_convert_back_to_the_sources_steps():
    settings = load_recipe("mnist_01_gowal_medium_ibp").settings
    steps = 60_000 // settings.batch_size
    ramp, drops = SCHEDULES.parse(settings.eps_schedule), SCHEDULES.parse(settings.lr_schedule)
    assert [ramp(step, steps, 200) for step in (2_000, 7_000, 12_000)] == pytest.approx([0, 0.5, 1])
    assert ramp(11_999, steps, 200) < 1
    assert [drops(step, steps, 200) for step in (14_999, 15_000, 24_999, 25_000)] == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("digits")])
def test_digits_recipes_run(name, tmp_path):
    settings = dataclasses.replace(load_recipe(name).settings, epochs=2, eps_schedule="smooth:start=0,end=1")
    checkpoint = train(settings, tmp_path, progress=False)
    assert all(parameter.isfinite().all() for parameter in checkpoint.model.parameters())


@pytest.mark.parametrize(
    "text, message",
    [
        ("titel = 'x'", r"recipe mine: unknown key 'titel'; expected title, note, settings, published"),
        ("[settings]\nepoch = 3", r"recipe mine: no setting 'epoch' \(did you mean 'epochs'\?\)"),
        ("[settings]\nepochs = '3'", r"recipe mine: epochs: expected int, got '3'"),
        ("[settings]\neps = 8", r"recipe mine: eps=8 leaves the pixel range \[0, 1\]; did you mean 8/255\?"),
        ("[published]\nclaen = 3", r"recipe mine: .*claen"),
        ("[settings]\nepochs 3", r"recipe mine: .*line 2"),
    ],
)
def test_what_a_recipe_file_says_wrong_is_refused_by_name(text, message):
    with pytest.raises(SettingsError, match=message):
        parse_recipe("mine", text)


def test_a_mistyped_recipe_is_answered_with_its_neighbours():
    with pytest.raises(SettingsError, match=r"no recipe 'digits_mtl'; near: .*digits_mtl_ibp"):
        load_recipe("digits_mtl")


def test_a_recipe_is_also_read_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('title = "Mine"\n[settings]\neps = "8/255"\n', encoding="utf-8")
    recipe = load_recipe(str(file))
    assert (recipe.name, recipe.title, recipe.settings.eps, recipe.published) == ("mine", "Mine", 8 / 255, None)
    with pytest.raises(SettingsError, match=r"no recipe file at .*other\.toml"):
        load_recipe(str(tmp_path / "other.toml"))
