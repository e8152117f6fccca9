"""`robust push`: a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robust.flags import add_json, add_own_network
from robust.hub import push, reports_beside
from robust.own_model import own_network

WORDS = "upload a checkpoint to the Hugging Face Hub, with a card made from its reports"
EXAMPLES = """examples:
  robust push runs/digits_sabr/checkpoint.safetensors user/digits-sabr
  robust certify hf:user/digits-sabr       wherever a checkpoint is expected

Needs `pip install 'robust-suite[hub]'` and a token that may write, from `hf auth login` or $HF_TOKEN."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint of this suite")
    parser.add_argument("repository", help="user/name; made where it is absent")
    parser.add_argument(
        "--reports", type=Path, nargs="*", help="folders of evaluations (default: certify/ and attack/ beside it)"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    add_own_network(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    reports = reports_beside(options.checkpoint) if options.reports is None else options.reports
    own = None if options.model is None else own_network(options.model)
    address = push(options.checkpoint, options.repository, reports, options.private, own)
    print(address)
    return {"repository": address, "reports": [str(folder) for folder in reports]}
