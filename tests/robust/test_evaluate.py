"""Evaluation on a linear model, where the exact robust margin is known, and its resumption at every byte."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS
from attacks.threat import Ball, L2Ball, LinfBall
from certify.verifier import VERIFIERS
from robust.checkpoint import Checkpoint
from robust.evaluate import evaluate
from robust.images import MemoryImages
from robust.model import MODELS
from robust.report import NO_CLASS, Report, ReportError, Row
from robust.wilson import wilson_interval
from tests.robust.linear_problem import (
    BALL,
    CLASSES,
    SHAPE,
    Decision,
    ExactLinear,
    WorstPoint,
    data,
    linear_model,
    worst_point,
)


@dataclass(frozen=True)
class Noise:
    """Attack that draws from torch's global noise, as foreign code does."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    seed: int = 0

    def __call__(
        self, model: Any, x: Tensor, y: Tensor, ball: Ball, *, generator: Any = None, index: Any = None
    ) -> Tensor:
        return x + torch.rand(x.shape) * 0.02


def timeless(report: Report) -> tuple[Row, ...]:
    return tuple(dataclasses.replace(row, seconds=0.0) for row in report.rows)


@pytest.mark.parametrize("ball", [BALL, L2Ball(0.15, None)])
def test_rows_agree_with_the_closed_form(ball: Ball) -> None:
    model, tiny = linear_model(), data()
    x, y = tiny.test.batch(torch.arange(len(tiny.test)))
    lowest = worst_point(model, x, y, ball)[1]
    clean = worst_point(model, x, y, ball.scaled(0.0))[1]
    report = evaluate(model, tiny, ball, ExactLinear(), WorstPoint(0.999), batch_size=4)
    assert {row.status for row in report.rows} == {"certified", "falsified", "misclassified"}
    for row in report.rows:
        expected = "misclassified" if clean[row.index] <= 0 else "certified" if lowest[row.index] > 0 else "falsified"
        assert row.status == expected
        assert row.attacked == (expected == "falsified")
        if row.status == "certified":
            assert row.margin_lb == pytest.approx(lowest[row.index].item(), rel=1e-5)
            assert row.attack_margin is not None and row.margin_lb <= row.attack_margin
        if row.status == "falsified":
            distance = row.linf if ball.norm == "linf" else row.l2
            assert distance is not None and 0 < distance <= float(ball.eps)


