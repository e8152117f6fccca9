"""Training runs small enough for tests, and ways to start, kill and compare them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import robust
from robust.files import read_json_lines
from robust.run_setup import CHECKPOINT, LOG, STATE
from robust.settings import Settings
from robust.tensor_file import load_tensors
from robust.trainer import train

REPOSITORY = Path(robust.__file__).parents[1]
TIMES = ("seconds", "images_per_second")

RUN = """
import json, sys
from pathlib import Path
import torch
from robust.settings import Settings
from robust.trainer import train
torch.set_num_threads(1)
train(Settings.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), progress=False, save_every=float(sys.argv[3]))
"""


def environment() -> dict[str, str]:
    """For processes that run this checkout, on one thread each."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    """A command line that starts several processes of one training."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*command, *arguments]


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def gloo_threads() -> list[str]:
    """Threads of this process that send for torch.distributed; Linux names them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def tiny(**changes: Any) -> Settings:
    """Settings of a run of a second or two, with BatchNorm and a ramp that ends before the run does."""
    chosen: dict[str, Any] = {
        "model": "cnn3:width=2,batch_norm=true",
        "objective": "ibp",
        "epochs": 2,
        "batch_size": 128,
        "eps_schedule": "linear:start=0.1,end=1",
    }
    return Settings(**{**chosen, **changes})


def trained(settings: Settings, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Weights of a run in this process."""
    train(settings, out, progress=False, **options)
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What a finished run stored."""
    return load_tensors(out / CHECKPOINT)[0]


def records(out: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    return [{name: v for name, v in r.items() if name not in TIMES} for r in read_json_lines(out / LOG)]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights agree bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def start(*arguments: str, script: str | None = None) -> subprocess.Popen[str]:
    """Python in a process of its own: `-m robust` with the arguments, or a script."""
    command = [sys.executable, "-c", script] if script else [sys.executable, "-m", "robust"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop_once(process: subprocess.Popen[str], file: Path, changes: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal when `file` has changed so many times; whether the process was still at work then."""
    seen, before = 0, stamp(file)
    deadline = time.monotonic() + 120
    while process.poll() is None and seen < changes and time.monotonic() < deadline:
        now = stamp(file)
        seen, before = seen + (now != before), now
        time.sleep(0.001)
    alive = process.poll() is None
    if alive:
        process.send_signal(number)
    process.communicate(timeout=60)
    return alive


def stamp(file: Path) -> tuple[int, int] | None:
    """Something that changes whenever the file is replaced or grows."""
    try:
        facts = file.stat()
    except FileNotFoundError:
        return None
    return facts.st_mtime_ns, facts.st_size


def state_step(out: Path) -> int:
    """Optimiser steps behind a run's saved state."""
    step: int = load_tensors(out / STATE)[1]["progress"]["step"]
    return step
