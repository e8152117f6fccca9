"""Plans: estimates, budgets, and going on with what was planned."""

from __future__ import annotations

import dataclasses

import pytest

from certify.verifier import VERIFIERS
from robust.schedule import SCHEDULES
from robust.settings import Settings
from robust.trainer import Rehearsal
from scripts.reproduction import estimate
from scripts.reproduction import plan as module
from scripts.reproduction.estimate import judging_seconds, training_seconds
from scripts.reproduction.plan import (
    JUDGING_SHARE,
    LEAST_SCHEDULE,
    Order,
    PlanError,
    duration,
    fitted,
    load_plan,
    make_plan,
    plan_text,
)
from scripts.reproduction.reduce import with_epochs
from tests.scripts.tables import job, plan, table

SETTINGS = Settings(model="cnn3:width=2", objective="ibp", epochs=4, batch_size=64)


def planned(tmp_path, order=None, **options):
    chosen = {"device": "cpu", "root": None, "networks": tmp_path, "estimate": False, **options}
    return make_plan(table(), order or Order("own"), table().names(None), **chosen)


def test_a_plan_has_a_job_for_every_row_and_seed(tmp_path):
    made = planned(tmp_path, Order("own", seeds=(3, 5)))
    assert [(one.row, one.seed) for one in made.jobs] == [
        (row, seed) for row in ("first", "second", "quoted") for seed in (3, 5)
    ]
    assert [one.settings["seed"] for one in made.jobs[:4]] == [3, 5, 3, 5]
    assert [one.left_out for one in made.jobs] == [""] * 4 + ["nobody knows how"] * 2
    assert len({one.folder for one in made.jobs}) == len(made.jobs)


def test_a_full_scale_plan_is_the_recipe_and_the_published_judge(tmp_path):
    made = planned(tmp_path)
    assert made.jobs[0].remarks == () and made.jobs[0].verifier == "ibp"
    assert made.jobs[0].settings["epochs"] == 30


def test_estimates_grow_with_images_and_epochs():
    once = training_seconds(SETTINGS, 1000, "cpu")
    assert once > 0
    assert training_seconds(SETTINGS, 3000, "cpu") == pytest.approx(3 * once)
    assert training_seconds(with_epochs(SETTINGS, 8), 1000, "cpu") == pytest.approx(2 * once)


def test_steps_are_measured_all_over_the_run(monkeypatch):
    """A CROWN-IBP step at the end of the ramp costs a fraction of one at its beginning."""
    shown = []

    def rehearsed(settings, root, device, steps):
        shown.append(settings)
        return Rehearsal(settings.batch_size, 1, 1, seconds_per_step=3.0)

    monkeypatch.setattr(estimate, "rehearse", rehearsed)
    settings = dataclasses.replace(SETTINGS, objective="crown_ibp", eps_schedule="smooth:start=1,end=3", batch_size=57)
    assert training_seconds(settings, 1000, "cpu") == 4 * 1000 * 3.0 / shown[-1].batch_size
    schedule = SCHEDULES.parse(shown[-1].eps_schedule)
    assert (schedule.start / shown[-1].epochs, schedule.end / shown[-1].epochs) == (1 / 4, 3 / 4)


def test_a_verifier_with_a_time_limit_takes_at_most_that_and_an_attack_counts_its_steps():
    assert judging_seconds(SETTINGS, "cascade:timeout=20", "", 50, "cpu") == 1000
    one, two = (judging_seconds(SETTINGS, "", f"pgd:steps={steps}", 10, "cpu") for steps in (10, 30))
    assert two == pytest.approx(3 * one) and one > 0
    assert judging_seconds(SETTINGS, "", "autoattack", 10, "cpu") > 100 * one
    assert judging_seconds(SETTINGS, "ibp", "", 10, "cpu") > 0


