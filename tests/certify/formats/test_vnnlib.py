"""VNN-LIB texts: what they mean, and how broken ones are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from certify.formats.onnx import FormatError
from certify.formats.vnnlib import counterexample_text, load_instances, load_vnnlib, parse_vnnlib

DECLARED = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)"
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1.5))(assert (and (<= 0 X_1) (<= X_1 1e-1)))"


def test_a_box_and_a_disjunction_of_outputs() -> None:
    prop = parse_vnnlib(f"; comment\n{DECLARED}\n{BOX}(assert (or (and (<= Y_0 Y_1)) (and (>= Y_1 3) (<= Y_0 -2))))")
    assert (prop.inputs, prop.outputs) == (2, 2)
    first, second = prop.disjuncts
    np.testing.assert_array_equal([first.lb, first.ub], [[-1, 0], [1.5, 0.1]])
    np.testing.assert_array_equal(first.matrix, [[1, -1]])
    np.testing.assert_array_equal(second.matrix, [[0, -1], [1, 0]])
    np.testing.assert_array_equal(second.limit, [-3, -2])


def test_boxes_in_disjunctions_go_with_their_outputs() -> None:
    parts = [
        f"(and (>= X_0 {k}) (<= X_0 {k + 1}) (>= X_1 0) (<= X_1 1) (or (<= Y_0 {k}) (<= Y_1 {k})))" for k in range(2)
    ]
    prop = parse_vnnlib(f"{DECLARED}(assert (or {' '.join(parts)}))(assert (<= Y_0 9))")
    assert [(d.lb[0], d.ub[0], d.limit.tolist()) for d in prop.disjuncts] == [
        (0, 1, [9, 0]),
        (0, 1, [9, 0]),
        (1, 2, [9, 1]),
        (1, 2, [9, 1]),
    ]


def test_linear_terms_are_summed_up() -> None:
    prop = parse_vnnlib(f"{DECLARED}{BOX}(assert (<= (+ (* 2 Y_0) (- Y_1) 1) (- (* Y_1 3.0) Y_0 (- 4))))")
    (disjunct,) = prop.disjuncts
    np.testing.assert_array_equal(disjunct.matrix, [[3, -4]])
    assert disjunct.limit.tolist() == [3]


def test_disjuncts_with_an_empty_box_are_left_out() -> None:
    assert parse_vnnlib(f"{DECLARED}{BOX}(assert (<= X_0 -2))(assert (<= Y_0 0))").disjuncts == ()


def test_a_tie_violates_and_a_point_beside_the_box_does_not() -> None:
    prop = parse_vnnlib(f"{DECLARED}{BOX}(assert (<= Y_0 Y_1))")
    tie, above = np.array([0.5, 0.5]), np.array([0.5, 0.5 - 1e-12])
    inside = np.array([1.5, 0.0])
    assert prop.violated(inside, tie) and not prop.violated(inside, above)
    assert not prop.violated(np.array([1.5 + 1e-9, 0.0]), tie)
    assert not prop.violated(inside, np.array([-np.inf, 0.0]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected declarations of X_0"),
        (DECLARED.replace("X_1", "X_2") + BOX, "line 1: 'X_1' is neither a number nor a declared variable"),
        (f"{DECLARED}\n(assert (<= X_0 1)", "line 2: its parentheses are not closed; is the file truncated"),
        (f"{DECLARED})", "line 1: expected '\\(', got '\\)'"),
        (f"{DECLARED}(assert (<= Y_0 0))", "X_0 is not bounded from both sides"),
        (f"{DECLARED}{BOX}", "no condition on the outputs"),
        (f"{DECLARED}{BOX}(assert (<= Y_0 X_0))", "must bound one input by a number or relate outputs only"),
        (f"{DECLARED}{BOX}(assert (<= (+ X_0 X_1) 0))", "must bound one input"),
        (f"{DECLARED}{BOX}(assert (<= (* Y_0 Y_1) 0))", "a product of two variables"),
        (f"{DECLARED}{BOX}(assert (not (<= Y_0 0)))", "expected <=, >=, and, or, got \\(not"),
        (f"{DECLARED}{BOX}(assert (<= Y_0 nan))", "'nan' is not finite"),
        ("(declare-const Z Real)", "expected a variable X_i or Y_j, got 'Z'"),
        ("(vnnlib-version <2.0>)", "expected \\(declare-const"),
    ],
)
def test_broken_texts_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        parse_vnnlib(text)
    assert "\n" not in str(error.value)


def test_files_may_be_gzipped_and_errors_name_them(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib.gz"
    path.write_bytes(gzip.compress(f"{DECLARED}{BOX}(assert (<= Y_0 0))".encode()))
    assert len(load_vnnlib(path).disjuncts) == 1
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FormatError, match=r"p\.vnnlib\.gz: no text file"):
        load_vnnlib(path)
    with pytest.raises(FormatError, match=r"q\.vnnlib: no such file"):
        load_vnnlib(tmp_path / "q.vnnlib")


def test_counterexamples_keep_every_digit() -> None:
    x = np.array([0.1, np.float64(np.float32(0.1))])
    text = counterexample_text(x.tolist(), [1.0])
    assert text == "((X_0 0.1)\n(X_1 0.10000000149011612)\n(Y_0 1.0))\n"


def test_instances_are_named_relative_to_their_list(tmp_path: Path) -> None:
    path = tmp_path / "instances.csv"
    path.write_text("onnx/a.onnx,vnnlib/p.vnnlib,30\n\n./b.onnx, q.vnnlib ,1.5\n")
    first, second = load_instances(path)
    assert (first.onnx, first.timeout) == (tmp_path / "onnx" / "a.onnx", 30)
    assert (second.vnnlib, second.timeout) == (tmp_path / "q.vnnlib", 1.5)
    path.write_text("a.onnx,p.vnnlib,soon\n")
    with pytest.raises(FormatError, match=r"line 1: expected network\.onnx,property\.vnnlib,seconds"):
        load_instances(path)
