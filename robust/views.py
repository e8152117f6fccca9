"""One mini-batch seen in different ways: clean, attacked, bounded. Each view is computed at most once.

BatchNorm: the clean pass in training mode sets the batch statistics and updates the running ones; every other view
uses those batch statistics, and gradients flow through them. That is the rule of Shi et al. 2021, SABR and CTBench;
objectives that want another one name it (`statistics="running"` of an attack, `batch_norm="own"` of adversarial
training, whose passes each have their own statistics).

A step may compute its loss more than once, at different weights. Every time has Views of its own; what was searched or
drawn for the step (`once`) they share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from attacks.threat import Ball
from certify.all_reduce import summed
from certify.bounds.crown import Boxes
from certify.bounds.interval import interval_walk, interval_walk_with_points, margins, margins_and_logits
from certify.graph import Graph, Snapshot
from certify.interval import BoxesAndPoints, Interval
from certify.ops.affine import Linear
from certify.ops.batch_norm import Statistics
from robust.batch_norm import statistics_kept
from robust.team import Part, Team

Kept = TypeVar("Kept")


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
        index: numbers of the images among the training images, `[B]`.
        epoch: steps done over steps per epoch.
        pace: factor on the steps of attacks, `[B]`; None for none.
        count_correct: whether attacks note `kappa` and `path_length`.
        kept: what `once` has made.
        moves_statistics: whether passes in training mode move the running statistics (those of an attack always do).
        team, part: processes that have the other rows of the batch, and which rows these are; None for one process.

    Attributes:
        logits: by name ("adversarial", "helper" ...), the passes that weightings and active methods may look at.
        moved: whether a pass in training mode was made.
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
    index: Tensor | None = None
    epoch: float = 0.0
    pace: Tensor | None = None
    count_correct: bool = False
    kept: dict[Hashable, Any] = field(default_factory=dict)
    moves_statistics: bool = True
    team: Team | None = None
    part: Part | None = None
    bounded: list[Bounded] = field(default_factory=list, init=False)
    logits: dict[str, Tensor] = field(default_factory=dict, init=False)
    moved: bool = field(default=False, init=False)

    def once(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` returned the first time in this step: searched points and drawn noise, which stay fixed when the
        loss is computed again at other weights."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def whole(self, rows: Tensor) -> Tensor:
        """One value per image of the batch `[B, ...]`, from those of this process's images `[b, ...]`; differentiable.

        For losses that are no means of examples. The same tensor on one process.
        """
        if self.team is None:
            return rows
        assert self.part is not None
        return self.team.whole(rows, self.part)

    def own(self, values: Tensor) -> Tensor:
        """This process's rows `[b, ...]` of what `whole` gave."""
        return values if self.part is None else values[self.part.share]

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all entries and all images of the batch of what this process has of its own, `[b, ...]`."""
        if self.team is None:
            return values.mean()
        assert self.part is not None
        return summed(values.mean() * (len(self.x) / self.part.count), self.team.group)

    @property
    def adversarial(self) -> Tensor:
        """Logits at the adversarial points, `[B, K]`; at radius 0, where training is natural, those of the images.

        Raises:
            ValueError: the objective has computed none.
        """
        if "adversarial" not in self.logits:
            if self.eps_fraction == 0:
                return self.clean
            raise ValueError("this needs logits at adversarial points, which the objective does not compute; try pgd")
        return self.logits["adversarial"]

    @property
    def points(self) -> Tensor:
        """Adversarial points of the step, `[B, C, H, W]`: the objective's first ones; at radius 0 the images.

        Raises:
            ValueError: it has searched none.
        """
        found = [value for key, value in self.kept.items() if isinstance(key, tuple) and key[0] == "adversarial"]
        if not found and self.eps_fraction == 0:
            return self.x
        if not found:
            raise ValueError("this needs adversarial points, and the objective attacks no images; try pgd")
        return found[0]

    @property
    def kappa(self) -> Tensor:
        """Number of points of the attack's path at which its gradient was taken that are classified correctly, `[B]`.

        Raises:
            ValueError: the objective attacks nothing.
        """
        return self._path[0]

    @property
    def path_length(self) -> int:
        """Number of points of the attack's path at which its gradient was taken: the largest possible `kappa`."""
        return self._path[1]

    @property
    def _path(self) -> tuple[Tensor, int]:
        if "path" not in self.kept:
            raise ValueError("this needs an attack's path, and the objective attacks no points; try pgd")
        return self.kept["path"]

    @cached_property
    def _clean_pass(self) -> tuple[Tensor, Mapping[int, Statistics]]:
        if self.statistics is not None:
            return self.graph.snapshot(self.statistics)(self.x), self.statistics
        return self._pass_in_training(self.graph, self.x, self.moves_statistics)

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
    def evaluation(self) -> Snapshot:
        """The network in evaluation as the last step left it, without gradients to the parameters.

        Raises:
            ValueError: this step has moved the running statistics already.
        """
        if self.graph.has_batch_norm and (self.statistics is not None or self.moved):
            raise ValueError(
                "statistics=eval: this step has moved the running statistics already; set micro_batch=0, and attack "
                "before the first pass in training mode"
            )
        with torch.no_grad():
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
        self._refuse_parts()
        logits, statistics = self._pass_in_training(self.graph, x, self.moves_statistics)
        return logits, self.graph.snapshot(statistics)

    def train(self, x: Tensor, move: bool = True) -> Tensor:
        """Logits of another batch in training mode, with statistics of its own; moves the running ones once more.

        Args:
            move: False to leave the running statistics as they are.

        Raises:
            ValueError: see `training_pass`.
        """
        self._refuse_parts()
        return self._pass_in_training(self.graph, x, self.moves_statistics and move)[0]

    def train_with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, input of the last layer `[B, n]`) as in `train`."""
        *front, last = self.graph.steps
        if last.inputs != (len(front) - 1,):
            raise ValueError(f"features need a network that ends in one layer; {last.name!r} reads {last.inputs}")
        self._refuse_parts()
        features = self._pass_in_training(replace(self.graph, steps=tuple(front)), x, self.moves_statistics)[0]
        return last.build().forward(features), features

    def iterate(self, x: Tensor, move: bool, graph: Graph | None = None) -> Tensor:
        """Logits of an attack's iterate in training mode, constant in the parameters.

        Args:
            move: whether the running statistics follow it.
            graph: the network in another form; by default as it is.

        Raises:
            ValueError: the attack has left examples out, so that the statistics are no longer the batch's.
        """
        self._refuse_parts()
        if len(x) != len(self.x):
            raise ValueError(
                f"statistics=train needs the whole batch in every pass of the attack, which has {len(x)} of "
                f"{len(self.x)} examples in this one; give the attack keep=last or keep=best"
            )
        return self._pass_in_training(graph or self.graph, x, move, constant=True)[0]

    @torch.no_grad()
    def pass_idly(self, x: Tensor) -> None:
        """A pass in training mode for the sake of the running statistics alone."""
        self.train(x)

    def _refuse_parts(self) -> None:
        if self.statistics:
            raise ValueError("statistics of adversarial points need whole batches; set micro_batch=0")

    def _pass_in_training(
        self, graph: Graph, x: Tensor, move: bool, constant: bool = False
    ) -> tuple[Tensor, Mapping[int, Statistics]]:
        self.moved = self.moved or move
        with nullcontext() if move else statistics_kept(graph.batch_norm_layers()):
            return graph.forward_train(x, constant)

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

    def margins_beside_clean(self) -> Tensor:
        """`margins(self.box)` for objectives that use `clean` too: without BatchNorm one pass gives both."""
        if self.graph.has_batch_norm or "_clean_pass" in vars(self):
            return self.margins(self.box)
        front, last = split_last(self.snapshot)
        start = BoxesAndPoints.of(self.box, self.x)
        hidden, boxes = interval_walk_with_points(front, start, self.note_boxes)
        if self.note_boxes:
            self.bounded.append(Bounded(front, self.box, boxes))
        low, logits = margins_and_logits(last, hidden, self.y)
        self._clean_pass = logits, {}
        return low

    def walk(self, snapshot: Snapshot, box: Interval, keep_boxes: bool = False) -> tuple[Interval, Boxes]:
        """Interval propagation; the boxes it passes are noted in `bounded` where a regulariser asks for them."""
        out, boxes = interval_walk(snapshot, box, keep_boxes or self.note_boxes)
        if self.note_boxes:
            self.bounded.append(Bounded(snapshot, box, boxes))
        return out, boxes


class WholeViews:
    """Views of a batch whose rows are spread over processes, put together: what weightings and watchers are shown.

    They have labels, numbers, logits, attacked points and counts of all images, each fetched when it is asked for (by
    all processes alike), and no passes of their own: those would count once for every process.
    """

    def __init__(self, views: Views) -> None:
        self._views = views
        self.ball, self.epoch, self.eps_fraction, self.ramp = views.ball, views.epoch, views.eps_fraction, views.ramp

    def __getattr__(self, name: str) -> Any:
        if name not in ("x", "y", "index", "clean", "adversarial", "points", "kappa"):
            raise ValueError(f"views.{name} cannot be had of a batch that is spread over processes; use one process")
        own = getattr(self._views, name)
        value = own if own is None else self._views.whole(own.to(self._views.x.device))
        setattr(self, name, value)
        return value

    @property
    def path_length(self) -> int:
        return self._views.path_length


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
    return Interval(torch.add(x, up - down, alpha=0.5), torch.lerp(down, up, 0.5))


def split_last(snapshot: Snapshot) -> tuple[Snapshot, Linear]:
    """(all ops but the last, the last one, which must be dense)."""
    last = snapshot.nodes[-1]
    if not isinstance(last.op, Linear) or last.inputs != (len(snapshot.nodes) - 2,):
        raise ValueError(f"certified training needs a dense last layer, got {type(last.op).__name__} ({last.name!r})")
    return Snapshot(snapshot.nodes[:-1]), last.op
