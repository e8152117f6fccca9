"""Flags that commands share: the machine to run on, places of results, and counts."""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path

import torch

from attacks.registry import number


def add_machine(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu, cuda, cuda:1 ... (default here: {default})")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $ROBUST_DATA, else ./data)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object; words for people go to stderr"
    )


def add_own_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="FILE.py:NAME",
        help="your own network, whose file is run; where the checkpoint is of one",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done, with time and memory estimated from a few steps, and write nothing",
    )


def usable_device(text: str) -> str:
    """`text` itself where a tensor can be put there; ValueError names the reason otherwise."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise ValueError(f"--device {text}: not available here ({reason}); use --device cpu") from None
    return text


def own_device(text: str, several: bool) -> str:
    """Of several processes of a host, started by torchrun, each takes a GPU of its own where --device names none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if several and text == "cuda" else text


def number_of(flag: str, text: str) -> float:
    """The flag's number, such as 0.1 or 8/255; ValueError names the flag where it is none."""
    try:
        return number(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def output(text: str) -> Path:
    """A path of results; an empty one, as of a shell's unset variable, would be the present folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text (is a variable of the shell unset?)")
    return Path(text)
