"""Memory: how much is free, and how much a verification will need before it starts."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks.methods.margin_pgd import MarginPGD
from attacks.threat import Ball
from certify.bounds.crown import Boxes, Rows, bound_rows, intermediate_boxes, loose_mask, row_budget
from certify.graph import Snapshot
from certify.op import Activation
from certify.region import Region
from certify.tracing import capture
from certify.verifier import VERIFIERS
from certify.verifiers.alpha_crown import AlphaCROWN
from certify.verifiers.bab import BranchAndBound
from certify.verifiers.cascade import Cascade
from certify.verifiers.crown import CROWN
from certify.verifiers.crown_ibp import CROWNIBP
from certify.verifiers.global_l2 import GlobalL2
from certify.verifiers.ibp import IBP

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


PASS, CHUNK = 8, 16
"""Tensors as large as what is counted that are live at once: of intervals, lower and upper bounds and the op's own
temporaries; of a chunk of rows, its positive and negative parts, the products, and the branch beside a residual one."""

KEPT = 12
"""Tensors that alpha-CROWN keeps for each slope of each row: the slope, its gradient, Adam's two moments, and what the
gradient needs of the backward pass."""

SEARCHED = 3
"""Tensors as large as all values of the network that an attack's forward and backward pass has."""

CORE, COLUMNS, OPEN = 2, 75, 4
"""Of branch and bound on N unstable neurons: copies of its matrices, columns `[N]` for each child of a batch (branching
tries several splits of each), and columns for each neuron: open domains, and what tightening remembers.

All were measured with tests/robust/test_memory.py on a CPU, for bounds in float32 (backward passes in the row budget of
other devices): the estimates are 1 to 4 times what was taken. In a CPU's own row budget chunks are so small that what a
process takes beside them counts more: 30 to 430 MB in all, where 134 are estimated. The few examples that rounding
leaves in doubt are bounded again in float64, in rows of twice the size."""


@dataclass(frozen=True)
class Counts:
    """Numbers that the memory of bounds depends on, of one image.

    Attributes:
        sizes: of the value of each node of the graph, by place; the last are the logits.
        slopes: slopes that alpha-CROWN may choose before each place.
        rows: neurons that CROWN bounds by a backward pass of their own, by place.
        unstable: neurons that this leaves unstable, by place.
        item: bytes of a number. budget: numbers in the largest coefficient tensor of a backward pass.
    """

    sizes: tuple[int, ...]
    slopes: tuple[int, ...]
    rows: dict[int, int]
    unstable: dict[int, int]
    item: int
    budget: int


@torch.no_grad()
def count(model: nn.Module, x: Tensor, ball: Ball, tight: bool = False) -> Counts:
    """Count on a few images `[B, C, H, W]`; the most of any of them.

    Args:
        tight: go backward through the network as CROWN does; False for intervals alone, which costs no more than
            forward passes and counts too many rows, never too few.

    Raises:
        CaptureError, UnsupportedOp: a model without bound rules.
    """
    snapshot = capture(model, x[:1]).snapshot().without_gradient()
    rows: dict[int, int] = {}
    unstable: dict[int, int] = {}

    def bound(snapshot: Snapshot, place: int, some: Rows, boxes: Boxes, region: Region) -> Tensor:
        rows[place] = max(rows.get(place, 0), len(some))
        if tight:
            return bound_rows(snapshot, place, some, boxes, region)
        return region.center.new_full((2 * len(some), 1), -math.inf)

    for image in x.split(1):
        for place, box in intermediate_boxes(snapshot, Region.around(image, ball), bound=bound).items():
            unstable[place] = max(unstable.get(place, 0), int(loose_mask(snapshot, place, box).sum()))
    sizes = tuple(math.prod(node.shape) for node in snapshot.nodes)
    free = [node.op.free if isinstance(node.op, Activation) else 0 for node in snapshot.nodes]
    slopes = tuple(sum(n * size for n, size in zip(free[:end], sizes, strict=False)) for end in range(len(sizes)))
    return Counts(sizes, slopes, rows, unstable, x.element_size(), row_budget(x.device))


def stages(counts: Counts, batch: int, verifier: Any) -> dict[str, int]:
    """Estimated bytes of each stage of a verifier that is given so many images at a time; one stage is at work at once.

    Rough upper figures: the constants above say what they rest on.
    """
    some = min(batch, getattr(verifier, "batch_size", batch))
    if isinstance(verifier, IBP | GlobalL2):
        return {"intervals": _intervals(counts, some)}
    if isinstance(verifier, CROWNIBP):
        return {"crown_ibp": _rows(dataclasses.replace(counts, rows={}), some)}
    if isinstance(verifier, AlphaCROWN):
        return {"crown": _rows(counts, some), "alpha_crown": _slopes(counts, some, verifier)}
    if isinstance(verifier, BranchAndBound):
        return {"crown": _rows(counts, 1), "bab": _domains(counts, verifier)}
    if isinstance(verifier, Cascade):
        needed = {"intervals": _intervals(counts, some), "attack": _attack(counts, some, verifier)}
        for method in (CROWNIBP(), CROWN(), verifier.last or verifier.alpha):
            for stage, size in ({} if method is None else stages(counts, some, method)).items():
                needed[stage] = max(size, needed.get(stage, 0))
        return needed
    return {"crown": _rows(counts, some)}


