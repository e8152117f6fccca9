"""Answers about ONNX networks: the same as of the verifiers directly, with counterexamples that stand by themselves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certify.formats.answer as answer_module
from attacks.threat import LinfBall
from certify.formats.answer import Answer, Rows, answer, prove_rows
from certify.formats.onnx import FormatError, OnnxModel, load_onnx
from certify.formats.vnnlib import Property, counterexample_text, parse_vnnlib
from certify.region import Region
from certify.tracing import capture
from certify.verdict import SoundnessError
from certify.verifiers.cascade import Cascade
from robust.cli import main
from robust.model import MODELS
from tests.certify.formats.exports import export, robustness

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")

SHAPE, CLASSES = (1, 6, 6), 5
EXPECTED = {"certified": "unsat", "falsified": "sat", "unknown": "unknown"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    ).eval()
    with torch.no_grad():
        model[5].weight *= 4
        x = torch.rand(8, *SHAPE)
        model[5].bias -= model(x).mean(0)
        y = model(x).argmax(1)
    return model, export(model, x[:1], tmp_path_factory.mktemp("onnx") / "m.onnx"), x, y


def confirmed_by_the_checker(text: str, onnx: Path, prop: Property) -> bool:
    """Whether the text of a counterexample holds against onnxruntime, written without any of the suite's helpers."""
    pairs = re.findall(r"\(([XY])_(\d+) ([^()\s]+)\)", text)
    x = np.array([float(v) for kind, _, v in pairs if kind == "X"])
    y = np.array([float(v) for kind, _, v in pairs if kind == "Y"])
    assert [int(i) for _, i, _ in pairs] == [*range(len(x)), *range(len(y))]
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    (out,) = session.run(None, {source.name: x.astype(np.float32).reshape(1, *source.shape[1:])})
    np.testing.assert_array_equal(out.reshape(-1).astype(np.float64), y)
    return any((d.lb <= x).all() and (x <= d.ub).all() and (d.matrix @ y <= d.limit).all() for d in prop.disjuncts)


def test_properties_are_decided_as_the_cascade_decides_them(
    exported: tuple[nn.Module, Path, Tensor, Tensor], tmp_path: Path
) -> None:
    source, path, x, y = exported
    model = load_onnx(path)
    seen = set()
    for eps in (0.002, 0.02, 0.1):
        verdicts = Cascade()(source, x, y, LinfBall(eps))
        for image, label, verdict in zip(x, y.tolist(), verdicts, strict=True):
            prop = parse_vnnlib(text := robustness(image, label, eps, CLASSES))
            found = answer(model, prop)
            assert found.status == EXPECTED[verdict.status]
            if found.status == "sat":
                (tmp_path / "p.vnnlib").write_text(text)
                assert main(["vnnlib", str(path), str(tmp_path / "p.vnnlib"), "--out", str(tmp_path / "r")]) == 0
                first, _, rest = (tmp_path / "r").read_text().partition("\n")
                assert first == "sat" and confirmed_by_the_checker(rest, path, prop)
            seen.add(found.status)
    assert {"sat", "unsat"} <= seen


def identity(bias: float = 0.0) -> OnnxModel:
    """Two inputs, outputs x_0 + bias and x_1, with a session that computes the same in numpy."""

    class Session:
        def get_inputs(self) -> list[object]:
            return [type("Input", (), {"name": "x"})]

        def run(self, _: None, values: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [values["x"] + np.array([bias, 0], np.float32)]

    network = nn.Linear(2, 2)
    network.weight.data, network.bias.data = torch.eye(2), torch.tensor([bias, 0.0])
    return OnnxModel(network.eval(), (2,), torch.float32, Session())  # type: ignore[arg-type]


DECLARED = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"


def boxed(low: str, high: str, condition: str) -> Property:
    bounds = "".join(f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))" for i in range(2))
    return parse_vnnlib(f"{DECLARED}{bounds}(assert {condition})")


