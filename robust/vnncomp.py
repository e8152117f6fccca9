"""`robust vnnlib`: one question to a network, or a list of them, answered as VNN-COMP expects."""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

from certify.formats.answer import Answer, answer
from certify.formats.onnx import load_onnx
from certify.formats.vnnlib import Instance, counterexample_text, load_instances, load_vnnlib
from robust.files import write_whole

RESULTS = "results.csv"


def decide(instance: Instance) -> Answer:
    """Answer within the instance's seconds, reading the files included."""
    begin = time.perf_counter()
    model, prop = load_onnx(instance.onnx), load_vnnlib(instance.vnnlib)
    return answer(model, prop, instance.timeout - (time.perf_counter() - begin))


def result_text(found: Answer) -> str:
    """Content of a result file: the answer, and the counterexample where there is one."""
    text = f"{found.status}\n"
    return (
        text if found.x is None or found.y is None else text + counterexample_text(found.x.tolist(), found.y.tolist())
    )


def facts(instance: Instance, found: Answer | None, seconds: float) -> dict[str, Any]:
    """One decided instance for programs: what was asked, the result, and the counterexample's inputs and outputs.

    Args:
        found: None for an instance whose files cannot be read, whose result is `error`.
    """
    shown = None if found is None or found.x is None or found.y is None else (found.x.tolist(), found.y.tolist())
    return {
        "network": str(instance.onnx),
        "property": str(instance.vnnlib),
        "result": "error" if found is None else found.status,
        "seconds": seconds,
        "counterexample": None if shown is None else dict(zip(("x", "y"), shown, strict=True)),
    }


def decide_all(path: Path, out: Path) -> list[dict[str, Any]]:
    """Decide the instances of a CSV file; results.csv and one result file for each are written to the folder `out`.

    A file that cannot be read gets the answer `error`, and its reason goes to the standard error.

    Returns:
        `facts` of every instance, with the name of its `file`, and after an `error` its reason.
    """
    decided: list[dict[str, Any]] = []
    for number, instance in enumerate(load_instances(path)):
        file = out / f"{number:04d}_{instance.onnx.stem}_{instance.vnnlib.stem}.txt"
        begin, found, reason = time.perf_counter(), None, {}
        try:
            found = decide(instance)
        except ValueError as error:  # a file that is broken or not supported; the others may be fine
            reason = {"error": " ".join(str(error).split())}
            print(f"robust: {reason['error']}", file=sys.stderr)
        one = {**facts(instance, found, time.perf_counter() - begin), "file": str(file), **reason}
        write_whole(file, "error\n" if found is None else result_text(found))
        decided.append(one)
        write_whole(out / RESULTS, _csv(decided))
        print(f"{instance.onnx.name} {instance.vnnlib.name}: {one['result']} ({one['seconds']:.2f} s)", flush=True)
    return decided


def _csv(decided: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    lines = [(one["network"], one["property"], one["result"], f"{one['seconds']:.2f}") for one in decided]
    csv.writer(text, lineterminator="\n").writerows([("network", "property", "result", "seconds"), *lines])
    return text.getvalue()
