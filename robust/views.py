"""One mini-batch seen in different ways: clean, attacked, bounded. Each view is computed at most once.

BatchNorm: the clean pass in training mode sets the batch statistics and updates the running ones; every other view
uses those batch statistics, and gradients flow through them. That is the rule of Shi et al. 2021, SABR and CTBench;
objectives that want another one name it (`statistics="running"` of an attack).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from attacks.threat import Ball
from certify.bounds.crown import Boxes
from certify.bounds.interval import interval_walk, margins
from certify.graph import Graph, Snapshot
from certify.interval import Interval
from certify.ops.affine import Linear
from certify.ops.batch_norm import Statistics


@dataclass(frozen=True)
class Bounded:
    """One interval propagation: the ops, the input box, and the boxes that nonlinear ops read, by place."""

    snapshot: Snapshot
    start: Interval
    boxes: Boxes


@dataclass
class Views:
    """The views of one batch.

    Args:
        graph: the model.
        x, y: images `[B, C, H, W]` in the pixel range, labels `[B]`.
        ball: threat model at this step's radius.
        generator: source of all randomness of the step.
        eps_fraction: this step's radius over the final one, in [0, 1].
        ramp: share of the radius schedule's steps that lie behind, in [0, 1].
        statistics: BatchNorm statistics to use, where they were computed on a larger batch; the clean pass sets them
            otherwise.
        note_boxes: keep the boxes of every interval propagation in `bounded`, for regularisers.
    """

    graph: Graph
    x: Tensor
    y: Tensor
    ball: Ball
    generator: torch.Generator | None = None
    eps_fraction: float = 1.0
    ramp: float = 1.0
    statistics: Mapping[int, Statistics] | None = None
    note_boxes: bool = False
    bounded: list[Bounded] = field(default_factory=list, init=False)

    @cached_property
    def _clean_pass(self) -> tuple[Tensor, Mapping[int, Statistics]]:
        if self.statistics is not None:
            return self.graph.snapshot(self.statistics)(self.x), self.statistics
        return self.graph.forward_train(self.x)

    @property
    def clean(self) -> Tensor:
        """Logits of the images, `[B, K]`."""
        return self._clean_pass[0]

    @cached_property
    def snapshot(self) -> Snapshot:
        """The network with the clean batch's statistics; differentiable with respect to parameters and statistics."""
        if not self.graph.has_batch_norm:
            return self.graph.snapshot()
        return self.graph.snapshot(self._clean_pass[1])

    @cached_property
    def frozen(self) -> Snapshot:
        """`snapshot` without gradients to the parameters: what attacks climb."""
        return self.snapshot.without_gradient()

    @cached_property
    def running(self) -> Snapshot:
        """The network as in evaluation, with running statistics, without gradients to the parameters."""
        if self.graph.has_batch_norm:
            # The clean pass moves the running statistics: what is asked for first must not decide which ones these are.
            _ = self._clean_pass
        return self.graph.snapshot().without_gradient()

    @cached_property
    def box(self) -> Interval:
        """The box around the ball, cut by the pixel range."""
        return box_around(self.x, self.ball.eps_of(self.x), self.ball.pixel_range)

    def training_pass(self, x: Tensor) -> tuple[Tensor, Snapshot]:
        """Logits of another batch in training mode, and the network with that batch's BatchNorm statistics.

        Updates the running statistics once more.

        Raises:
            ValueError: the batch is only a part of a larger one, so its statistics are not the step's.
        """
        if self.statistics is not None:
            raise ValueError("statistics of adversarial points need whole batches; set micro_batch=0")
        logits, statistics = self.graph.forward_train(x)
        return logits, self.graph.snapshot(statistics)

    def margins(self, box: Interval, snapshot: Snapshot | None = None) -> Tensor:
        """Interval lower bounds of the margins z_y - z_k over an input box, `[B, K]`, 0 in column y.

        Args:
            box: input of the snapshot's first node.
            snapshot: the network, or a later part of it.

        Raises:
            ValueError: the last layer is not dense.
        """
        front, last = split_last(snapshot or self.snapshot)
        return margins(last, self.walk(front, box)[0], self.y)

    def walk(self, snapshot: Snapshot, box: Interval, keep_boxes: bool = False) -> tuple[Interval, Boxes]:
        """Interval propagation; the boxes it passes are noted in `bounded` where a regulariser asks for them."""
        out, boxes = interval_walk(snapshot, box, keep_boxes or self.note_boxes)
        if self.note_boxes:
            self.bounded.append(Bounded(snapshot, box, boxes))
        return out, boxes


def box_around(x: Tensor, eps: Tensor, pixel_range: tuple[float, float] | None) -> Interval:
    """Points within `eps` of x in every pixel, cut by the pixel range.

    Plain arithmetic: a training step needs no rounding to the safe side. The radius is no difference of the box's ends,
    so that it stays accurate where eps is near the resolution of x.

    Args:
        x: images in the pixel range, `[B, *shape]`.
        eps: radius, broadcastable against x.
    """
    down = up = eps.expand_as(x)
    if pixel_range is not None:
        least, greatest = pixel_range
        down, up = torch.minimum(down, x - least), torch.minimum(up, greatest - x)
    return Interval(x + (up - down) / 2, (up + down) / 2)


def split_last(snapshot: Snapshot) -> tuple[Snapshot, Linear]:
    """(all ops but the last, the last one, which must be dense)."""
    last = snapshot.nodes[-1]
    if not isinstance(last.op, Linear) or last.inputs != (len(snapshot.nodes) - 2,):
        raise ValueError(f"certified training needs a dense last layer, got {type(last.op).__name__} ({last.name!r})")
    return Snapshot(snapshot.nodes[:-1]), last.op