def test_every_condition_of_a_disjunct_is_needed_and_one_disjunct_is_enough() -> None:
    impossible = boxed("0", "1", "(and (<= Y_0 0.2) (>= Y_0 0.8))")
    assert answer(identity(), impossible).status == "unsat"  # each condition alone can be met, both cannot
    assert answer(identity(), boxed("0", "1", "(and (<= Y_0 0.2) (>= Y_1 1.1))")).status == "unsat"
    assert answer(identity(), boxed("0", "1", "(and (<= Y_0 0.2) (>= Y_1 0.9))")).status == "sat"
    assert answer(identity(), boxed("0", "1", "(or (>= Y_0 3) (and (>= Y_0 0.99) (<= Y_1 0.01)))")).status == "sat"
    assert answer(identity(), boxed("0", "1", "(or (>= Y_0 3) (>= Y_1 3))")).status == "unsat"
    one_proven = boxed("0", "1", "(or (>= Y_0 3) (and (<= Y_0 0.2) (>= Y_0 0.8)))")
    assert answer(identity(), one_proven).status == "unsat"


def test_every_box_counts() -> None:
    parts = [
        f"(and (>= X_0 {k}) (<= X_0 {k}.5) (>= X_1 0) (<= X_1 1) (>= Y_0 {limit}))" for k, limit in ((0, 1), (2, 2.5))
    ]
    found = answer(identity(), parse_vnnlib(f"{DECLARED}(assert (or {' '.join(parts)}))"))
    assert found.status == "sat" and found.x is not None and found.x[0] == 2.5
    parts = [part.replace("2.5))", "2.6))") for part in parts]
    assert answer(identity(), parse_vnnlib(f"{DECLARED}(assert (or {' '.join(parts)}))")).status == "unsat"


def test_a_counterexample_lies_in_a_box_that_holds_no_number_of_the_network() -> None:
    # 0.1 is no float32: the network sees the nearest one, which is above it; the file must say 0.1.
    prop = boxed("0.1", "0.1", "(>= Y_0 0.05)")
    found = answer(identity(), prop)
    assert found.status == "sat" and found.x is not None and found.x.tolist() == [0.1, 0.1]


def test_unsat_covers_the_inputs_that_numbers_of_the_box_round_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "_search", lambda *_: iter(()))
    assert answer(identity(), boxed("0.1", "0.1", "(>= Y_0 0.100000001)")).status == "sat"  # of branch and bound
    assert answer(identity(), boxed("0.1", "0.1", "(>= Y_0 0.10000001)")).status == "unsat"


def test_what_onnxruntime_does_not_confirm_is_not_sat(monkeypatch: pytest.MonkeyPatch) -> None:
    model = identity()
    prop = boxed("0", "1", "(>= Y_0 0.9)")
    assert answer(model, prop).status == "sat"
    monkeypatch.setattr(type(model.session), "run", lambda self, _, values: [values["x"] * 0])
    assert answer(model, prop).status == "unknown"
    monkeypatch.setattr(type(model.session), "run", lambda self, _, values: [values["x"] * math.inf])
    assert answer(model, prop).status == "unknown"
    with pytest.raises(SoundnessError, match="exactly where it is sat"):
        Answer("sat")


def test_a_tie_counts_as_a_violation_and_is_never_unsat() -> None:
    assert answer(identity(), boxed("0", "1", "(<= Y_0 0)")).status == "sat"
    assert answer(identity(), boxed("0", "1", "(<= Y_0 -0.001)")).status == "unsat"


def test_proven_rows_are_below_every_sample(exported: tuple[nn.Module, Path, Tensor, Tensor]) -> None:
    source, _, x, _ = exported
    torch.manual_seed(0)
    matrix = torch.randn(6, CLASSES).double()
    snapshot = capture(source.double(), x[:1].double()).snapshot().without_gradient()
    limit = (snapshot(x[:1].double()) @ matrix.T)[0] - torch.tensor([-1.0, 9.0, 0.2, 0.1, 9.0, -1.0])
    rows = Rows(matrix, limit, torch.tensor([0, 0, 1, 1, 2, 3]))
    ball = LinfBall(0.05)
    low, proven, *_ = prove_rows(snapshot, Region.around(x[:1].double(), ball), rows, math.inf)
    points = ball.sample(x[:1].double().expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    values = (source(points) @ rows.matrix.T - rows.limit).detach().amin(0)
    source.float()
    assert (low <= values).all() and (values[proven] > 0).all()
    assert proven.any() and not proven.all()


def test_without_time_nothing_is_claimed(exported: tuple[nn.Module, Path, Tensor, Tensor]) -> None:
    _, path, x, y = exported
    model = load_onnx(path)
    prop = parse_vnnlib(robustness(x[0], int(y[0]), 1e-4, CLASSES))
    assert answer(model, prop, timeout=0.0).status == "timeout"
    assert answer(model, prop).status == "unsat"


def test_a_property_of_another_network_is_refused() -> None:
    prop = parse_vnnlib(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (<= X_0 1) (>= X_0 0) (<= Y_0 0)))"
    )
    with pytest.raises(FormatError, match="about 1 inputs and 1 outputs, the network has 2 and 2"):
        answer(identity(), prop)


