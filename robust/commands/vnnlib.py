"""`robust vnnlib`: what VNN-COMP asks of a verifier."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from certify.formats.vnnlib import Instance
from robust.files import write_whole
from robust.flags import add_json, number_of, output
from robust.vnncomp import RESULTS, decide, decide_all, facts, result_text

WORDS = "answer VNN-LIB properties of ONNX networks"
GOES_ON = False
EXAMPLES = """examples:
  robust vnnlib model.onnx property.vnnlib --timeout 60
  robust vnnlib instances.csv --out results    lines of network,property,seconds, as in VNN-COMP

Prints sat, unsat, timeout or unknown; after sat, a counterexample that onnxruntime confirms without tolerance."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or a CSV file of instances")
    parser.add_argument("property", type=Path, nargs="?", help="VNN-LIB file")
    parser.add_argument("--timeout", help="seconds for the property (default: no limit); a CSV file has its own")
    parser.add_argument("--out", type=output, help="result file, or the folder of a CSV file's results")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.model.suffix == ".csv":
        if options.property is not None or options.timeout is not None or options.out is None:
            raise ValueError("a CSV file names properties and seconds itself; it needs --out FOLDER, and nothing else")
        return {"instances": decide_all(options.model, options.out), "results": str(options.out / RESULTS)}
    if options.property is None:
        raise ValueError(f"which property of {options.model}? Give a .vnnlib file behind it")
    timeout = math.inf if options.timeout is None else number_of("--timeout", options.timeout)
    instance, begin = Instance(options.model, options.property, timeout), time.perf_counter()
    found = decide(instance)
    text = result_text(found)
    if options.out is None:
        print(text, end="")
    else:
        write_whole(options.out, text)
        print(found.status)
    return facts(instance, found, time.perf_counter() - begin)
