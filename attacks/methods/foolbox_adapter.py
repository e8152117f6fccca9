"""The attacks of the Foolbox package, made to keep the promises of ours."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks.attack import ATTACKS
from attacks.foreign import Pixels, moved_inside, option_of, private_noise
from attacks.gradient import Precision, forward
from attacks.losses import misclassified
from attacks.mode import Mode, Model, attack_mode
from attacks.threat import Ball

NORMS = {math.inf: "linf", 2: "l2", 1: "l1"}


@ATTACKS.register("foolbox")
@dataclass(frozen=True)
class Foolbox:
    """Any attack of the Foolbox package that has a norm (extra [foolbox]) by its name there.

    Needs: what that attack needs. Returns: its points, those outside the ball moved inside; examples that the model
    gets wrong anyway keep their clean input. Neither sound nor complete. For attacks that the suite lacks: decision-
    based ones (HopSkipJump, Brendel-Bethge), noise, DDN, FMN, EAD.

    Args:
        name: class name in the package without "Attack": LinfProjectedGradientDescent, DDN, L2FMN, ...
        options: its parameters, spelled options=steps=20+rel_stepsize=0.1; the radius comes from the call.
        mode, precision, seed: see PGD. The noise of an example depends on its batch, whatever the call's `index`.

    Source: Rauber et al. (2020), "Foolbox Native".
    """

    name: str
    options: tuple[str, ...] = ()
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    @property
    def norms(self) -> tuple[str, ...]:
        """The one norm in which the attack measures."""
        return (NORMS[self._made().distance.p],)

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
        attack = self._made()
        if ball.norm not in self.norms:
            raise ValueError(f"foolbox's {self.name} searches {self.norms[0]}, and the ball is {ball.norm}")
        if ball.pixel_range is None:
            raise ValueError("foolbox needs a range of pixels, and the ball has none")
        seed = self.seed if generator is None else int(torch.randint(2**31, (1,), generator=generator))
        points = x.detach().clone()
        with attack_mode(model, self.mode), private_noise(seed, x.device):
            with torch.no_grad():
                left = ~misclassified(forward(model, x, self.precision), y)
            pixels = Pixels(model, x, self.precision).eval()
            wrapped = _package().PyTorchModel(pixels, bounds=ball.pixel_range, device=x.device)
            # One radius at a time: the package's attacks take a number.
            eps = ball.eps_of(x).flatten()
            for radius in eps[left].unique().tolist():
                rows = (left & (eps == radius)).nonzero().squeeze(1)
                with torch.enable_grad():
                    _, found, _ = attack(wrapped, points[rows], y[rows], epsilons=radius)
                found = found.detach().to(x)
                found = torch.where(found.isfinite(), found, points[rows])
                points[rows] = moved_inside(found, points[rows], ball.select(rows))
        return points

    def _made(self) -> Any:
        """The package's attack; ValueError where it is none, or has no norm."""
        entry = getattr(_package().attacks, f"{self.name}Attack", None)
        if not inspect.isclass(entry):
            known = sorted(name.removesuffix("Attack") for name in dir(_package().attacks) if name.endswith("Attack"))
            raise ValueError(f"foolbox has no attack named {self.name!r}; known: {', '.join(filter(None, known))}")
        parameters = {key: p for key, p in inspect.signature(entry.__init__).parameters.items() if key != "self"}
        options = dict(option_of(text, f"foolbox's {self.name}", parameters) for text in self.options)
        try:
            attack = entry(**options)
        except TypeError as error:
            raise ValueError(
                f"foolbox's {self.name} cannot be made of a radius and its options alone: {error}"
            ) from None
        try:
            norm = getattr(getattr(attack, "distance", None), "p", None)
        except ValueError:  # attacks of several norms, which then need one given as an object
            norm = None
        if norm not in NORMS:
            raise ValueError(f"foolbox's {self.name} has no norm of {', '.join(NORMS.values())} that it measures in")
        return attack


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the package imports is deprecated in parts
            return importlib.import_module("foolbox")
    except ImportError as error:
        raise ValueError(
            f"the attack foolbox needs that package ({error}): pip install 'robust-suite[foolbox]'"
        ) from None
