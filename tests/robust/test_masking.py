"""Checks for masked gradients: models that mask them in a known way, and one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attacks import LinfBall
from robust.html_report import html_page
from robust.masking import MASKING_FILE, Masking, check_masking
from robust.report import Report, ReportError

BALL = LinfBall(0.1)


class Scaled(nn.Module):
    """A linear classifier of 4x4 images with its logits multiplied: a large factor saturates cross-entropy."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        self.factor = factor

    def forward(self, x):
        return ((x - 0.5).flatten(1) @ self.weight) * self.factor


class Noisy(Scaled):
    def forward(self, x):
        return super().forward(x + 0.05 * torch.randn_like(x))


class Softmax(Scaled):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Rounding(Scaled):
    """Its gradients are zero everywhere, and a random search has no trouble at all."""

    def forward(self, x):
        return super().forward(((x * 8).round() / 8 - x).detach() + 0 * x + x.detach())


class Purifying(Scaled):
    """Moves its input to lower a loss before it classifies."""

    def forward(self, x):
        with torch.enable_grad():
            moved = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(super().forward(moved).logsumexp(1).sum(), moved)
        return super().forward(x + 0.001 * gradient)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(100, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, images: torch.Tensor) -> Masking:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(images).argmax(1)
    return check_masking(model, images, y, BALL)


def test_a_plain_model_raises_the_flag_of_its_three_classes_alone(images):
    record = check(Scaled(), images)
    assert record.flags == ("few classes",)
    assert record.accuracies["clean"] == 100 and 0 < record.accuracies["margin"] < 90
    assert record.accuracies["far"] == 0 and record.examples == 100


def test_a_saturated_cross_entropy_is_flagged_where_margin_and_dlr_succeed(images):
    record = check(Scaled(1e5), images)
    assert {"losses disagree", "zero gradients of cross_entropy", "cross-entropy is too weak"} <= set(record.flags)
    accuracies = record.accuracies
    assert accuracies["pgd"] > accuracies["margin"] + 20 and accuracies["cross_entropy"] > accuracies["dlr"] + 5


@pytest.mark.parametrize(
    "model, flags",
    [
        (Noisy(), {"randomised"}),
        (Softmax(), {"probabilities"}),
        (
            Rounding(),
            {"zero gradients of dlr", "Square helps", "random points beat attacks", "robust at a large radius"},
        ),
        (Purifying(), {"optimises at test time"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_ways_of_masking_are_flagged(model, flags, images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert flags <= set(check(model, images).flags)


def test_the_record_survives_the_file_and_is_shown_by_the_report(images, tmp_path: Path):
    record = check(Scaled(1e5), images)
    assert Masking.load(tmp_path) is None
    record.save(tmp_path)
    assert Masking.load(tmp_path) == record
    page = html_page(Report(), masking=record)
    assert "Can the attacks be trusted?" in page and "losses disagree" in page
    assert "Can the attacks be trusted?" not in html_page(Report())
    (tmp_path / MASKING_FILE).write_text("{}")
    with pytest.raises(ReportError, match=r"masking\.json: damaged"):
        Masking.load(tmp_path)


def test_no_examples_are_refused(images):
    with pytest.raises(ValueError, match="need examples, got none"):
        check_masking(Scaled(), images[:0], torch.zeros(0, dtype=torch.long), BALL)
