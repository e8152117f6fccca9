"""Runs side by side: average and worst class, fairness, robust overfitting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robust.cli import main
from robust.comparison import Judged, Line, as_csv, as_text, compare, fairness
from robust.comparison_folder import accuracies, compare_runs, overfitting, robust_curve
from robust.report import Report, Row
from robust.run_setup import CHECKPOINT, LAST, TrainingError
from robust.trainer import train
from tests.robust.runs import tiny


def report(robust: list[int], total: int = 10, clean: int = 8) -> Report:
    """Two classes or more of `total` images, `clean` of each right and robust[k] of class k robust."""
    rows = []
    for label, count in enumerate(robust):
        for i in range(total):
            index = label * total + i
            if i >= clean - label:
                rows.append(Row(index, label, label + 1, "misclassified", "clean"))
            elif i < count:
                rows.append(Row(index, label, label, "unknown", "none"))
            else:
                rows.append(Row(index, label, label, "falsified", "pgd", attacked=True))
    return Report({"verifier": None, "attack": "pgd", "classes": ["cat", "dog"]}, tuple(rows))


def lines_of(*entries: tuple[str, str, list[int]]) -> list[Line]:
    return compare([Judged(run, weights, "pgd", report(robust)) for run, weights, robust in entries])  # type: ignore[arg-type]


def test_average_worst_class_fairness_and_overfitting_are_counted_by_hand() -> None:
    base, last, other = lines_of(("a", "best", [6, 2]), ("a", "last", [5, 1]), ("b", "best", [5, 3]))
    assert (base.clean, base.clean_worst, base.robust, base.robust_worst) == (0.75, 0.7, 0.4, 0.2)
    assert base.worst_class == "dog" and base.examples == 20
    assert base.fairness is None and base.gap is None
    assert last.gap == pytest.approx(0.1) and last.fairness is None
    assert other.fairness == pytest.approx(0.5 + 0.0) and other.gap is None


@pytest.mark.parametrize(
    "robust, worst, published",
    [(44.68, 25.84, 0.11), (50.78, 27.62, 0.32), (45.89, 17.82, -0.24), (49.05, 30.53, 0.42)],
)
def test_fairness_gives_the_figures_that_dafas_authors_print(robust: float, worst: float, published: float) -> None:
    def line(average: float, least: float) -> Line:
        return Line("run", "best", "", 1, 1.0, 1.0, average, least, "", None, None)

    assert fairness(line(robust, worst), line(49.80, 21.31)) == pytest.approx(published, abs=0.005)
    assert fairness(line(robust, worst), line(49.80, 0.0)) is None


def test_tables_hold_every_line_and_empty_cells_for_what_is_not_defined() -> None:
    lines = lines_of(("a", "best", [6, 2]), ("a", "last", [5, 1]))
    first, *rest = as_csv(lines).splitlines()
    assert first.startswith("run,weights,attack,examples,clean") and len(rest) == 2
    assert rest[0].endswith("dog,,")
    text = as_text(lines).splitlines()
    assert len(text) == 3 and "20.00 % (dog)" in text[1] and text[2].endswith("+10.00")
    assert as_text([]) == ""


def test_pictures_show_every_line_and_every_run() -> None:
    lines = lines_of(("a", "best", [6, 2]), ("b", "best", [5, 3]))
    (axes,) = accuracies(lines).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.75, 0.75, 0.4, 0.4, 0.2, 0.3])
    (axes,) = overfitting({"a": [(1, 0.3), (2, 0.5), (3, 0.4)], "b": [(1, 0.1)]}).axes
    best = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert best == [[[2, 0.5]], [[1, 0.1]]]
    assert robust_curve([{"epoch": 1, "validation/under_attack": 30.0}, {"epoch": 2}]) == [(1, 0.3)]


def test_a_selected_run_is_judged_at_its_best_and_its_last_weights_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = "pgd:steps=2,step_size=0.5,keep=last,mode=keep"
    common = {"objective": f"pgd:attack=({attack})", "epochs": 2, "batch_size": 300, "optimizer": "sgd:lr=0.05"}
    train(tiny(**common, eps_schedule="auto", select="best"), tmp_path / "chosen", progress=False)
    train(tiny(**common, eps_schedule="auto"), tmp_path / "plain", progress=False)
    assert (tmp_path / "chosen" / LAST).exists() and not (tmp_path / "plain" / LAST).exists()
    runs = [str(tmp_path / name) for name in ("chosen", "plain")]
    command = ["compare", *runs, "--attacks", "pgd:steps=2", "fgsm", "--limit", "50", "--quiet", "--device", "cpu"]
    assert main(command) == 0
    out = tmp_path / "chosen" / "comparison"
    lines = json.loads((out / "comparison.json").read_text())["lines"]
    assert [(line["run"], line["weights"], line["attack"]) for line in lines] == [
        (run, weights, attack)
        for run, weights in (("chosen", "best"), ("chosen", "last"), ("plain", "last"))
        for attack in ("pgd:steps=2", "fgsm")
    ]
    printed = capsys.readouterr().out
    assert "robust, worst class" in printed and str(out / "comparison.html") in printed
    page = (out / "comparison.html").read_text()
    assert page.count("<picture>") == 3 and "Robust overfitting" in page
    assert (out / "chosen_best_0_pgd" / "report.html").exists()
    # The plain run keeps its last weights, which are those of the other run's last epoch.
    assert [line["robust"] for line in lines[2:4]] == [line["robust"] for line in lines[4:]]


def test_folders_without_a_finished_run_and_repeated_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"holds no finished run \({CHECKPOINT} is missing\)"):
        compare_runs([tmp_path], ["fgsm"], tmp_path / "out")
    with pytest.raises(TrainingError, match="the same run is given twice"):
        compare_runs([tmp_path, tmp_path], ["fgsm"], tmp_path / "out")
