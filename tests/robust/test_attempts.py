"""Verdicts of an ensemble in a report: per example and per attack, also when the evaluation was interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import robust
from attacks import AutoAttack, LinfBall
from robust.evaluate import evaluate
from robust.html_report import html_page
from robust.report import Report, Row

NAMES = ["apgd_ce", "apgd_t", "fab_t", "square"]


@pytest.fixture(scope="module")
def problem():
    data = robust.parse_dataset("digits")(None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        x, y = data.train.batch(torch.arange(400))
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval(), data


def judged(problem, attack, out: Path | None = None, limit: int = 24) -> Report:
    net, data = problem
    return evaluate(net, data, LinfBall(0.15), None, attack, limit=limit, batch_size=8, out=out)


def verdicts(report: Report) -> list[Row]:
    return [dataclasses.replace(row, seconds=0.0) for row in report.rows]


def test_each_example_is_tried_until_one_attack_fools_it(problem):
    report = judged(problem, AutoAttack(steps=6, queries=30))
    assert {row.status for row in report.rows} >= {"unknown", "falsified"}
    for row in report.rows:
        assert list(row.attempts) == NAMES[: len(row.attempts)]
        assert not any(list(row.attempts.values())[:-1])
        if row.status == "falsified":
            assert row.attempts[row.method] and row.method == list(row.attempts)[-1] and row.attack_margin < 0
        elif row.status == "unknown":
            assert row.attempts == dict.fromkeys(NAMES, False) and row.attack_margin > 0
        else:
            assert row.attempts == {}
    attacks = report.summary().attacks
    left = sum(row.status != "misclassified" for row in report.rows)
    for name in NAMES:
        assert attacks[name].tried == left
        left -= attacks[name].fooled
    assert "What each attack found" in html_page(report)


def test_individual_attacks_are_tried_on_every_example_and_the_verdict_stays(problem):
    together = judged(problem, AutoAttack(steps=6, queries=30))
    apart = judged(problem, AutoAttack(steps=6, queries=30, individual=True))
    for one, other in zip(together.rows, apart.rows, strict=True):
        assert (one.status, one.method, one.linf) == (other.status, other.method, other.linf)
        if other.status != "misclassified":
            assert list(other.attempts) == NAMES and any(other.attempts.values()) == other.attacked
            assert {name: other.attempts[name] for name in one.attempts} == one.attempts


def test_an_interrupted_evaluation_goes_on_with_the_same_verdicts(problem, tmp_path: Path):
    whole = judged(problem, AutoAttack(steps=4, queries=20), tmp_path / "whole")
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "rows.jsonl").write_text("".join(lines[:12]) + lines[12][:20])
    again = judged(problem, AutoAttack(steps=4, queries=20), tmp_path / "cut")
    assert verdicts(again) == verdicts(whole) == verdicts(Report.load(tmp_path / "cut"))