def test_a_list_of_instances_is_answered_line_by_line(
    exported: tuple[nn.Module, Path, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path, x, y = exported
    (tmp_path / "m.onnx").write_bytes(path.read_bytes())
    for name, eps in (("safe", 1e-4), ("unsafe", 0.5)):
        (tmp_path / f"{name}.vnnlib").write_text(robustness(x[0], int(y[0]), eps, CLASSES))
    (tmp_path / "torn.vnnlib").write_text("(assert (<= X_0 1)")
    (tmp_path / "all.csv").write_text("".join(f"m.onnx,{name}.vnnlib,20\n" for name in ("safe", "torn", "unsafe")))
    out = tmp_path / "results"
    assert main(["vnnlib", str(tmp_path / "all.csv"), "--out", str(out)]) == 0
    with (out / "results.csv").open() as file:
        assert [line["result"] for line in csv.DictReader(file)] == ["unsat", "error", "sat"]
    assert "torn.vnnlib: line 1: its parentheses are not closed" in capsys.readouterr().err
    assert (out / "0000_m_safe.txt").read_text() == "unsat\n"
    assert (out / "0002_m_unsafe.txt").read_text().startswith("sat\n((X_0 ")
    found = answered(capsys, "vnnlib", tmp_path / "all.csv", "--out", out)
    assert [one["result"] for one in found["instances"]] == ["unsat", "error", "sat"]
    safe, torn, unsafe = found["instances"]
    assert safe["file"] == str(out / "0000_m_safe.txt") and "error" not in safe and safe["seconds"] > 0
    assert "its parentheses are not closed" in torn["error"] and torn["counterexample"] is None
    assert counterexample_text(**unsafe["counterexample"]) == Path(unsafe["file"]).read_text().partition("\n")[2]
    assert found["results"] == str(out / "results.csv")


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_command_prints_the_answer_and_refuses_in_one_line(
    exported: tuple[nn.Module, Path, Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path, x, y = exported
    (tmp_path / "p.vnnlib").write_text(robustness(x[0], int(y[0]), 1e-4, CLASSES))
    assert main(["vnnlib", str(path), str(tmp_path / "p.vnnlib"), "--timeout", "20"]) == 0
    assert capsys.readouterr().out == "unsat\n"
    found = answered(capsys, "vnnlib", path, tmp_path / "p.vnnlib")
    assert (found["result"], found["counterexample"]) == ("unsat", None)
    assert (found["network"], found["property"]) == (str(path), str(tmp_path / "p.vnnlib"))
    (tmp_path / "p.vnnlib").write_text(robustness(x[0], int(y[0]), 0.5, CLASSES))
    found = answered(capsys, "vnnlib", path, tmp_path / "p.vnnlib", "--out", tmp_path / "r")
    assert (tmp_path / "r").read_text() == "sat\n" + counterexample_text(**found["counterexample"])
    assert main(["vnnlib", str(path), str(path)]) == 2
    assert "no text file" in capsys.readouterr().err
    assert main(["vnnlib", str(path)]) == 2
    assert "which property" in capsys.readouterr().err


def test_the_search_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "RESTARTS", 10**5)
    monkeypatch.setattr(answer_module, "_branch", lambda *_: None)  # which decides it
    begin = time.perf_counter()
    assert answer(identity(), boxed("0", "1", "(and (<= Y_0 0.2) (>= Y_0 0.8))"), timeout=0.5).status == "timeout"
    assert time.perf_counter() - begin < 2


SMALL = {"width": 4, "hidden": 16, "depth": 10, "widen": 1}
SMALL_TEXTS = {"gloro_cnn": "gloro_cnn:channels=4+4,strides=2+2,hidden=16"}


def small(family: str) -> str:
    """A family's text with its sizes reduced, where it has any."""
    if family in SMALL_TEXTS:
        return SMALL_TEXTS[family]
    fields = [f for f in dataclasses.fields(MODELS[family]) if type(f.default) is int and f.name in SMALL]
    sizes = [f"{f.name}={SMALL[f.name]}" for f in fields if f.default]
    return f"{family}:{','.join(sizes)}" if sizes else family


# Their sizes are fixed and large; gowal_small and gowal_tiny are made of the same layers.
LARGE = {"gowal_medium", "gowal_large"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(MODELS.names()) - LARGE))
def test_every_model_family_is_decided_as_directly(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = MODELS.parse(small(family))((3, 32, 32), 4, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)).eval()
    x = torch.rand(2, 3, 32, 32)
    y = source(x).argmax(1)
    path = export(source, x[:1], tmp_path / "m.onnx")
    model = load_onnx(path)
    y[1] = (y[1] + 1) % 4  # a wrong label: the image itself is a counterexample
    verdicts = Cascade(last=None, alpha=None)(source, x, y, LinfBall(1e-7))
    assert [verdict.status for verdict in verdicts] == ["certified", "misclassified"]
    for image, label, expected in zip(x, y.tolist(), ("unsat", "sat"), strict=True):
        prop = parse_vnnlib(robustness(image, label, 1e-7, 4))
        found = answer(model, prop)
        assert found.status == expected
        if found.x is not None and found.y is not None:
            assert confirmed_by_the_checker(counterexample_text(found.x.tolist(), found.y.tolist()), path, prop)


def test_relu_networks_that_bounds_leave_open_are_decided_by_branch_and_bound() -> None:
    # |x_0 - x_1| + |x_1| >= |x_0|, which no relaxation of the single neurons shows.
    edges = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    network = nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False)).double()
    network[0].weight.data = edges.double()
    network[2].weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0]]).double()
    center = torch.zeros(1, 2, dtype=torch.float64)
    snapshot = capture(network, center).snapshot().without_gradient()
    region = Region.between(center - 1, center + 1)
    # The output is never below 0: rows 0 and 2 hold, row 1 does not; row 3 is no disjunct of its own.
    rows = Rows(torch.ones(4, 1).double(), torch.tensor([-0.01, 0.5, -0.2, 0.5]).double(), torch.tensor([0, 1, 2, 2]))
    low, proven, impossible, _ = prove_rows(snapshot, region, rows, time.perf_counter() + 20)
    assert proven.tolist() == [True, False, False, False]
    assert impossible == {0, 2}
    assert (low <= -rows.limit + 1e-9).all()
    assert answer_module.crown.crown(answer_module._with_rows(snapshot, rows), region)[0][0, 0] < 0


