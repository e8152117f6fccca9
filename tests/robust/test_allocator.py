"""Freed memory is kept, in a process that asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
import torch
from robust.allocator import MMAP_THRESHOLD, keep_freed_memory
torch.set_num_threads(1)
# The worst default: every large block is mapped anew and unmapped when it is freed.
assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 128 * 1024)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    first, second = torch.ones(3_000_000), torch.ones(3_000_000)
for _ in range(10):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_repeated_large_tensors_cost_no_new_pages() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", PROGRAM, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    # Pages may be small or huge, so only the two counts compare.
    left = faults("leave")
    assert left >= 100
    assert faults("keep") < 0.2 * left
