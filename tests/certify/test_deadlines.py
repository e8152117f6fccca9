"""Backward bounds that are cut short: what is left out keeps looser bounds that hold, and no more work is begun."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from attacks.threat import LinfBall
from certify.bounds import crown as crown_module
from certify.bounds.crown import Boxes, crown, intermediate_boxes
from certify.bounds.interval import interval_walk
from certify.docket import Request
from certify.graph import Snapshot
from certify.region import Region
from certify.spec import margin_spec
from certify.tracing import capture
from certify.verifiers import crown as crown_verifier
from certify.verifiers import crown_ibp as crown_ibp_verifier

EPS = 0.1


@pytest.fixture
def problem() -> tuple[Snapshot, Region]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)).double()
    x = torch.rand(3, 6, dtype=torch.float64)
    snapshot = capture(model, x[:1]).snapshot().without_gradient()
    return snapshot.with_spec(margin_spec(model(x).argmax(1), 4, torch.float64)), Region.around(x, LinfBall(EPS))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that every backward pass moves on by a second, of chunks of one row; how many passes there were."""
    monkeypatch.setattr(crown_module, "ROW_BUDGET_ON_CPU", 1)
    passes, own = [0], crown_module.backward

    def counted(*arguments: object) -> object:
        passes[0] += 1
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(crown_module, "backward", counted)
    for module in (crown_module, crown_verifier):
        monkeypatch.setattr(module.time, "perf_counter", lambda: float(passes[0]))
    return passes


def looser(one: Boxes, other: Boxes) -> bool:
    return all(bool((one[p].lb <= other[p].lb + 1e-9).all() & (one[p].ub >= other[p].ub - 1e-9).all()) for p in other)


@torch.no_grad()
def test_neurons_that_are_left_out_keep_their_intervals(problem, clock):
    snapshot, region = problem
    whole = intermediate_boxes(snapshot, region)
    needed = clock[0]
    assert needed > 10
    intervals = interval_walk(snapshot, region.interval())[1]
    before = whole
    for seconds in (needed - 1, needed // 2, 1, 0):
        clock[0] = 0
        boxes = intermediate_boxes(snapshot, region, deadline=float(seconds))
        assert clock[0] == seconds
        assert looser(boxes, before) and looser(intervals, boxes)
        assert all(bool((box.lb <= box.ub).all()) for box in boxes.values())
        before = boxes
    for place, box in intervals.items():
        torch.testing.assert_close(before[place].lb, box.lb)
        torch.testing.assert_close(before[place].ub, box.ub)


@torch.no_grad()
def test_outputs_that_are_left_out_have_no_bound_and_the_others_that_of_a_whole_pass(problem, clock):
    snapshot, region = problem
    boxes = intermediate_boxes(snapshot, region)
    low, scale = crown(snapshot, region, boxes)
    clock[0] = 0
    part, part_scale = crown(snapshot, region, boxes, deadline=2.0)
    assert part.shape == low.shape == scale.shape == part_scale.shape and clock[0] == 2
    assert torch.equal(part[:, :2], low[:, :2]) and bool((part[:, 2:] == -math.inf).all())
    assert torch.equal(part_scale[:, :2], scale[:, :2])


@pytest.mark.parametrize("verifier", [crown_verifier, crown_ibp_verifier])
@pytest.mark.parametrize("seconds", [0.0, 1.0, 4.0, 30.0, math.inf])
@torch.no_grad()
def test_bounds_of_verifiers_end_in_time_and_hold(verifier, seconds, problem, clock):
    snapshot, region = problem
    wanted = torch.ones(3, 3, dtype=torch.bool)
    kept: list[Boxes] = []
    found, _ = verifier.bound(snapshot, region, Request(wanted, lambda low, scale: False, seconds, kept.append))
    assert clock[0] <= seconds
    reached = torch.isfinite(found).all(0)
    assert bool(reached.all()) if seconds == math.inf else bool(reached[0]) or seconds < 4
    assert not bool(reached.any()) or seconds > 0
    assert len(kept) == (verifier is crown_verifier)
    points = region.x + (2 * torch.rand(2000, *region.x.shape, dtype=torch.float64) - 1) * EPS
    for values in points.clamp(0, 1):
        assert bool((snapshot(values) >= found - 1e-9).all())


def test_what_is_differentiated_is_bounded_in_one_pass(problem, clock):
    snapshot, region = problem
    with torch.no_grad():
        boxes = intermediate_boxes(snapshot, region)
    clock[0] = 0
    low: Tensor = crown(snapshot, region, boxes)[0]
    assert clock[0] == 1
    with torch.no_grad():
        torch.testing.assert_close(crown(snapshot, region, boxes)[0], low)
        assert clock[0] == 1 + low.shape[1]