def zigzag() -> nn.Sequential:
    """y = |x|, -|x| + 0.5 on [-1, 1], with ReLUs."""
    network = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    network[0].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    network[2].weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    network[2].bias.data = torch.tensor([0.0, 0.5]).double()
    return network


@pytest.mark.parametrize("sum_", [0.45, 0.55])
def test_a_conjunction_that_no_row_of_its_own_decides_is_decided(sum_: float) -> None:
    # y_0 <= 0.2 and y_1 <= sum_ - 0.2: each can be met, and since y_0 + y_1 = 0.5, both only if sum_ >= 0.5.
    network, center = zigzag(), torch.zeros(1, 1, dtype=torch.float64)
    snapshot = capture(network, center).snapshot().without_gradient()
    limit = torch.tensor([0.2, sum_ - 0.2]).double()
    rows = Rows(torch.eye(2).double(), limit, torch.tensor([0, 0]))
    found = prove_rows(snapshot, Region.between(center - 1, center + 1), rows, time.perf_counter() + 60)
    assert not found.proven.any()
    assert found.impossible == ({0} if sum_ < 0.5 else set())
    assert len(found.points) == (0 if sum_ < 0.5 else 1)
    for point in found.points:
        assert (network(point.unsqueeze(0))[0] <= limit).all()
