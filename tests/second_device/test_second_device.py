"""Everything runs on another device than the CPU, with the same results: see `pretended`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def failures(family: str) -> dict[str, str]:
    done = run("-m", "tests.second_device.cases", family)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cases"], "no case was run"
    return found["failures"]


@pytest.mark.parametrize("family", ["attacks", "bounds", "verifiers", "lipschitz", "evaluation", "pieces"])
def test_results_are_those_of_the_cpu(family):
    assert not failures(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["objectives", "all_pieces"])
def test_training_is_that_of_the_cpu(family):
    assert not failures(family)


REFUSED = """
import torch
from tests.second_device.pretended import NAME, begin
begin()
x = torch.ones(3, device=NAME)
assert x.device.type == NAME and (x + 1).device.type == NAME and x[torch.tensor([0, 2])].shape == (2,)
assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3
for wrong in (
    lambda: x + torch.ones(3),
    lambda: torch.cat([torch.ones(3), x]),
    lambda: torch.ones(3)[x.long()] + x,
    lambda: x.masked_fill_(torch.ones(3, dtype=torch.bool), 0.0),
    lambda: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
    lambda: torch.nn.functional.linear(x, torch.ones(2, 3)),
    lambda: x.numpy(),
    lambda: torch.rand(3, device=NAME, generator=torch.Generator()),
):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise AssertionError(wrong)
print("refused")
"""


def test_the_pretence_refuses_what_a_gpu_refuses():
    done = run("-c", REFUSED)
    assert done.stdout == "refused\n", done.stderr
