"""Several processes that train one network, each on its rows of every mini-batch.

Started by torchrun, with gloo between CPUs and NCCL between GPUs. The loss of a step is the sum over the processes of
(own rows / all rows) times their mean losses. What joins rows (BatchNorm statistics, `Team.whole`) does so
differentiably, with the gradient of that sum, and noise is cut from one draw for the whole batch (`attacks.noise`): so
a step is that of one process up to rounding. Whatever is decided from the clock, from files or by a signal, the
first process decides for all.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from certify.all_reduce import summed

Shared = TypeVar("Shared")


def connect(backend: str | None = None) -> None:
    """Make the process group of the processes that torchrun started; it ends with this process at the latest."""
    # Read before there is a group: its functions have that of the moment as a default, and would hold it for good.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group(backend)
    atexit.register(disconnect)


def disconnect() -> None:
    """End the process group, if there is one, with its threads.

    A thread of gloo lets go of the tensors of the last message when it comes to it; where the interpreter is ending by
    then, it aborts the process. Threads end when nothing refers to the group any more.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def lost_another(error: Exception) -> bool:
    """Whether the error says that a message to or from another process failed, as it does where that one has ended."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@dataclass(frozen=True)
class Part:
    """A part of a mini-batch that is computed at a time, and this process's rows of it.

    Attributes:
        own: number of the rows among all rows of this process.
        start: number of the first of them in the part. count: rows of the whole part.
    """

    own: slice
    start: int
    count: int

    @property
    def share(self) -> slice:
        """The rows in the part."""
        return slice(self.start, self.start + self.own.stop - self.own.start)


@dataclass(frozen=True)
class Team:
    """The processes of one training run.

    Attributes:
        rank, size: number of this process, and how many there are.
    """

    rank: int
    size: int

    @classmethod
    def join(cls, device: str) -> Team | None:
        """The team that torchrun started this process for; None outside of torchrun or for a single process."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        # Both backends: decisions and saved states are exchanged from the CPU.
        connect("cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """End the connections, when all have come to it; the last call."""
        dist.barrier(self.group)
        disconnect()

    @property
    def group(self) -> dist.ProcessGroup:
        """The connections; not kept here, for their threads live as long as the group does."""
        group = dist.group.WORLD
        assert group is not None
        return group

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def parts(self, count: int, size: int) -> list[Part]:
        """The parts of `size` rows of a batch of `count`, and this process's share of each.

        Raises:
            ValueError: a part has fewer rows than there are processes.
        """
        parts, before = [], 0
        for start in range(0, count, size):
            length = min(size, count - start)
            if length < self.size:
                raise ValueError(
                    f"{length} images of a mini-batch are too few for {self.size} processes; choose another batch_size "
                    "or micro_batch, or fewer processes"
                )
            first, last = (length * rank // self.size for rank in (self.rank, self.rank + 1))
            parts.append(Part(slice(before, before + last - first), first, length))
            before += last - first
        return parts

    def whole(self, own: Tensor, part: Part) -> Tensor:
        """Rows `[B, ...]` of a part from every process's own `[b, ...]`; differentiable, see `summed`."""
        before, after = part.start, part.count - part.share.stop
        filler = [own.new_zeros(rows, *own.shape[1:]) for rows in (before, after)]
        return summed(torch.cat([filler[0], own, filler[1]]), self.group)

    @torch.no_grad()
    def add_up(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace tensors by their sums over the processes, in place; in one message."""
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return
        flat = torch.cat([tensor.flatten() for tensor in present])
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(present, flat.split([tensor.numel() for tensor in present]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, fact: bool) -> bool:
        """Whether the fact holds on any process."""
        flag = torch.tensor(int(fact))
        dist.all_reduce(flag, group=self.group)
        return bool(flag)

    def from_lead(self, make: Callable[[], Shared]) -> Shared:
        """What the first process makes, on every process; where it fails it says why, and the others end in silence."""
        made: list[tuple[bool, Shared | None]] = [(False, None)]
        try:
            if self.leads:
                made = [(True, make())]
        finally:
            dist.broadcast_object_list(made, src=0, group=self.group)
        succeeded, value = made[0]
        if not succeeded:
            raise SystemExit(2)
        return value  # type: ignore[return-value]

    @torch.no_grad()
    def follow_lead(self, model: nn.Module) -> None:
        """Take over the first process's weights and running statistics."""
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0, group=self.group)
