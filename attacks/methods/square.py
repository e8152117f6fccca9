"""Square attack: random search with square windows, from the logits alone."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.ascent import Survivors, Task
from attacks.attack import ATTACKS, Noise, noise_of, require_norm
from attacks.gradient import Precision, forward, measure, prepared
from attacks.losses import margin, misclassified
from attacks.mode import Mode, Model, attack_mode
from attacks.noise import Generators, uniform
from attacks.slices import Sliced
from attacks.threat import Ball, L1Ball, LinfBall

# Queries from which the share of pixels in a window is halved once more, published for 10000 queries.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

# Random numbers are drawn for this many queries at a time, and fooled examples leave after them.
BLOCK = 50

# Random numbers of one query: two window positions, whether the window lies on its side, and a sign per channel.
PLACES = 5

TINY = 1e-12


@ATTACKS.register("square")
@dataclass(frozen=True)
class Square:
    """Square attack: a random window is changed, and the change stays where the margin shrinks.

    Needs: logits of images [B, C, H, W], no gradients; it works where gradients are masked. Returns: a misclassified
    point, else the one with the smallest margin. Neither sound nor complete.

    Args:
        queries, restarts: length and number of the runs.
        share: share of the pixels in the first windows; it is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and
            8000 queries.
        rescaled: whether this schedule, made for 10000 queries, is compressed to `queries`; AutoAttack does not.
        mode, precision, seed: see PGD.

    Each example has its own windows and colours (the authors' code shares them in a batch), so its result does not
    depend on the batch. A query counts also where its window leaves the image as it is; on a CPU a model that answers
    alike every time is then not asked.

    Source: Andriushchenko et al. (2020), algorithms 1 to 3; the L1 form is that of the authors' AutoAttack.
    """

    queries: int = 5000
    restarts: int = 1
    share: float = 0.8
    rescaled: bool = False
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if self.queries < 1 or self.restarts < 1 or not 0 < self.share <= 1:
            raise ValueError(f"expected queries and restarts >= 1 and a share in (0, 1], got {self}")

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ball: Ball,
        *,
        generator: torch.Generator | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        require_norm(self, ball)
        if x.dim() != 4:
            raise ValueError(f"Square needs images [B, C, H, W] for its windows, got shape {tuple(x.shape)}")
        noise = noise_of(self.seed, x, generator, index)
        with attack_mode(model, self.mode), torch.no_grad():
            model, clean = prepared(model, self.mode, x, self.precision)
            repeats = isinstance(model, Sliced) and torch.equal(forward(model, x, self.precision), clean)
            survivors = Survivors(Task(x, (y,), ball), misclassified(clean, y))
            for restart in range(self.restarts):
                rows = survivors.left()
                if not len(rows):
                    break
                task = survivors.task.select(rows)
                survivors.add(*self._run(model, task, rows, restart, noise, repeats), rows)
            return survivors.points

    def _run(
        self, model: Model, task: Task, rows: Tensor, restart: int, noise: Noise, repeats: bool
    ) -> tuple[Tensor, Tensor]:
        """One random search; points and scores: the loss, infinite where fooled.

        Args:
            repeats: whether the model answers the same image alike every time. Then the answer to a query whose window
                leaves the image as it is (one in six on MNIST) is known, and takes no pass.
        """
        results = Survivors(task)
        held = torch.arange(len(task.x), device=task.x.device)
        point = _proposals(task.x, task.ball).start(noise(rows, restart, 0))
        loss = self._loss(model, point, task.labels[0])
        for first in range(0, self.queries, BLOCK):
            results.add(point, loss, held)
            left = (loss < math.inf).nonzero().squeeze(1)
            if not len(left):
                break
            held, task, point, loss = held[left], task.select(left), point[left], loss[left]
            count = min(BLOCK, self.queries - first)
            numbers = (len(left), count, PLACES + task.x.shape[1])
            draws = uniform(numbers, task.x, noise(rows[held], restart, 1, first))
            sides = [window_side(self._share_at(first + query), task.x.shape[-2:]) for query in range(count)]
            block = _proposals(task.x, task.ball).block(sides, draws)
            for query in range(count):
                candidate, asked = block.change(point, query, skip=repeats)
                if asked is None:
                    value = self._loss(model, candidate, task.labels[0])
                    better = value > loss
                    point = torch.where(better.view(-1, 1, 1, 1), candidate, point)
                    loss = torch.where(better, value, loss)
                elif len(asked):
                    value = self._loss(model, candidate, task.labels[0][asked])
                    better = (value > loss[asked]).nonzero().squeeze(1)
                    point[asked[better]], loss[asked[better]] = candidate[better], value[better]
        results.add(point, loss, held)
        return results.points, results.scores

    def _loss(self, model: Model, point: Tensor, y: Tensor) -> Tensor:
        """What the search increases, [B]: the margin loss, infinite where fooled."""
        value, logits = measure(model, margin, point, (y,), self.precision)
        return value.masked_fill(misclassified(logits, y), math.inf)

    def _share_at(self, query: int) -> float:
        if self.rescaled:
            query = int(query / self.queries * 10000)
        return self.share / 2 ** sum(query > halving for halving in HALVINGS)


def window_side(share: float, size: tuple[int, ...]) -> int:
    """Side of a square window with a `share` of the pixels of an image of `size` = (H, W), within the image."""
    height, width = size
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _proposals(x: Tensor, ball: Ball) -> _Corners | _Mass:
    return _Corners(*ball.box(x)) if isinstance(ball, LinfBall) else _Mass(x, ball)


@dataclass(frozen=True)
class _Corners:
    """Linf: every pixel is at its lower or its upper limit, and a window gets one of the two per channel."""

    lo: Tensor
    hi: Tensor

    def start(self, generators: Generators) -> Tensor:
        """Vertical stripes: one limit per channel and column."""
        count, channels, _, width = self.lo.shape
        raised = uniform((count, channels, 1, width), self.lo, generators) < 0.5
        return torch.where(raised, self.hi, self.lo)

    def block(self, sides: list[int], draws: Tensor) -> _CornerBlock:
        """The changes of some queries, from uniform numbers [B, Q, PLACES + C]."""
        corners = _corner(draws[:, :, :2], torch.tensor(sides, device=draws.device)[:, None], self.lo)
        places = corners[:, :, 0] * self.lo.shape[-1] + corners[:, :, 1]
        return _CornerBlock(self.lo, self.hi, sides, places, draws[:, :, PLACES:, None] < 0.5)


@dataclass(frozen=True)
class _CornerBlock:
    """Changes of Q queries: what does not depend on the points is computed for all of them at once, because on small
    networks a dozen operations per query take as long as the network."""

    lo: Tensor
    hi: Tensor
    sides: list[int]
    corners: Tensor  # upper left pixels of the windows, counted line by line, [B, Q]
    raised: Tensor  # channels that go to their upper limits, [B, Q, C, 1]

    def change(self, point: Tensor, query: int, skip: bool) -> tuple[Tensor, Tensor | None]:
        """The points with one window changed, and their rows: with `skip` only points that the change makes others,
        without it all of them and no rows."""
        channels, _, width = point.shape[1:]
        steps = torch.arange(self.sides[query], device=point.device)
        window = (steps[:, None] * width + steps).flatten()
        # [B, C, side * side], in an image whose pixels lie in one line
        window = (self.corners[:, query, None] + window)[:, None].expand(-1, channels, -1)
        lo, hi = self.lo.flatten(2).gather(2, window), self.hi.flatten(2).gather(2, window)
        colours = torch.where(self.raised[:, query], hi, lo)
        flat = point.flatten(2)
        if not skip:
            return flat.scatter(2, window, colours).view(point.shape), None
        rows = (flat.gather(2, window) != colours).flatten(1).any(1).nonzero().squeeze(1)
        changed = flat.index_select(0, rows).scatter_(2, window[rows], colours[rows])
        return changed.view(-1, *point.shape[1:]), rows


@dataclass(frozen=True)
class _Mass:
    """L2 and L1: one window takes over the length of the move that another one gives up."""

    x: Tensor
    ball: Ball

    def start(self, generators: Generators) -> Tensor:
        """Windows side by side all over the image, each with a random sign per channel."""
        count, channels, height, width = self.x.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        draw = uniform((count, channels + 1, down, across), self.x, generators)
        tile = _profile(side, self.ball.norm).to(self.x)
        # [B, C, down, across, side, side]
        tiles = torch.where(draw[:, :1, :, :, None, None] < 0.5, tile, tile.t()) * _sign(draw[:, 1:, :, :, None, None])
        move = torch.zeros_like(self.x)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        image = tiles.transpose(3, 4).reshape(count, channels, down * side, across * side)
        move[:, :, top : top + down * side, left : left + across * side] = image
        return self._stretched(move)

    def block(self, sides: list[int], draws: Tensor) -> _MassBlock:
        """The changes of some queries, from uniform numbers [B, Q, PLACES + C]."""
        return _MassBlock(self, sides, draws)

    def change(self, point: Tensor, side: int, draw: Tensor) -> Tensor:
        """The points with one window changed and another one back at the clean image; draw is [B, PLACES + C]."""
        # Odd, and wide enough for a profile with two signs, as far as the image allows.
        side = min(max(side, 3) + (max(side, 3) % 2 == 0), *point.shape[-2:])
        move = point - self.x
        filled, emptied = _corner(draw[:, 0:2], side, point), _corner(draw[:, 2:4], side, point)
        places = _pixels(filled, side, point)
        windows = _inside(filled, side, point) | _inside(emptied, side, point)
        profile = _profile(side, self.ball.norm).to(point)
        profile = torch.where(draw[:, 4, None, None, None] < 0.5, profile, profile.t())
        before = move[places]
        new = profile * _sign(draw[:, PLACES:, None, None]) + before / (self._size(before) + TINY)
        new = new / (self._size(new) + TINY) * self._budget(move, windows)
        move.masked_fill_(_inside(emptied, side, point), 0.0)
        move[places] = new
        return self._stretched(move)

    def _budget(self, move: Tensor, windows: Tensor) -> Tensor:
        """Length per channel for the window: that of both windows, and a share of what the move leaves of eps."""
        channels, eps = move.shape[1], self.ball.eps_of(move)
        length = self.ball.length(move).to(move).view(-1, 1, 1, 1)
        inside = self._size(move * windows)
        if isinstance(self.ball, L1Ball):
            return (eps - length).clamp(min=0.0) + inside * channels
        return ((eps**2 - length**2).clamp(min=0.0) / channels + inside**2).sqrt()

    def _stretched(self, move: Tensor) -> Tensor:
        """Feasible points; an L2 move is stretched to the border of the ball first."""
        if not isinstance(self.ball, L1Ball):
            length = self.ball.length(move).to(move).view(-1, 1, 1, 1)
            move = move / (length + TINY) * self.ball.eps_of(move)
        return self.ball.project(self.x + move, self.x)

    def _size(self, move: Tensor) -> Tensor:
        """Length of each channel, [B, C, 1, 1]."""
        if isinstance(self.ball, L1Ball):
            return move.abs().sum((-2, -1), keepdim=True)
        return move.square().sum((-2, -1), keepdim=True).sqrt()


@dataclass(frozen=True)
class _MassBlock:
    """Changes of Q queries."""

    mass: _Mass
    sides: list[int]
    draws: Tensor

    def change(self, point: Tensor, query: int, skip: bool) -> tuple[Tensor, None]:
        """The points after one query: all of them, as hardly any stays the same."""
        return self.mass.change(point, self.sides[query], self.draws[:, query]), None


def _sign(draw: Tensor) -> Tensor:
    return torch.where(draw < 0.5, 1.0, -1.0).to(draw)


def _corner(draw: Tensor, side: int | Tensor, image: Tensor) -> Tensor:
    """Upper left pixels [..., 2] of windows in the image, from uniform numbers [..., 2]; sides broadcast with them."""
    room = torch.tensor(image.shape[-2:], device=draw.device) - side + 1
    return (draw * room).long().minimum(room - 1)


def _inside(corner: Tensor, side: int, image: Tensor) -> Tensor:
    """Which pixels are in the window: bool [B, 1, H, W]."""
    spans = []
    for axis, size in enumerate(image.shape[-2:]):
        offset = torch.arange(size, device=image.device) - corner[:, axis, None]
        spans.append((offset >= 0) & (offset < side))
    return spans[0][:, None, :, None] & spans[1][:, None, None, :]


def _pixels(corner: Tensor, side: int, image: Tensor) -> tuple[Tensor, ...]:
    """Index of the window's pixels in a batch of images; what it picks is [B, C, side, side]."""
    count, channels = image.shape[:2]
    steps = torch.arange(side, device=image.device)
    down, across = corner[:, 0, None] + steps, corner[:, 1, None] + steps
    example = torch.arange(count, device=image.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=image.device).view(1, -1, 1, 1)
    return example, channel, down[:, None, :, None], across[:, None, None, :]


@functools.lru_cache(maxsize=64)
def _profile(side: int, norm: str) -> Tensor:
    """Window of length 1: a positive hill in its upper half, a negative one in its lower half, [side, side]."""
    power = 4 if norm == "l1" else 2
    upper = side // 2
    profile = torch.cat([_hill(upper, side, power), -_hill(side - upper, side, power)])
    return profile / (profile.abs().sum() if norm == "l1" else profile.norm())


def _hill(height: int, width: int, power: int) -> Tensor:
    """Sum of 1 / k**power over the concentric squares k = 1, 2, ... around the centre that hold a pixel."""
    layers = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -float(power)
    # A pixel at distance m of the centre is in all squares from the m-th on.
    sums = layers.flip(0).cumsum(0).flip(0)
    down = (torch.arange(height) - height // 2).abs()[:, None]
    across = (torch.arange(width) - width // 2).abs()[None, :]
    return sums[torch.maximum(down, across)]