def _intervals(counts: Counts, batch: int) -> int:
    return PASS * batch * sum(counts.sizes) * counts.item


def _rows(counts: Counts, batch: int) -> int:
    """The largest chunk of rows of a backward pass."""
    most = 0
    # Hidden neurons are bounded from both sides.
    last = len(counts.sizes) - 1
    for place, rows, sides in ((last, counts.sizes[-1], 1), *((place, n, 2) for place, n in counts.rows.items())):
        numbers = sides * batch * max(counts.sizes[: place + 1])
        most = max(most, min(rows, max(1, counts.budget // numbers)) * numbers)
    return max(CHUNK * most * counts.item, _intervals(counts, batch))


def _slopes(counts: Counts, batch: int, method: AlphaCROWN) -> int:
    """Every row keeps the slopes before it, whatever chunk it was bounded in: gradients flow through all of them."""
    hidden = sum(2 * counts.unstable[place] * counts.slopes[place] for place in counts.unstable)
    rows = counts.sizes[-1] * counts.slopes[-1] + (hidden if method.optimise_intermediate else 0)
    return KEPT * batch * rows * counts.item


def _domains(counts: Counts, method: BranchAndBound) -> int:
    neurons = sum(counts.unstable.values())
    return neurons * (CORE * (counts.sizes[0] + neurons) + COLUMNS * method.batch + OPEN * neurons) * counts.item


def _attack(counts: Counts, batch: int, verifier: Cascade) -> int:
    """All wrong classes of an example are attacked side by side, up to the attack's `rows`."""
    passes = [0]
    for attack in (verifier.attack, verifier.long_attack):
        if isinstance(attack, MarginPGD):
            passes.append(min(batch * ((attack.targets or counts.sizes[-1]) - 1), max(attack.rows, batch)))
        elif attack is not None:
            passes.append(batch)
    return SEARCHED * max(passes) * sum(counts.sizes) * counts.item


def note(model: nn.Module, x: Tensor, ball: Ball, batch: int, verifier: Any, free: int) -> str | None:
    """`advice` on the counts of a few images: by intervals, and where these say that it does not fit, by CROWN.

    Raises:
        CaptureError, UnsupportedOp: a model without bound rules.
    """
    rough = count(model, x, ball)
    words = advice(rough, batch, verifier, free)
    if words is None or _rows(rough, 1) > free:
        return words
    return advice(count(model, x, ball, tight=True), batch, verifier, free)


def advice(counts: Counts, batch: int, verifier: Any, free: int) -> str | None:
    """One line for the user where a stage needs more than what is free, with what would fit; None where all do."""
    needed = stages(counts, batch, verifier)
    dearest = max(needed, key=lambda stage: needed[stage])
    if needed[dearest] <= free:
        return None
    ways: list[str] = []
    for flag, some, method in _cheaper(batch, verifier):
        fits = max(stages(counts, some, method).values()) <= free
        if fits and not (some < batch and ways):  # of the batches that fit, the largest
            ways.append(flag)
    return (
        f"about {readable(needed[dearest])} are needed for {batch} images at a time ({dearest}), and {readable(free)} "
        f"are free; give {' or '.join(ways[:2]) or 'a smaller --model'}"
    )


def _cheaper(batch: int, verifier: Any) -> Iterator[tuple[str, int, Any]]:
    """(flag, images at a time, verifier) of what needs less, the least loss first."""
    for some in range(batch - 1, 0, -1):
        yield f"--batch-size {some}", some, verifier
    for method in _cheaper_methods(verifier):
        yield f"--verifier {VERIFIERS.spell(method)}", batch, method
    yield "--verifier crown_ibp, which goes backward from the logits alone", batch, CROWNIBP()
    yield "--verifier ibp, which never goes backward", batch, IBP()


def _cheaper_methods(verifier: Any) -> Iterator[Any]:
    if isinstance(verifier, AlphaCROWN) and verifier.optimise_intermediate:
        yield dataclasses.replace(verifier, optimise_intermediate=False)
    if isinstance(verifier, BranchAndBound):
        for children in (verifier.batch // 4, verifier.batch // 16):
            if children >= 2:
                yield dataclasses.replace(verifier, batch=children)
    if isinstance(verifier, Cascade):
        for last in () if verifier.last is None else _cheaper_methods(verifier.last):
            yield dataclasses.replace(verifier, last=last)
        yield dataclasses.replace(verifier, last=None, alpha=None)
