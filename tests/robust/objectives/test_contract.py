"""What every registered objective promises."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from attacks.methods.pgd import PGD
from robust.objective import OBJECTIVES
from robust.training_attack import SABR_PGD, SINGLE_STEP
from tests.robust.objectives import oracle

EPS = 0.05
STEPS = {"start": (0.0, 0.0), "ramp": (0.3, 0.6), "end": (1.0, 1.0)}
"""(share of the radius, share of the ramp) of three moments of a run."""


# Losses of l2-certified networks need an l2 ball and a network of their own: test_l2_objectives.py. DVERGE needs an
# ensemble: test_dverge.py.
NAMES = [n for n in OBJECTIVES.names() if getattr(OBJECTIVES[n], "norms", ("linf",)) != ("l2",) and n != "dverge"]
ATTACKING = [name for name in NAMES if "attack" in OBJECTIVES[name].__dataclass_fields__]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "batch_norm"])
def model(request):
    return oracle.small_net(batch_norm=request.param, hidden=3)


def at(model, x, y, moment, seed=0, eps=EPS):
    fraction, ramp = STEPS[moment]
    return oracle.views_of(model, x, y, fraction * eps, seed=seed, eps_fraction=fraction, ramp=ramp)


@pytest.mark.parametrize("moment", STEPS)
def test_terms_are_one_value_per_example_and_gradients_reach_every_parameter(name, model, moment):
    x, y = oracle.images()
    views = at(model, x, y, moment)
    terms = oracle.begun(oracle.objective(name), model)(views)
    assert terms and all(isinstance(key, str) and value.shape == (len(x),) for key, value in terms.items())
    loss = oracle.loss_of(terms)
    assert loss.isfinite() and loss > 0
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # A bias in front of a BatchNorm has no effect; every other parameter must move.
        if "bias" not in key:
            assert parameter.grad.any(), key


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-3])
def test_single_precision_gradients_are_finite_at_tiny_radii(name, eps):
    for batch_norm in (False, True):
        model = oracle.small_net(batch_norm, hidden=3).float()
        x, y = oracle.images()
        views = oracle.views_of(model, x.float(), y, eps)
        loss = oracle.loss_of(oracle.begun(oracle.objective(name), model)(views))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in oracle.gradients(loss, model))


def test_text_and_value_convert_without_loss(name):
    kind = OBJECTIVES[name]
    changes, required = {}, oracle.required(kind)
    for field in dataclasses.fields(kind):
        value = getattr(oracle.objective(name), field.name)
        if field.name == "attack":
            changes[field.name] = dataclasses.replace(SINGLE_STEP, step_size=2 / 255)
        elif field.name == "objective":
            changes[field.name] = dataclasses.replace(value, robust_weight=0.5)
        elif field.name in required:
            continue
        elif value is None:
            changes[field.name] = 2.0 if "float" in field.type else 2
        elif isinstance(value, tuple):
            changes[field.name] = (*value, 300.5)
        elif isinstance(value, str):
            others = {
                "statistics": "running",
                "bounds_statistics": "adversarial",
                "batch_norm": "own" if value == "clean" else "clean",
                "teacher": "cnn7:width=3",
                "weights": "mgda",
            }
            changes[field.name] = others[field.name]
        elif isinstance(value, bool):
            changes[field.name] = not value
        else:
            changes[field.name] = value + 1 if isinstance(value, int) else value / 3 + 0.1
    for objective in (kind(**required), kind(**required, **changes)):
        text = OBJECTIVES.spell(objective)
        assert OBJECTIVES.parse(text) == objective
        assert OBJECTIVES.spell(OBJECTIVES.parse(text)) == text
    assert required or OBJECTIVES.spell(kind()) == name


def test_the_same_generator_gives_the_same_terms(name, model):
    x, y = oracle.images()
    for moment in STEPS:
        torch.manual_seed(1)
        first = oracle.begun(oracle.objective(name), model)(at(copy.deepcopy(model), x, y, moment))
        torch.manual_seed(2)
        second = oracle.begun(oracle.objective(name), model)(at(copy.deepcopy(model), x, y, moment))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ATTACKING)
def test_another_seed_of_the_generator_attacks_from_another_start(name, model):
    x, y = oracle.images()
    objective = oracle.begun(oracle.objective(name, attack=PGD(steps=0, keep="last", mode="keep")), model)
    first, second = (oracle.loss_of(objective(at(model, x, y, "end", seed=seed))) for seed in (0, 1))
    assert first != second


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An attack that writes down its points, or replays points without looking at the network."""

    points: list
    replay: bool
    seed: int = 0

    def __call__(self, model, x, y, ball, *, generator=None, index=None):
        found = SABR_PGD(model, x, y, ball, generator=generator)
        assert not found.requires_grad
        if self.replay:
            return self.points[0]
        self.points.append(found)
        return found


