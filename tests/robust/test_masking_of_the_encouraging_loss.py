"""The encouraging loss masks gradients: PGD on the cross-entropy is deceived, the checks say so, AutoAttack agrees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.attack import ATTACKS
from attacks.threat import LinfBall
from robust.cli import main
from robust.dataset import parse_dataset
from robust.masking import Masking
from robust.run_setup import CHECKPOINT
from robust.settings import Settings
from robust.trainer import train

IMAGES = 120
EPS = 0.2
"""Twice the radius of training: there the logits of this loss keep growing, and the cross-entropy saturates."""


def evidence(objective: str, folder: Path) -> tuple[Masking, float]:
    """What `robust masking` writes beside the checkpoint of a run, and the accuracy under AutoAttack in percent."""
    settings = Settings(
        data="digits",
        model="mlp:hidden=100+100",
        objective=f"{objective},attack=(pgd:steps=7,step_size=0.33,keep=last,mode=keep)",
        eps=EPS / 2,
        epochs=40,
        batch_size=50,
        optimizer="adam:lr=0.02",
        validation=0.0,
    )
    checkpoint = train(settings, folder, progress=False)
    options = ["--eps", str(EPS), "--limit", str(IMAGES), "--device", "cpu", "--quiet"]
    assert main(["masking", str(folder / CHECKPOINT), *options]) == 0
    record = Masking.load(folder / "attack")
    assert record is not None
    x, y = parse_dataset("digits")(None).test.batch(torch.arange(IMAGES))
    points = ATTACKS.parse("autoattack:queries=1000")(checkpoint.model, x, y, LinfBall(EPS))
    with torch.no_grad():
        return record, 100 * (checkpoint.model(points).argmax(1) == y).double().mean().item()


@pytest.mark.slow
def test_its_robustness_under_pgd_is_flagged_in_the_report_and_gone_under_autoattack(tmp_path: Path):
    record, strong = evidence("encouraging:bonus_end=1", tmp_path / "encouraging")
    plain, plain_strong = evidence("pgd:robust_weight=1", tmp_path / "pgd")
    facts = f"{record.accuracies} {strong} {record.flags}; {plain.accuracies} {plain_strong}"
    assert record.accuracies["pgd"] > plain.accuracies["pgd"] + 20, facts
    assert strong < record.accuracies["pgd"] - 30 and abs(strong - plain_strong) < 10, facts
    assert {"cross-entropy is too weak", "losses disagree"} <= set(record.flags), facts
    # The checks' own attacks find what AutoAttack finds.
    assert abs(min(record.accuracies[name] for name in ("margin", "dlr", "restarts")) - strong) < 5, facts
    attack = ["attack", str(tmp_path / "encouraging" / CHECKPOINT), "--attack", "pgd:steps=20", "--limit", "20"]
    assert main([*attack, "--eps", str(EPS), "--no-curve", "--device", "cpu", "--quiet"]) == 0
    page = (tmp_path / "encouraging" / "attack" / "report.html").read_text(encoding="utf-8")
    assert "Can the attacks be trusted?" in page and "cross-entropy is too weak" in page