def test_misclassified_examples_are_neither_attacked_nor_verified() -> None:
    seen: list[int] = []

    def spy(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        seen.append(len(x))
        return [Decision("unknown", -1.0)] * len(x)

    report = evaluate(linear_model(), data(), BALL, spy, batch_size=10)
    wrong = [row for row in report.rows if row.status == "misclassified"]
    assert [row.index for row in wrong] == [0, 5, 10, 15, 20]
    assert all(row.attack_margin is None and row.method == "clean" and row.predicted != row.label for row in wrong)
    assert sum(seen) == 23 - len(wrong)


def test_the_verifier_sees_only_what_the_attack_left() -> None:
    report = evaluate(linear_model(), data(), BALL, ExactLinear(), WorstPoint(0.999))
    assert {row.method for row in report.rows if row.attacked} == {"WorstPoint(share=0.999, seed=0)"}
    without = evaluate(linear_model(), data(), BALL, ExactLinear())
    assert {row.method for row in without.rows if row.attacked} == {"exact"}
    assert [row.status for row in without.rows] == [row.status for row in report.rows]
    assert evaluate(linear_model(), data(), BALL, None).summary().statuses["unknown"] == 18


def test_the_margin_of_a_falsified_example_is_the_one_at_its_witness() -> None:
    # The attack is too short to find anything, so every witness is the verifier's.
    report = evaluate(linear_model(), data(), BALL, ExactLinear(), WorstPoint(share=1e-3))
    falsified = [row for row in report.rows if row.attacked]
    assert falsified and {row.method for row in falsified} == {"exact"}
    for row in falsified:
        assert row.attack_margin == pytest.approx(row.margin_lb, abs=1e-5)
        assert row.linf == pytest.approx(0.05)


def test_a_point_outside_the_ball_is_no_witness() -> None:
    cheating = evaluate(linear_model(), data(), LinfBall(1e-4, None), None, WorstPoint(share=5000.0))
    assert not any(row.attacked for row in cheating.rows)


def test_a_point_that_rounding_put_outside_is_brought_back_and_is_a_witness() -> None:
    inside = evaluate(linear_model(), data(), BALL, None, WorstPoint())
    slightly_outside = evaluate(linear_model(), data(), BALL, None, WorstPoint(share=1 + 1e-6))
    assert sum(row.attacked for row in inside.rows) > 3
    assert [row.status for row in slightly_outside.rows] == [row.status for row in inside.rows]


def test_attack_and_verifier_are_told_the_numbers_of_the_examples_in_the_data_set() -> None:
    told: list[list[int]] = []

    class Spy(WorstPoint):
        def __call__(
            self, model: Any, x: Tensor, y: Tensor, ball: Ball, *, generator: Any = None, index: Any = None
        ) -> Tensor:
            told.append(index.tolist())
            return x

    def verifier(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        told.append(index.tolist())
        return [Decision("unknown", -1.0)] * len(x)

    evaluate(linear_model(), data(), BALL, verifier, Spy(), indices=[9, 5, 2, 7])  # 5 is misclassified
    assert told == [[9, 2, 7]] * 2


def test_infinite_bounds_are_none_in_memory_and_on_the_disk(tmp_path: Path) -> None:
    report = evaluate(linear_model(), data(), BALL, ExactLinear(witnesses=False), out=tmp_path)
    assert any(row.status == "unknown" for row in report.rows)
    assert all(row.margin_lb is None for row in report.rows if row.status == "unknown")
    assert Report.load(tmp_path) == report


def test_the_last_word_on_a_tie_is_the_verifiers() -> None:
    def tie(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        return [Decision("misclassified", 0.0, method="clean")] * len(x)

    rows = evaluate(linear_model(), data(), BALL, tie).rows
    assert all(row.status == "misclassified" and row.predicted != row.label for row in rows)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES] * 0 + self.value


def test_a_model_without_finite_logits_predicts_no_class() -> None:
    rows = evaluate(Constant(math.nan), data(), BALL, None, WorstPoint()).rows
    assert {(row.status, row.predicted) for row in rows} == {("misclassified", NO_CLASS)}


def test_of_equal_logits_the_first_is_the_prediction() -> None:
    rows = evaluate(Constant(0.5), data(), BALL, None).rows
    assert {row.label for row in rows if row.status == "unknown"} == {0}
    assert {row.label for row in rows if row.status == "misclassified"} == {1, 2}


def test_the_suites_own_attack_and_cascade_agree_and_are_recorded_as_text() -> None:
    torch.manual_seed(0)
    model = MODELS.parse("mlp:hidden=12")(SHAPE, CLASSES, (0.5,), (0.25,)).eval()
    pixels = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
    images = MemoryImages(pixels, model(pixels).argmax(dim=1))
    tiny = dataclasses.replace(data(), test=images)
    attack, verifier = ATTACKS.parse("pgd:steps=10"), VERIFIERS.parse("cascade:timeout=20.0")
    report = evaluate(model, tiny, LinfBall(0.03), verifier, attack, batch_size=16)
    assert (report.header["attack"], report.header["verifier"]) == ("pgd:steps=10", "cascade:timeout=20.0")
    statuses = report.summary().statuses
    assert statuses["certified"] > 5 and statuses["falsified"] > 2 and statuses["misclassified"] == 0
    assert {row.method for row in report.rows if row.status == "falsified"} <= {"pgd", "cascade/attack"}
    assert all(row.linf is not None and row.linf <= 0.03 for row in report.rows if row.attacked)
    backwards = evaluate(model, tiny, LinfBall(0.03), verifier, attack, batch_size=7, indices=list(range(39, -1, -1)))
    assert [row.status for row in backwards.rows[::-1]] == [row.status for row in report.rows]


def test_the_model_keeps_its_flags_and_batch_statistics() -> None:
    torch.manual_seed(0)
    model = MODELS.parse("mlp:hidden=4,batch_norm=true")(SHAPE, CLASSES, (0.5,), (0.25,)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, data(), BALL, None, Noise())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_global_noise_of_the_caller_is_untouched() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evaluate(linear_model(), data(), BALL, None, Noise())
    torch.manual_seed(3)
    evaluate(linear_model(), data(), BALL, None, Noise())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_a_run_cut_at_any_byte_goes_on_to_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    arguments: Any = (linear_model(), data(10), BALL, ExactLinear(), Noise())
    path = tmp_path / "rows.jsonl"
    undisturbed = evaluate(*arguments, out=path, batch_size=4)
    assert timeless(evaluate(*arguments, batch_size=4)) == timeless(undisturbed)
    content = path.read_bytes()
    header_end = content.index(b"\n") + 1
    for length in [*range(0, header_end, 97), *range(header_end - 3, len(content) + 1, 13), len(content)]:
        path.write_bytes(content[:length])
        resumed = evaluate(*arguments, out=path, batch_size=4)
        assert timeless(resumed) == timeless(undisturbed), length
        assert Report.load(path) == resumed
        assert len(path.read_bytes().splitlines()) == 11


def test_finished_blocks_are_not_decided_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def spy(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        calls.append(len(x))
        return ExactLinear()(model, x, y, ball)

    path = tmp_path / "rows.jsonl"
    evaluate(linear_model(), data(10), BALL, spy, out=path, batch_size=4)
    lines = path.read_bytes().splitlines(keepends=True)
    calls.clear()
    assert len(evaluate(linear_model(), data(10), BALL, spy, out=path, batch_size=4).rows) == 10
    assert calls == []
    path.write_bytes(b"".join(lines[:8]))  # the header, one block, and three rows of the second
    evaluate(linear_model(), data(10), BALL, spy, out=path, batch_size=4)
    assert len(calls) == 2


def test_blocks_in_any_order_are_gone_on_with_and_put_in_order(tmp_path: Path) -> None:
    arguments: Any = (linear_model(), data(10), BALL, ExactLinear())
    path = tmp_path / "rows.jsonl"
    undisturbed = evaluate(*arguments, out=path, batch_size=4)
    header, *rows = path.read_bytes().splitlines(keepends=True)
    for order in ([*rows[8:], *rows[:4]], [*rows[4:8], *rows[:2]], [*rows[8:], *rows[4:8], *rows[:4]]):
        path.write_bytes(b"".join([header, *order]))
        assert timeless(evaluate(*arguments, out=path, batch_size=4)) == timeless(undisturbed)
        assert timeless(Report.load(path)) == timeless(undisturbed)
    for wrong in ([*rows[:2], *rows[4:8]], rows[1:5], [*rows[4:8], rows[9], rows[8]]):
        path.write_bytes(b"".join([header, *wrong]))
        with pytest.raises(ReportError, match="rows that are not blocks of the 10 examples"):
            evaluate(*arguments, out=path, batch_size=4)


def test_an_interruption_keeps_the_blocks_before_it(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, index: Any = None) -> list[Any]:
        if len(Report.load(tmp_path).rows) == 8:
            raise KeyboardInterrupt
        return ExactLinear()(model, x, y, ball)

    with pytest.raises(KeyboardInterrupt):
        evaluate(linear_model(), data(), BALL, interrupted, out=tmp_path, batch_size=4)
    assert [row.index for row in Report.load(tmp_path).rows] == list(range(8))


def test_a_run_can_be_made_longer_and_not_shorter(tmp_path: Path) -> None:
    arguments: Any = (linear_model(), data(), BALL, ExactLinear())
    evaluate(*arguments, out=tmp_path, limit=6, batch_size=4)
    longer = evaluate(*arguments, out=tmp_path, limit=15, batch_size=4)
    assert timeless(longer) == timeless(evaluate(*arguments, limit=15, batch_size=4))
    with pytest.raises(ReportError, match="holds 15 rows that are not blocks of the 6 examples"):
        evaluate(*arguments, out=tmp_path, limit=6, batch_size=4)
    with pytest.raises(ReportError, match="rows that are not blocks"):
        evaluate(*arguments, out=tmp_path, indices=list(range(22, -1, -1)), batch_size=4)
    assert len(Report.load(tmp_path).rows) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"ball": LinfBall(0.06, None)}, r"ball\.eps is 0\.05 there and 0\.06 now"),
        (lambda a: a | {"ball": L2Ball(0.05, None)}, r"ball\.norm is 'linf' there and 'l2' now"),
        (lambda a: a | {"checkpoint_or_model": linear_model(1)}, r"checkpoint is '\w+' there and '\w+' now"),
        (lambda a: a | {"verifier": ExactLinear(witnesses=False)}, "verifier is .*True.* there and .*False.* now"),
        (lambda a: a | {"attack": None}, r"attack is 'Noise\(.*\)' there and None now"),
        (lambda a: a | {"data": data(22)}, "data_hash is"),
        (lambda a: a | {"batch_size": 5}, "batch_size is 4 there and 5 now"),
        (lambda a: a | {"split": "train"}, "split is 'test' there and 'train' now"),
    ],
)
def test_another_evaluation_is_not_mixed_in(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    arguments: dict[str, Any] = {
        "checkpoint_or_model": linear_model(),
        "data": data(),
        "ball": BALL,
        "verifier": ExactLinear(),
        "attack": Noise(),
        "batch_size": 4,
        "out": tmp_path / "rows.jsonl",
    }
    evaluate(**arguments, limit=6)
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ReportError, match=message) as refusal:
        evaluate(**change(arguments))
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_replaced_image_is_noticed_where_the_report_has_the_hash_of_some(tmp_path: Path) -> None:
    before, after = data(), data()
    assert isinstance(after.test, MemoryImages)
    after.test.pixels[7] = 1 - after.test.pixels[7]
    path = tmp_path / "rows.jsonl"
    report = evaluate(linear_model(), before, BALL, None, out=path, limit=4)
    with pytest.raises(ReportError, match=r"another evaluation: image_hash is '\w+' there and '\w+' now"):
        evaluate(linear_model(), after, BALL, None, out=path, limit=4)
    Report({name: fact for name, fact in report.header.items() if name != "image_hash"}, report.rows).save(path)
    assert evaluate(linear_model(), after, BALL, None, out=path, limit=4).rows == report.rows


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    for content in ('{"epoch": 1}\n', "notes of mine\n"):
        (tmp_path / "log.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"log\.jsonl"):
            evaluate(linear_model(), data(), BALL, None, out=tmp_path / "log.jsonl")
        assert (tmp_path / "log.jsonl").read_text() == content


def test_a_checkpoint_is_named_in_the_header_by_its_text_and_hash() -> None:
    settings = {"model": "mlp:hidden=", "input_shape": SHAPE, "classes": CLASSES, "mean": (0.5,), "std": (0.25,)}
    checkpoint = Checkpoint(linear_model(), settings, BALL)
    header = evaluate(checkpoint, data(), BALL, ExactLinear(), limit=2).header
    assert (header["model"], header["checkpoint"]) == ("mlp:hidden=", checkpoint.hash())
    assert header["ball"] == {"norm": "linf", "eps": 0.05, "pixel_range": None}
    assert header["classes"] == ["a", "b", "c"]
    assert (header["device"], header["precision"], header["data"], header["split"]) == (
        "cpu",
        "float32",
        "tiny",
        "test",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", header["started"])


def test_chosen_examples_are_decided_in_the_order_given() -> None:
    rows = evaluate(linear_model(), data(), BALL, ExactLinear(), indices=[7, 3, 9], limit=2).rows
    assert [row.index for row in rows] == [7, 3]
    for bad in ([3, 3], [99], [-1]):
        with pytest.raises(ValueError, match=r"expected indices|given twice"):
            evaluate(linear_model(), data(), BALL, ExactLinear(), indices=bad)


def test_nothing_to_decide_gives_an_empty_report(tmp_path: Path) -> None:
    report = evaluate(linear_model(), data(), BALL, ExactLinear(), limit=0, out=tmp_path)
    assert report.rows == ()
    assert report.summary().rates.certified.interval == wilson_interval(0, 0)
    assert evaluate(linear_model(), data(0), BALL, ExactLinear()).rows == ()


def test_the_progress_bar_counts_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(linear_model(), data(), BALL, ExactLinear(), progress=True)
    shown = capsys.readouterr().err
    assert "23/23" in shown
    assert "misclassified=5" in shown
