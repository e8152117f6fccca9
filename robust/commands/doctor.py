"""`robust doctor`: whether everything here works."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from robust.doctor import examine
from robust.flags import add_json

WORDS = "what is installed and found here, and whether bounds and attacks are sound on this machine"
EXAMPLES = """examples:
  robust doctor                 exit code 1 if a check fails
  robust doctor --root /data --json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $ROBUST_DATA, else ./data)")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    findings, topic = [], ""
    for finding in examine(options.root):
        findings.append(finding)
        if finding.topic != topic:
            topic = finding.topic
            print(f"{topic}:")
        print(f"  {finding.outcome:>6}  {finding.name}: {finding.words}")
    failed = [f"{finding.topic}: {finding.name}" for finding in findings if finding.outcome == "FAILED"]
    print(f"failed: {', '.join(failed)}" if failed else "everything that the suite needs works here")
    return {"failed": failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
