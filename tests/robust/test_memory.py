"""Memory estimates: of the right size against what a process really takes, and advice where they do not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from robust.memory import Need, advice, free_bytes, need, readable
from tests.robust.runs import REPOSITORY

MEASURE = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from attacks.threat import LinfBall
from certify.bounds.bound import bound
from certify.spec import margin_spec
torch.set_num_threads(1)
status = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
width, method, batch = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                      nn.Flatten(), nn.Linear(width * 1024, 10)).eval().requires_grad_(False)
x = torch.rand(batch, 3, 32, 32)
spec = margin_spec(torch.zeros(batch, dtype=torch.long), 10)
bound(model, x[:1, :, :, :], LinfBall(1e-4), spec=spec[:1], method="ibp")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a child starts with that of its parent
before = status("VmRSS")
bound(model, x, LinfBall(0.5), spec=spec, method=method)
print((status("VmHWM") - before) * 1024)
"""


def network(width: int) -> nn.Module:
    conv = nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(width * 1024, 10)).eval()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is measured as Linux reports it")
@pytest.mark.parametrize(("method", "width", "batch"), [("ibp", 16, 200), ("crown", 4, 2)])
def test_an_estimate_is_of_the_size_of_what_a_process_takes(method: str, width: int, batch: int) -> None:
    command = [sys.executable, "-c", MEASURE, str(width), method, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=300)
    taken, estimated = int(done.stdout), need(network(width), (3, 32, 32), batch, method).most
    assert taken < 1.3 * estimated, "an estimate that is too small lets a run fail"
    assert estimated < 6 * taken, "an estimate that is too large frightens"


def test_estimates_grow_with_the_batch_and_rows_keep_their_budget() -> None:
    small, large = (need(network(4), (3, 32, 32), batch, "crown") for batch in (1, 50))
    assert large.intervals == 50 * small.intervals and large.rows < 10 * small.rows
    assert need(network(4), (3, 32, 32), 5, "crown_ibp").rows < small.rows / 50
    assert need(network(4), (3, 32, 32), 5, "ibp").rows == 0


def test_advice_names_what_is_needed_what_is_free_and_what_to_do() -> None:
    assert advice(Need(2**20, 0), 2**21, 8) is None
    assert advice(Need(2**30, 0), 2**29, 8) == (
        "about 1.0 GiB are needed for 8 images at a time, and 512 MiB are free; give --batch-size 4"
    )
    words = advice(Need(2**20, 2**33), 2**30, 4)
    assert words is not None and words.endswith("give --verifier ibp, which needs no backward pass")
    words = advice(Need(2**40, 0), 2**30, 1)
    assert words is not None and words.endswith("give a smaller --model")


def test_free_memory_is_known_here() -> None:
    assert 2**20 < free_bytes("cpu") < 2**50
    assert [readable(n) for n in (10, 2048, 3 * 2**20, 5 * 2**30)] == ["10 bytes", "2 KiB", "3 MiB", "5.0 GiB"]