@pytest.mark.parametrize("name", ATTACKING)
def test_attacks_leave_no_gradient_behind_and_their_points_count_as_constants(name, model):
    x, y = oracle.images()
    points: list = []
    before = copy.deepcopy(model)
    found = []
    for replay in (False, True):
        method = oracle.begun(oracle.objective(name, attack=Recorded(points, replay)), model)
        terms = method(at(copy.deepcopy(before), x, y, "end"))
        found.append(oracle.loss_of(terms))
    assert torch.equal(*found)
    current = copy.deepcopy(before)
    views = at(current, x, y, "end")
    objective = oracle.begun(oracle.objective(name, attack=Recorded(points, True)), model)
    loss = oracle.loss_of(objective(views))
    assert all(parameter.grad is None for parameter in current.parameters())
    assert all(parameter.requires_grad for parameter in current.parameters())
    live = copy.deepcopy(before)
    searched = oracle.loss_of(oracle.begun(oracle.objective(name), live)(at(live, x, y, "end")))
    assert all(parameter.grad is None for parameter in live.parameters())
    if oracle.objective(name).attack == SABR_PGD:
        oracle.assert_same_gradients(oracle.gradients(searched, live), oracle.gradients(loss, current))


EXACT = {"natural", "pgd", "trades", "ibp", "shi_ibp", "crown_ibp", "sabr", "cc_ibp", "mtl_ibp"}
EXACT |= {"fgsm_at", "fgsm_rs", "n_fgsm", "free_at", "beta", "fat", "gat", "pubdef", "smooth_comp_sum"}
OTHER_LOSSES = {"mart", "sovr", "arow", "awr", "edac", "encouraging", "hat", "lat", "lbgat", "mtard", "srat"}
"""At radius 0 these are the clean cross-entropy example by example; exp_ibp is it on the mean of the batch. Others
have another loss of the label or none, a teacher, a term of the features, or a radius of their own. TAPS and STAPS are
a product of two losses once the ramp has ended, and the clean cross-entropy before."""


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHER_LOSSES])
def test_radius_zero_reduces_to_the_clean_cross_entropy(name, model):
    x, y = oracle.images()
    z, _ = oracle.clean_pass(model, x)
    clean = oracle.loss_of_logits(z, y)
    for moment in ("start", "end"):
        # At the end of a schedule the radius may still be 0: a run without perturbations.
        terms = oracle.begun(oracle.objective(name), model)(at(model, x, y, moment, eps=0.0))
        if name in EXACT:
            torch.testing.assert_close(torch.stack(list(terms.values())).sum(0), clean)
        total = oracle.loss_of(terms)
        if name in ("taps", "staps") and moment == "end":
            torch.testing.assert_close(total, clean.mean().square())
            continue
        torch.testing.assert_close(total, clean.mean())
        target = oracle.loss_of_logits(oracle.clean_pass(model, x)[0], y).mean()
        oracle.assert_same_gradients(oracle.gradients(total, model), oracle.gradients(target, model), 1e-7)


def test_objectives_are_frozen_values(name):
    first, second = oracle.objective(name), oracle.objective(name)
    assert first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.robust_weight = 0.5
