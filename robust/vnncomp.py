"""`robust vnnlib`: one question to a network, or a list of them, answered as VNN-COMP expects."""

from __future__ import annotations

import csv
import io
import sys
import time
from pathlib import Path

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


def decide_all(path: Path, out: Path) -> None:
    """Decide the instances of a CSV file; results.csv and one result file for each are written to the folder `out`.

    A file that cannot be read gets the answer `error`, and its reason goes to the standard error.
    """
    lines: list[tuple[str, str, str, str]] = []
    for number, instance in enumerate(load_instances(path)):
        begin = time.perf_counter()
        try:
            text = result_text(decide(instance))
        except ValueError as error:  # a file that is broken or not supported; the others may be fine
            print(f"robust: {' '.join(str(error).split())}", file=sys.stderr)
            text = "error\n"
        status = text.partition("\n")[0]
        seconds = f"{time.perf_counter() - begin:.2f}"
        write_whole(out / f"{number:04d}_{instance.onnx.stem}_{instance.vnnlib.stem}.txt", text)
        lines.append((str(instance.onnx), str(instance.vnnlib), status, seconds))
        write_whole(out / RESULTS, _csv(lines))
        print(f"{instance.onnx.name} {instance.vnnlib.name}: {status} ({seconds} s)", flush=True)


def _csv(lines: list[tuple[str, str, str, str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("network", "property", "result", "seconds"), *lines])
    return text.getvalue()
