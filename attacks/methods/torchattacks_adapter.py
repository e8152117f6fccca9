"""The attacks of the torchattacks package, made to keep the promises of ours."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attacks.attack import ATTACKS
from attacks.foreign import Pixels, moved_inside, option_of, private_noise
from attacks.gradient import Precision, forward
from attacks.losses import misclassified, strongest_targets
from attacks.mode import Mode, Model, attack_mode
from attacks.threat import Ball

NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}

# What the package's AutoAttack and MultiAttack and LGV would need is not to be had from a model and a radius alone.
REFUSED = {
    "AutoAttack": "runs APGD and FAB for 10 instead of 100 steps; use autoattack",
    "MultiAttack": "is made of other attacks",
    "LGV": "trains models on data of its own",
}

# Steps of the papers, where the package's default is 10.
PUBLISHED_STEPS = {"APGD": 100, "APGDT": 100, "FAB": 100}


@ATTACKS.register("torchattacks")
@dataclass(frozen=True)
class Torchattacks:
    """Any attack of the torchattacks package (extra [torchattacks]) by its name there.

    Needs: what that attack needs. Returns: its points, those outside the ball moved inside; examples that the model
    gets wrong anyway keep their clean input. Neither sound nor complete. For transfer and unusual attacks; pgd, apgd,
    fab, square, autoattack, carlini_wagner and deepfool here are stronger than the package's.

    Args:
        name: class name in the package: MIFGSM, VMIFGSM, OnePixel, ...
        options: its other parameters, spelled options=steps=20+decay=0.5. The radius (`eps`, `max_epsilon`), the norm,
            the number of classes and the seed come from the call. `alpha` keeps the package's ratio to eps unless
            given, and APGD and FAB take 100 steps as in their papers.
        targeted: aim at the wrong class with the largest logit; most of the package's attacks cannot.
        mode, precision, seed: see PGD. The noise of an example depends on its batch, whatever the call's `index`.

    Source: Kim (2020), "Torchattacks".
    """

    name: str
    options: tuple[str, ...] = ()
    targeted: bool = False
    mode: Mode = "eval"
    precision: Precision = "float32"
    seed: int = 0

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms of the balls that the attack can search; all for an attack without a radius."""
        parameters = _parameters(self.name)
        if "norm" in parameters:
            return ("linf", "l2", "l1") if self.name == "FAB" else ("linf", "l2")
        if "eps" not in parameters and "max_epsilon" not in parameters:
            return ("linf", "l2", "l1")
        return ("l2",) if "L2" in self.name else ("linf",)

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
        if ball.norm not in self.norms:
            raise ValueError(f"torchattacks' {self.name} searches {', '.join(self.norms)}, and the ball is {ball.norm}")
        if ball.pixel_range != (0.0, 1.0):
            raise ValueError(f"torchattacks needs pixels in [0, 1], and the ball's range is {ball.pixel_range}")
        seed = self.seed if generator is None else int(torch.randint(2**31, (1,), generator=generator))
        points = x.detach().clone()
        with attack_mode(model, self.mode), private_noise(seed, x.device):
            with torch.no_grad():
                clean = forward(model, x, self.precision)
            targets = strongest_targets(clean, y, 1).squeeze(1)
            # One radius at a time: the package's attacks take a number.
            left = ~misclassified(clean, y)
            eps = ball.eps_of(x).flatten()
            for radius in eps[left].unique().tolist():
                rows = (left & (eps == radius)).nonzero().squeeze(1)
                attack = self._made(Pixels(model, x, self.precision), clean.shape[1], ball.norm, radius)
                with torch.enable_grad():
                    found = attack(points[rows], targets[rows] if self.targeted else y[rows]).detach().to(x)
                found = torch.where(found.isfinite(), found, points[rows])
                points[rows] = moved_inside(found, points[rows], ball.select(rows))
        return points

    def _made(self, model: nn.Module, classes: int, norm: str, eps: float) -> Any:
        """The package's attack, with every parameter that matters set by us."""
        parameters = _parameters(self.name)
        given = dict(option_of(text, f"torchattacks' {self.name}", parameters) for text in self.options)
        known = {"eps": eps, "max_epsilon": eps, "norm": NORM_NAMES[norm], "n_classes": classes, "seed": self.seed}
        if self.name in PUBLISHED_STEPS:
            known["steps"] = PUBLISHED_STEPS[self.name]
        if {"eps", "alpha"} <= set(parameters):
            known["alpha"] = eps * parameters["alpha"].default / parameters["eps"].default
        arguments = {name: value for name, value in {**known, **given}.items() if name in parameters}
        attack = getattr(_package(), self.name)(model, **arguments)
        if self.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        return attack


def _package() -> Any:
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise ValueError(
            f"the attack torchattacks needs that package ({error}): pip install --no-deps torchattacks==3.5.1 "
            "(without --no-deps it replaces requests by a release of 2021)"
        ) from None


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """Parameters of the package's attack, by name; ValueError lists the attacks where it is none."""
    package = _package()
    entries = {
        key: value
        for key, value in vars(package).items()
        if inspect.isclass(value) and hasattr(value, "set_mode_default") and key not in REFUSED
    }
    if name in REFUSED:
        raise ValueError(f"torchattacks' {name} {REFUSED[name]}")
    if name not in entries:
        raise ValueError(f"torchattacks has no attack named {name!r}; known: {', '.join(sorted(entries))}")
    parameters = dict(inspect.signature(entries[name].__init__).parameters)
    return {key: parameters[key] for key in parameters if key not in ("self", "model")}
