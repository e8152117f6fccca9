"""Memory: how much is free, and how much a verification will need before it starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from certify.bounds.crown import ROW_BUDGET, relaxed_inputs
from certify.graph import capture

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: str | torch.device) -> int:
    """Memory that this process can still take on the device, in bytes; within its container's limit on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(facts["MemAvailable"].split()[0]) * 1024
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text(encoding="ascii")))
    except (OSError, KeyError, ValueError):
        pass  # another system: what sysconf says has to do
    return free


def readable(count: float) -> str:
    """Bytes in the unit that people would use."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass(frozen=True)
class Need:
    """Estimated bytes of bounding a batch: rough upper figures of two parts, of which only one is live at a time.

    Attributes:
        intervals: forward passes and the intervals of all layers, for the whole batch at once.
        rows: coefficients of a backward pass of CROWN in chunks of rows; 0 for verifiers without one.
    """

    intervals: int
    rows: int

    @property
    def most(self) -> int:
        """The dearer part."""
        return max(self.intervals, self.rows)


WITHOUT_ROWS = ("ibp", "global_l2")
"""Verifiers that never go backward through the network."""

FROM_LOGITS = ("crown_ibp",)
"""Verifiers that go backward from the logits alone, not from every layer."""

PASS, CHUNK = 8, 11
"""Tensors as large as what is counted that are live at once: lower and upper bounds and the op's own temporaries;
a chunk of rows, its positive and negative parts, the products and what the allocator keeps. Measured with
tests/robust/test_memory.py on a CPU: 5 to 11 for rows of which nearly all neurons are unstable."""


def need(model: nn.Module, input_shape: tuple[int, ...], batch: int, verifier: str) -> Need:
    """Estimate for batches of so many images; `verifier` is its registered name.

    Raises:
        CaptureError, UnsupportedOp: a model without bound rules.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    snapshot = capture(model, torch.zeros(1, *input_shape, device=device)).snapshot()
    sizes = [math.prod(node.shape) for node in snapshot.nodes]
    item = next((p.element_size() for p in model.parameters()), 4)
    widest = max(sizes)
    starts = [sizes[-1]] if verifier in FROM_LOGITS else [sizes[i] for i in relaxed_inputs(snapshot)]
    most_rows = 2 * max(starts, default=0)
    # At least one row, above and below, is bounded at a time, whatever the budget says.
    chunk = min(most_rows * batch * widest, max(ROW_BUDGET, 2 * batch * widest))
    rows = 0 if verifier in WITHOUT_ROWS else CHUNK * chunk * item
    return Need(PASS * batch * sum(sizes) * item, rows)


def advice(needed: Need, free: int, batch: int) -> str | None:
    """One line for the user where what is needed is more than what is free, None where it fits."""
    if needed.most <= free:
        return None
    smaller = batch * free // needed.most
    ways = [f"--batch-size {smaller}"] if smaller >= 1 else []
    if needed.rows > needed.intervals:
        ways.append("--verifier ibp, which needs no backward pass")
    ways += ["a smaller --model"] if not ways else []
    return (
        f"about {readable(needed.most)} are needed for {batch} images at a time, and {readable(free)} are free; "
        f"give {' or '.join(ways)}"
    )