def some(*hours, judging=600.0):
    return [job(f"row {i}", training_seconds=3600.0 * hour, judging_seconds=judging) for i, hour in enumerate(hours)]


@pytest.mark.parametrize("hours", [0.5, 1, 3, 7, 20, 100, 1000])
def test_what_fits_into_a_budget_keeps_to_it_and_trains_no_row_for_less_than_its_least_schedule(hours):
    jobs = fitted(some(1, 2, 4, 40, judging=1e6), hours * 3600)
    kept = [one for one in jobs if not one.left_out]
    assert kept and sum(one.seconds for one in kept) <= hours * 3600 * (1 + 1e-9)
    for one in kept:
        epochs = one.settings["epochs"]
        assert epochs >= LEAST_SCHEDULE * 100 - 1
        assert (epochs == 100) != any("epochs (budget)" in remark for remark in one.remarks)


def test_a_larger_budget_keeps_no_fewer_rows_and_no_shorter_schedules_of_the_same_rows():
    before: dict[str, int] = {}
    for hours in (1, 2, 5, 20, 80):
        now = {one.row: one.settings["epochs"] for one in fitted(some(1, 2, 4, 40), hours * 3600) if not one.left_out}
        assert set(before) <= set(now)
        assert set(before) != set(now) or all(before[row] <= now[row] for row in before)
        before = now
    assert before == {f"row {i}": 100 for i in range(4)}


def test_a_short_budget_shortens_the_verifier_first_and_then_takes_fewer_images():
    (one,) = fitted(some(1, judging=60 * 10_000), 4 * 3600.0)
    assert VERIFIERS.parse(one.verifier).timeout == 1
    assert one.limit == int(JUDGING_SHARE * 4 * 3600) and any("3600 of 10000 test images" in r for r in one.remarks)


def test_a_budget_that_nothing_fits_into_is_one_line_with_what_the_cheapest_row_takes():
    with pytest.raises(PlanError, match=r"no row fits into the budget: row 1, the cheapest, takes 0\.5 h"):
        fitted(some(50, 5), 60.0)


def test_a_plan_is_gone_on_with_and_refuses_another_order(tmp_path):
    made = plan([job(remarks=("shorter",)), job(seed=1, left_out="why")], scale=0.5, seeds=(0, 1))
    made.save(tmp_path)
    assert load_plan(tmp_path, made.order) == made == load_plan(tmp_path)
    with pytest.raises(PlanError, match=r"holds a reproduction with scale 0\.5, seeds \[0, 1\]; choose another --out"):
        load_plan(tmp_path, Order("own"))


def test_a_network_that_is_not_there_is_left_out_and_the_line_names_the_file(tmp_path):
    networks = table('[[row]]\nnetwork = "cnn_z"\nverifier = "cascade:timeout=20"')
    (one,) = make_plan(
        networks, Order("own"), ("cnn_z",), device="cpu", root=None, networks=tmp_path, estimate=False
    ).jobs
    assert one.left_out == f"there is no {tmp_path / 'cnn_z' / 'network.json'}; give --networks or set ROBUST_REFERENCE"


def test_the_listing_names_what_is_done_and_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "training_seconds", lambda settings, images, device: 7200.0)
    monkeypatch.setattr(module, "judging_seconds", lambda settings, verifier, attack, images, device: 90.0)
    made = planned(tmp_path, estimate=True)
    states = {("first", 0): "finished", ("second", 0): "begun", ("quoted", 0): "to do"}
    text = plan_text(made, table().names(None), states)
    assert "finished  first   seed 0  training about 2.0 h, judging at most 1.5 min" in text
    assert "begun     second" in text and "left out  quoted" in text and "nobody knows how" in text
    assert text.endswith("3 jobs, 1 to do: about 2.0 h of training and at most 1.5 min of judging on one device")


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (90, "1.5 min"), (5400, "1.5 h"), (200_000, "2.3 d")])
def test_durations_are_told_in_the_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text
