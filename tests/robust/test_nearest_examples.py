"""Nearest adversarial examples: near on a linear model, and never in the ball of a certified image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attacks.threat import LinfBall, make_ball
from certify.verdict import SoundnessError
from robust.images import MemoryImages
from robust.nearest_examples import NEAREST_FILE, NearestExamples, _pulled_back, nearest_examples
from robust.report import Report, ReportError, Row


def linear_problem() -> tuple[nn.Module, MemoryImages, torch.Tensor]:
    """Two classes that a hyperplane w.x = 0 tells apart, images near the middle of the range, their values w.x."""
    w = torch.tensor([0.4, -0.7, 0.2, 0.5])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=torch.float32))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-w, w]))
        model[1].bias.copy_(torch.tensor([0.2, -0.2]))
    x = 0.35 + 0.3 * torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    value = 2 * (x.flatten(1) @ w - 0.2)
    return model.eval(), MemoryImages(x, (value > 0).long()), value


def unknown_rows(images: MemoryImages) -> Report:
    return Report({}, tuple(Row(i, int(y), int(y), "unknown", "crown") for i, y in enumerate(images.labels)))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1.0), ("l2", 2.0)])
def test_on_a_linear_model_they_are_as_near_as_the_hyperplane(norm: str, dual: float) -> None:
    model, images, value = linear_problem()
    found = nearest_examples(model, images, unknown_rows(images), make_ball(norm, 0.02))
    distance = value.abs() / (2 * model[1].weight[1].norm(p=dual))
    assert set(found.points) == set(range(8))
    for i, point in found.points.items():
        assert model(point[None]).argmax() == found.predicted[i] != images.labels[i]
        assert distance[i] <= found.distances[i] * (1 + 1e-4) and found.distances[i] <= 1.01 * distance[i] + 1e-4


def test_a_far_point_is_pulled_back_to_the_boundary() -> None:
    model, images, value = linear_problem()
    x, y = images.batch(torch.arange(8))
    direction = torch.where(value > 0, -1.0, 1.0)[:, None] * model[1].weight[1].sign()
    pulled = _pulled_back(model, x, y, x + direction.view(8, 1, 2, 2))
    nearest = value.abs() / (2 * model[1].weight[1].norm(p=1))
    assert (model(pulled).argmax(1) != y).all()
    torch.testing.assert_close((pulled - x).flatten(1).abs().amax(1), nearest, rtol=0, atol=1e-3)


def test_one_in_the_ball_of_a_certified_image_is_a_soundness_error() -> None:
    model, images, value = linear_problem()
    rows = [Row(i, int(y), int(y), "certified", "planted", 1.0) for i, y in enumerate(images.labels)]
    far, near = (Report({}, (rows[int(i)],)) for i in (value.abs().argmax(), value.abs().argmin()))
    radius = float(value.abs().min()) / 1.8 * 1.1
    assert nearest_examples(model, images, far, LinfBall(radius)).points
    with pytest.raises(SoundnessError, match=r"certified by 'planted', and an adversarial example lies in its ball"):
        nearest_examples(model, images, near, LinfBall(radius * 2))


def test_a_misclassified_image_has_none_and_a_constant_model_neither() -> None:
    wrong = Report({}, (Row(0, 0, 1, "misclassified", "clean"),))
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(constant[1].weight)
    with torch.no_grad():
        constant[1].bias.copy_(torch.tensor([1.0, 0.0]))
    zeros = MemoryImages(torch.full((2, 1, 2, 2), 0.5), torch.zeros(2))
    for report, model in ((wrong, constant), (unknown_rows(zeros), constant)):
        assert nearest_examples(model, zeros, report, LinfBall(0.1)).points == {}


def test_they_come_back_from_the_disk_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    assert NearestExamples.load(tmp_path) is None
    found = NearestExamples("l2", {3: torch.rand(1, 2, 2)}, {3: 0.25}, {3: 1})
    found.save(tmp_path)
    again = NearestExamples.load(tmp_path)
    assert again is not None and torch.equal(again.points[3], found.points[3])
    assert (again.norm, again.distances, again.predicted) == ("l2", {3: 0.25}, {3: 1})
    assert again.words(Report({"classes": ["ant", "bee"]}), 3) == "L2 0.25 → bee"
    (tmp_path / NEAREST_FILE).write_bytes((tmp_path / NEAREST_FILE).read_bytes()[:-2])
    with pytest.raises(ReportError, match=r"nearest.safetensors: truncated, damaged"):
        NearestExamples.load(tmp_path)
