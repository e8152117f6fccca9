"""Threat models: the set of inputs that an attacker may choose, and its geometry.

A ball is given in pixel units around a point `x` of shape [B, ...] and intersected with the pixel range. Membership is
meant over the real numbers: a point that `project` or `sample` returns, or that lies in the inward `box`, is inside
for the exact value of `eps`, not for its float32 neighbour, so that an attack and a proof can never contradict each
other by one rounding error. `x` itself must lie in the pixel range.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from attacks.noise import Generators, normal, uniform

Rounding = Literal["inward", "outward"]
Direction = Literal["up", "down"]

# Share of the L2 or L1 radius given up so that float32 arithmetic cannot leave the ball: four roundings of relative
# size 2**-24 happen between the measured norm and the returned point, 2.4e-7 in all.
SLACK = 1e-6


@dataclass(frozen=True)
class Ball(ABC):
    """Inputs within `eps` of x in one norm and within the pixel range.

    Args:
        eps: radius in pixel units, before normalisation (8/255); one number, or one per example [B].
        pixel_range: lowest and highest pixel value, or None for no limits.
    """

    eps: float | Tensor
    pixel_range: tuple[float, float] | None = (0.0, 1.0)

    norm: ClassVar[str]

    def __post_init__(self) -> None:
        _check_range(self.pixel_range)
        _check_radius(self.eps)
        if not isinstance(self.eps, Tensor | int | float):  # such as numpy's numbers and fractions
            object.__setattr__(self, "eps", float(self.eps))

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Feasible point near x_adv, truly inside the ball; same shape."""

    @abstractmethod
    def sample(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Random start, uniform in the ball before it is cut by the pixel range; truly inside."""

    @abstractmethod
    def steepest(self, gradient: Tensor, step: float | Tensor, at: Tensor | None = None) -> Tensor:
        """Move of length `step` (in pixel units; a number or [B]) along which the linearised loss grows most.

        Args:
            at: current points; where given, L1 steps push no pixel out of the range, which would waste the step.
        """

    @abstractmethod
    def dual_norm(self, a: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Largest value of `<a, d>` / eps over moves d of the ball (pixel range aside), reduced over `dims`."""

    @abstractmethod
    def length(self, move: Tensor) -> Tensor:
        """Norm of each move [B, ...], without regard to eps: float64 [B]."""

    @abstractmethod
    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each x_adv is in the ball and in the pixel range, without tolerance: bool [B]."""

    def box(self, x: Tensor, rounding: Rounding = "inward") -> tuple[Tensor, Tensor]:
        """Smallest box around the ball, cut by the pixel range: (lo, hi), each with the shape and dtype of x.

        Args:
            rounding: "inward" for attacks: every point of the box is within eps of x in each pixel. "outward" for
                bounds: the box contains every real point of the ball.
        """
        up, down = _directions(rounding)
        low, high = self._limits(x, rounding)
        wide, radius = x.double(), self._radius(x)
        lo, hi = _rounded_sum(wide, -radius, x.dtype, up), _rounded_sum(wide, radius, x.dtype, down)
        return lo.clamp_(min=low), hi.clamp_(max=high)

    def eps_of(self, x: Tensor) -> Tensor:
        """Radius of each example in the dtype of x, [B, 1, ..., 1]."""
        return self._radius(x).to(x.dtype)

    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far each pixel of x can fall and rise within the pixel range, infinitely far where there is none."""
        low, high = self._limits(x, "inward")
        return x - low, high - x

    def cut(self, point: Tensor) -> Tensor:
        """The point with each pixel moved into the pixel range, in place, whatever its distance from anything."""
        return point.clamp_(*self._limits(point, "inward"))

    def scaled(self, factor: float | Tensor) -> Self:
        """The same threat model with eps multiplied by `factor`, one number or one per example [B]."""
        return self._with(self.eps * factor)

    def require_radii(self, x: Tensor) -> None:
        """ValueError where there are several radii, and not one for each of the examples [B, ...]."""
        if isinstance(self.eps, Tensor) and self.eps.dim() and len(self.eps) != len(x):
            raise ValueError(f"the ball holds {len(self.eps)} radii, the batch {len(x)} examples")

    def select(self, index: Tensor | slice) -> Self:
        """The ball of a subset of the examples; itself where one eps serves all of them."""
        return self._with(self.eps[index]) if isinstance(self.eps, Tensor) and self.eps.dim() else self

    def _with(self, eps: float | Tensor) -> Self:
        # Not through the constructor, whose checks read a tensor's values and so would wait for the device.
        other = copy.copy(self)
        object.__setattr__(other, "eps", eps)
        return other

    def _radius(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.dim() - 1)
        if not isinstance(self.eps, Tensor):
            return torch.full((len(x),), self.eps, dtype=torch.float64, device=x.device).view(shape)
        self.require_radii(x)
        return self.eps.to(x.device, torch.float64).expand(len(x)).reshape(shape)

    def _limits(self, x: Tensor, rounding: Rounding) -> tuple[float, float]:
        return (-math.inf, math.inf) if self.pixel_range is None else _limits(self.pixel_range, x.dtype, rounding)

    def _in_range(self, x_adv: Tensor) -> Tensor:
        low, high = self.pixel_range or (-math.inf, math.inf)
        wide = x_adv.double()
        return ((wide >= low) & (wide <= high)).flatten(1).all(dim=1)

    def _moved(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta cut by the pixel range, each pixel rounded towards x, so that rounding cannot lengthen a move."""
        moved = x + delta
        moved = torch.where((moved - x).abs() > delta.abs(), torch.nextafter(moved, x), moved)
        return moved.clamp_(*self._limits(x, "inward"))


@dataclass(frozen=True)
class LinfBall(Ball):
    """Every pixel moves by at most eps."""

    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_range is not None and _highest(self.eps) > self.pixel_range[1] - self.pixel_range[0]:
            _refuse_radius(_highest(self.eps), self.pixel_range)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return torch.clamp(x_adv, *self.box(x))

    def sample(self, x: Tensor, generator: Generators = None) -> Tensor:
        return uniform_between(*self.box(x), generator)

    def steepest(self, gradient: Tensor, step: float | Tensor, at: Tensor | None = None) -> Tensor:
        return gradient.sign().mul_(_per_example(step, gradient))

    def dual_norm(self, a: Tensor, dims: tuple[int, ...]) -> Tensor:
        return a.abs().sum(dims)

    def length(self, move: Tensor) -> Tensor:
        return move.flatten(1).abs().amax(dim=1).double()

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        wide, centre, radius = x_adv.double(), x.double(), self._radius(x)
        lo = _rounded_sum(centre, -radius, torch.float64, "up")
        hi = _rounded_sum(centre, radius, torch.float64, "down")
        return ((wide >= lo) & (wide <= hi)).flatten(1).all(dim=1) & self._in_range(x_adv)


@dataclass(frozen=True)
class L2Ball(Ball):
    """The Euclidean length of the move is at most eps."""

    norm: ClassVar[str] = "l2"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Point inside the ball: shortened to eps (1 - 1e-6), then cut by the pixel range.

        The cut moves every pixel towards x, so the order is feasible; where it bites, the result is close to the
        nearest feasible point without being it.
        """
        delta = x_adv - x
        length = _l2(delta).clamp_(min=torch.finfo(torch.float64).tiny)
        shrink = (self._radius(x) * (1 - SLACK) / length).clamp_(max=1.0)
        return self._moved(x, delta.mul_(shrink.to(x.dtype)))

    def sample(self, x: Tensor, generator: Generators = None) -> Tensor:
        direction = normal(x.shape, x, generator)
        # The volume within a share r of the radius is r**d.
        share = uniform((len(x), *[1] * (x.dim() - 1)), x, generator) ** (1 / max(x[0:1].numel(), 1))
        return self.project(x + direction * (share * self._radius(x) / _l2(direction)).to(x.dtype), x)

    def steepest(self, gradient: Tensor, step: float | Tensor, at: Tensor | None = None) -> Tensor:
        length = _l2(gradient).clamp_(min=torch.finfo(torch.float64).tiny)
        # Divided in two steps: a reciprocal of a tiny length would overflow float32.
        unit = gradient.double().div_(length).to(gradient.dtype)
        return unit.mul_(_per_example(step, gradient))

    def dual_norm(self, a: Tensor, dims: tuple[int, ...]) -> Tensor:
        return euclidean_norm(a, dims)

    def length(self, move: Tensor) -> Tensor:
        return _l2(move).flatten()

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        inside = _l2(x_adv.double() - x.double()) <= self._radius(x)
        return inside.flatten(1).all(dim=1) & self._in_range(x_adv)


@dataclass(frozen=True)
class L1Ball(Ball):
    """The absolute moves of all pixels add up to at most eps."""

    norm: ClassVar[str] = "l1"

    # Share of the pixels that one step moves; the literal steepest ascent, one pixel a step, converges slowly.
    STEP_SHARE: ClassVar[float] = 0.01

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest point of the ball cut by the pixel range (radius eps (1 - 1e-6)).

        Source: Croce and Hein, "Mind the box" (2021): projecting on the intersection, rather than on one set after
        the other, is what makes attacks in this norm reliable.
        """
        low, high = self._limits(x, "inward")
        delta = (x_adv.double() - x.double()).flatten(1)
        room = torch.where(delta > 0, high - x.double().flatten(1), x.double().flatten(1) - low)
        shrunk = _simplex_with_caps(delta.abs(), room, self._radius(x).view(-1) * (1 - SLACK))
        return self._moved(x, (shrunk * delta.sign()).view_as(x).to(x.dtype))

    def sample(self, x: Tensor, generator: Generators = None) -> Tensor:
        # A draw may be 0 exactly, once in 2**24: its noise would be infinite.
        sides = uniform(x.shape, x, generator).double().mul_(2).sub_(1).clamp_(min=-1 + 2**-24)
        # Laplace noise, scaled to the sphere, is uniform on it; the volume within a share r of the radius is r**d.
        laplace = -torch.log1p(-sides.abs()) * sides.sign()
        share = uniform((len(x), *[1] * (x.dim() - 1)), x, generator) ** (1 / max(x[0:1].numel(), 1))
        length = laplace.abs().sum(tuple(range(1, x.dim())), keepdim=True)
        return self.project(x + (laplace * (share * self._radius(x) / length)).to(x.dtype), x)

    def steepest(self, gradient: Tensor, step: float | Tensor, at: Tensor | None = None) -> Tensor:
        """Moves of the pixels with the largest gradients: equal ones, spread over a hundredth of all pixels.

        A pixel near the border moves no further than the range goes, and what it leaves of the step goes to the pixels
        with the next largest gradients.

        Source: Croce and Hein, "Mind the box" (2021), section 3.2.
        """
        rows = gradient.flatten(1)
        lengths = rows.new_ones(len(rows), 1) * _per_example(step, rows)
        caps = (lengths / max(int(self.STEP_SHARE * rows.shape[1]), 1)).expand_as(rows)
        if at is not None:
            low, high = self._limits(gradient, "inward")
            point = at.flatten(1)
            caps = torch.where(rows > 0, high - point, point - low).clamp_(min=0.0).minimum(caps)
        caps = caps.masked_fill(rows == 0, 0.0)
        order = rows.abs().argsort(dim=1, descending=True)
        ordered = caps.gather(1, order)
        moves = (lengths - (ordered.cumsum(1) - ordered)).clamp_(min=0.0).minimum(ordered)
        return torch.zeros_like(rows).scatter_(1, order, moves).mul_(rows.sign()).view_as(gradient)

    def dual_norm(self, a: Tensor, dims: tuple[int, ...]) -> Tensor:
        return a.abs().amax(dims)

    def length(self, move: Tensor) -> Tensor:
        return move.flatten(1).abs().sum(dim=1, dtype=torch.float64)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        length = (x_adv.double() - x.double()).abs().flatten(1).sum(dim=1)
        return (length <= self._radius(x).view(-1)) & self._in_range(x_adv)


def make_ball(
    norm: str, eps: float | Tensor, pixel_range: tuple[float, float] | None = (0.0, 1.0)
) -> LinfBall | L2Ball | L1Ball:
    """Ball of the norm named "linf", "l2" or "l1"; any other name is a ValueError that lists them."""
    for ball in (LinfBall, L2Ball, L1Ball):
        if ball.norm == norm:
            return ball(eps, pixel_range)
    raise ValueError(f"no norm named {norm!r}; known: linf, l2, l1")


def uniform_between(lo: Tensor, hi: Tensor, generator: Generators = None) -> Tensor:
    """Random point of a box, uniform in each pixel."""
    # The weighted sum may round past hi by one unit in the last place.
    return torch.lerp(lo, hi, uniform(lo.shape, lo, generator)).clamp_(lo, hi)


def _check_range(pixel_range: tuple[float, float] | None) -> None:
    if pixel_range is not None and not pixel_range[0] < pixel_range[1]:
        raise ValueError(f"expected a pixel range (low, high) with low < high, got {pixel_range}")


def _check_radius(eps: float | Tensor) -> None:
    if not isinstance(eps, Tensor | Real):
        raise ValueError(f"eps must be a number such as 8 / 255 or a tensor, got {eps!r}")
    if isinstance(eps, Tensor) and eps.dim() > 1:
        raise ValueError(f"eps must be one number or one per example [B], got shape {tuple(eps.shape)}")
    valid = bool(((eps >= 0) & (eps < math.inf)).all()) if isinstance(eps, Tensor) else 0 <= eps < math.inf
    if not valid:
        raise ValueError(f"eps must be finite and not negative, got {eps}")


def _highest(eps: float | Tensor) -> float:
    if isinstance(eps, Tensor):
        return float(eps.max()) if eps.numel() else 0.0
    return float(eps)


def _refuse_radius(eps: float, pixel_range: tuple[float, float]) -> None:
    low, high = pixel_range
    hint = f"; did you mean {eps:g}/255?" if eps <= 255 * (high - low) else ""
    raise ValueError(f"eps={eps:g} leaves the pixel range [{low:g}, {high:g}]{hint}")


def euclidean_norm(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The l2 norm over `dims`, also of entries whose squares are below the dtype's smallest number, or above its
    largest; differentiable.
    """
    norm, info = torch.linalg.vector_norm(a, dim=dims), torch.finfo(a.dtype)
    # Above, lost squares are below the rounding of the others. The scaled form takes 20 times as long.
    if not ((norm < info.tiny**0.5 / info.eps) | norm.isinf()).any():
        return norm
    size = a.detach().abs().amax(dims, keepdim=True).clamp(info.tiny, info.max)
    return torch.linalg.vector_norm(a / size, dim=dims) * size.squeeze(dims)


def _per_example(step: float | Tensor, x: Tensor) -> float | Tensor:
    if isinstance(step, Tensor) and step.dim():
        return step.to(x).view((-1,) + (1,) * (x.dim() - 1))
    return step


def _l2(delta: Tensor) -> Tensor:
    # Summed in float64: squares of gradients below 1e-19 vanish in float32.
    return torch.linalg.vector_norm(delta, dim=tuple(range(1, delta.dim())), keepdim=True, dtype=torch.float64)


def _directions(rounding: Rounding) -> tuple[Direction, Direction]:
    """How to round (lower, upper) limits."""
    return ("up", "down") if rounding == "inward" else ("down", "up")


@functools.lru_cache(maxsize=64)
def _limits(pixel_range: tuple[float, float], dtype: torch.dtype, rounding: Rounding) -> tuple[float, float]:
    up, down = _directions(rounding)
    return _rounded_number(pixel_range[0], dtype, up), _rounded_number(pixel_range[1], dtype, down)


def _rounded_number(value: float, dtype: torch.dtype, direction: Direction) -> float:
    near = torch.tensor(value, dtype=dtype)
    if direction == "up":
        return (torch.nextafter(near, _scalar(math.inf, near)) if near.item() < value else near).item()
    return (torch.nextafter(near, _scalar(-math.inf, near)) if near.item() > value else near).item()


def _rounded_sum(wide: Tensor, shift: Tensor, dtype: torch.dtype, direction: Direction) -> Tensor:
    """wide + shift rounded up or down to `dtype`; `wide` is float64 and holds values of that dtype.

    Rounded to the nearest first, and moved by one unit where that lies on the wrong side of the true sum. Which side
    it lies on shows in either of two differences: rounding is monotone, so neither can point to the wrong side, and
    one of them shows every error. (For float64 one difference is exact, as in Dekker's sum. For float32 an error
    that both hide would be less than half a float64 unit of `shift` while being a multiple of one, unless the sum
    all but cancels, and then it is a float32 number and there is no error.)
    """
    near = (wide + shift).to(dtype)
    back = near.double()
    if direction == "up":
        wrong = (back - wide < shift).logical_or_(back - shift < wide)
        return torch.where(wrong, torch.nextafter(near, _scalar(math.inf, near)), near)
    wrong = (back - wide > shift).logical_or_(back - shift > wide)
    return torch.where(wrong, torch.nextafter(near, _scalar(-math.inf, near)), near)


def _scalar(value: float, like: Tensor) -> Tensor:
    # A fill on the device: a tensor built from a Python number would be copied there, and the copy waited for.
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _simplex_with_caps(a: Tensor, caps: Tensor, radius: Tensor) -> Tensor:
    """Nearest point of {z : 0 <= z <= caps, sum z <= radius} to a >= 0.

    Args:
        a, caps: float64 [B, d], not negative; caps may be infinite.
        radius: float64 [B].

    The solution is z = clamp(a - t, 0, caps) for the smallest t >= 0 at which the sum is at most the radius. That sum
    is piecewise linear in t: pixel i starts to fall at t = a_i - caps_i and is used up at t = a_i. Sorting these
    2 d points and accumulating the slopes gives the sum at each; the last one above the radius starts the piece in
    which t lies.
    """
    start = (a - caps).clamp_(min=0.0)
    points, order = torch.cat([start, a], dim=1).sort(dim=1)
    turns = torch.cat([torch.ones_like(a), -torch.ones_like(a)], dim=1).gather(1, order)
    slopes = turns.cumsum(1)
    falls = (points[:, 1:] - points[:, :-1]) * slopes[:, :-1]
    whole = torch.minimum(a, caps).sum(dim=1, keepdim=True)
    sums = torch.cat([whole, whole - falls.cumsum(1)], dim=1)
    excess = sums - radius[:, None]
    piece = ((excess > 0).sum(dim=1, keepdim=True) - 1).clamp_(min=0)
    slope = slopes.gather(1, piece).clamp_(min=1.0)
    t = points.gather(1, piece) + excess.gather(1, piece).clamp_(min=0.0) / slope
    t = torch.where(whole > radius[:, None], t, torch.zeros_like(t))
    z = torch.minimum((a - t).clamp_(min=0.0), caps)
    # The accumulated sums carry rounding errors of the size of sum a, which may dwarf the radius.
    total = z.sum(dim=1, keepdim=True).clamp_(min=torch.finfo(z.dtype).tiny)
    return z * (radius[:, None] / total).clamp_(max=1.0)
