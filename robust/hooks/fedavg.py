"""FedAvg: clients that train on data of their own and average their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust.active import Active, Moment, RunFacts
from robust.hook import HOOKS
from robust.team import connect


@HOOKS.register("fedavg")
@dataclass(frozen=True)
class FedAvg:
    """Behind every `local_epochs` epochs all clients take the mean of their weights, by numbers of images
    (McMahan et al. 2017).

    With an adversarial objective it is federated adversarial learning (Li et al. 2023). A client is a process of
    torch.distributed with a folder and data of its own, started by torchrun or a script that has made the process
    group; all begin with the weights of the first. BatchNorm's running statistics are averaged too, optimiser states
    are not. Every client ends with the same weights, where the epochs are a multiple of `local_epochs`.

    Args:
        local_epochs: epochs between two averages.
    """

    local_epochs: int = 1

    undivided: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.local_epochs < 1:
            raise ValueError(f"local_epochs={self.local_epochs}: expected at least 1")

    def start(self, run: RunFacts) -> Active:
        if run.epochs % self.local_epochs:
            raise ValueError(
                f"fedavg: {run.epochs} epochs are no multiple of local_epochs={self.local_epochs}; the clients would "
                "end apart"
            )
        if not dist.is_initialized():
            if "WORLD_SIZE" not in os.environ:
                raise ValueError(
                    "fedavg needs the processes of its clients: torchrun --nproc-per-node=N --no-python robust train, "
                    "each with data and a folder of its own"
                )
            connect()
        for tensor in _shared(run.model):
            dist.broadcast(tensor, src=0)
        return _Active(self, run)


class _Active(Active):
    def __init__(self, fedavg: FedAvg, run: RunFacts) -> None:
        self.fedavg, self.images = fedavg, run.images

    def after_epoch(self, moment: Moment) -> None:
        if round(moment.epoch) % self.fedavg.local_epochs == 0:
            average_over_clients(moment.model, self.images, round(moment.epoch))


@torch.no_grad()
def average_over_clients(model: nn.Module, images: int, epoch: int) -> None:
    """Replace weights and running statistics by their mean over all processes, weighted by `images`.

    Raises:
        RuntimeError: the processes are in different epochs, as after a kill of some of them; none has averaged.
    """
    device = next(model.parameters()).device
    ends = torch.tensor([epoch, -epoch], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise RuntimeError(
            f"clients are in epochs {-int(ends[1])} to {int(ends[0])}; start all of them anew, in empty folders"
        )
    total = torch.tensor(float(images), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    for tensor in _shared(model):
        tensor.mul_(images / float(total))
        dist.all_reduce(tensor)


def _shared(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and running statistics, without the numbers of batches."""
    return (tensor for tensor in model.state_dict().values() if tensor.is_floating_point())
