"""Pictures show what the report holds, for every report there can be."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from robust.eps_curve import EpsCurve
from robust.plots import (
    DARK,
    LIGHT,
    choose_examples,
    examples,
    over_eps,
    per_class,
    png,
    radius,
    save,
    thumbnail,
    training_curves,
)
from robust.report import Report, Row

HEADER = {"classes": ["ant", "bee & wasp"], "ball": {"norm": "linf", "eps": 8 / 255, "pixel_range": [0, 1]}}


def report(count: int = 12) -> Report:
    """Every verdict of both classes, by turns."""
    rows = []
    for i in range(count):
        y = i // 4 % 2
        match i % 4:
            case 0:
                rows.append(Row(i, y, y, "certified", "ibp", 0.5 + i))
            case 1:
                rows.append(Row(i, y, y, "falsified", "pgd", None, True, -0.25))
            case 2:
                rows.append(Row(i, y, y, "unknown", "crown"))
            case _:
                rows.append(Row(i, y, 1 - y, "misclassified", "clean"))
    return Report(HEADER, tuple(rows))


def words(figure: Figure) -> list[str]:
    """Every text in the figure, as it is once it is drawn."""
    png(figure)
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_visible()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_curve_has_its_lines_names_and_unit(theme: object) -> None:
    curve = EpsCurve("linf", (0.0, 4 / 255, 8 / 255), (0.5, 0.3, 0.1), (0.5, 0.4, 0.2), 0.6, 50)
    figure = over_eps(curve, 8 / 255, theme)  # type: ignore[arg-type]
    drawn = {tuple(line.get_ydata()): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert drawn[(0.5, 0.3, 0.1)] == pytest.approx([0, 4, 8])
    assert {(0.5, 0.4, 0.2), (0.6, 0.6, 0.6)} <= set(drawn)
    assert {"clean", "under attack", "certified", "ε = 8/255", "share of 50 examples"} <= set(words(figure))
    assert "radius ε (L∞, in 1/255 of the pixel range)" in words(figure)


def test_a_curve_in_another_norm_or_without_lines_is_drawn() -> None:
    assert "radius ε (L2, pixels in [0, 1])" in words(over_eps(EpsCurve("l2", (0.0, 0.5), (0.5, 0.3))))
    assert "certified" not in words(over_eps(EpsCurve("l2", (0.5,), clean=0.0)))


def test_bars_have_the_rates_of_each_class() -> None:
    bars = [bar.get_width() for bar in per_class(report()).axes[0].patches]
    # Class 0 has eight examples, two of each verdict; class 1 has four. Clean, then attacked, then certified.
    assert bars == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_of_many_classes_the_least_certified_are_shown() -> None:
    rows = tuple(Row(i, i, i, "unknown" if i % 2 else "certified", "ibp", 1.0) for i in range(60))
    shown = words(per_class(Report({}, rows)))
    assert "share of the class (25 of 60 classes, the least certified)" in shown
    assert {"1", "3", "49"} <= set(shown)
    assert "0" not in shown


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_of_examples_says_label_prediction_verdict_and_margin(channels: int) -> None:
    rows = choose_examples(report(), 8)
    figure = examples(report(), rows, torch.rand(8, channels, 5, 5, generator=torch.Generator().manual_seed(0)))
    shown = words(figure)
    assert {"certified\nmargin ≥ 0.5", "falsified\nmargin -0.25", "unknown\nno bound", "misclassified\n#3"} <= set(
        shown
    )
    assert {"ant", "ant → bee & wasp"} <= set(shown)


def test_examples_are_chosen_from_every_verdict_in_turn() -> None:
    assert [row.index for row in choose_examples(report(), 8)] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert len(choose_examples(report(2), 24)) == 2
    assert choose_examples(Report(), 24) == []


def test_a_thumbnail_has_the_pixels_of_the_image() -> None:
    for channels in (1, 3):
        image = torch.arange(channels * 20).reshape(channels, 4, 5) / 255
        shown = imread(io.BytesIO(thumbnail(image)), format="png")[:, :, :3]
        expected = image.expand(3, 4, 5).permute(1, 2, 0).numpy()
        assert np.abs(shown - expected).max() <= 1 / 255


@pytest.mark.parametrize("epochs", [1, 2, 160])
def test_epochs_are_whole_numbers_on_their_axis(epochs: int) -> None:
    axes = training_curves([{"epoch": epoch + 1, "loss/clean": 1.0} for epoch in range(epochs)]).axes[-1]
    least, most = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if least <= tick <= most]
    assert shown and all(tick == round(tick) for tick in shown)


def test_training_curves_take_validation_accuracies_and_loss_terms_of_the_trainers_log() -> None:
    log: list[dict[str, object]] = [
        {
            "epoch": e,
            "lr": 0.1,
            "validation/clean": 10.0 * e,
            "loss/total": 2.0,
            "loss/relu_balance": 1.0,
            "note": "text",
        }
        for e in range(1, 4)
    ]
    log += [{"event": "saved", "loss/total": 5.0}, {"epoch": 4, "validation/clean": None, "loss/total": math.pi}]
    figure = training_curves(log)
    above, below = figure.axes
    assert [list(line.get_ydata()) for line in above.get_lines()] == [pytest.approx([0.1, 0.2, 0.3])]
    assert [list(line.get_xdata()) for line in below.get_lines()] == [[1, 2, 3, 4], [1, 2, 3]]
    assert {"clean", "total", "relu balance", "epoch", "loss", "accuracy"} <= set(words(figure))


def test_reports_and_logs_with_nothing_in_them_are_drawn() -> None:
    for figure in (per_class(Report()), training_curves([]), examples(Report(), [], torch.zeros(0, 1, 4, 4))):
        assert png(figure).startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(per_class(report()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (0.5 / 255, "0.5/255"),
        (0.1, "0.1"),
        (0.3, "0.3"),
        (36 / 255, "36/255"),
        (0.0, "0"),
        (1.0, "1"),
    ],
)
def test_radii_are_written_as_people_write_them(eps: float, text: str) -> None:
    assert radius(eps) == text
