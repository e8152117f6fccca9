"""What a record says about the software that made it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch


def versions() -> dict[str, str]:
    """Versions of the suite ("source tree" where it is not installed), torch and Python."""
    try:
        suite = importlib.metadata.version("robust-suite")
    except importlib.metadata.PackageNotFoundError:
        suite = "source tree"
    return {"suite": suite, "torch": str(torch.__version__), "python": platform.python_version()}
