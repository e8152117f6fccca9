"""Settings of a training run: one frozen value that the command line, a recipe file and a checkpoint all give."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

from attacks.registry import number
from attacks.threat import Ball, make_ball
from robust.objective import defaults_of


class SettingsError(ValueError):
    """A setting that does not exist or has an impossible value."""


@dataclass(frozen=True)
class Settings:
    """What a training run does; every method is its text (`robust methods` lists them)."""

    data: str = "digits"
    """Data set: digits, mnist, cifar10, npz:FILE, folder:DIR ..."""
    model: str = "cnn5"
    """Architecture, or your own network as FILE.py:NAME, which is run."""
    objective: str = "mtl_ibp"
    """Training loss."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the threat model."""
    eps: float = 0.1
    """Radius that the model is meant for, in pixel units before normalisation; 8/255 may be written."""
    train_eps_factor: float = 1.0
    """Training radius as a multiple of eps (MNIST 0.1 is trained at 0.2)."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images per optimiser step."""
    micro_batch: int = 0
    """Images that are attacked and bounded at a time, for less memory; BatchNorm statistics stay the whole batch's,
    but terms that are no means of examples (exp_ibp, taps, staps, sovr, the regulariser shi) are taken of each part.
    0 is the whole batch."""
    optimizer: str = "adam:lr=0.0005"
    """Optimiser."""
    lr_schedule: str = "constant"
    """Factor on the learning rate."""
    eps_schedule: str = "auto"
    """Factor on the radius; auto is the objective's: smooth:start=0,end=10 for certified training, else constant."""
    regularizers: tuple[str, ...] = ()
    """Terms on top of the objective, such as shi:weight=0.5 and l1:weight=1e-6."""
    weightings: tuple[str, ...] = ()
    """Weights on the objective's terms, per example or per class, such as dafa:warmup_epochs=70."""
    weight_perturbation: str = "none"
    """Perturbed weights at which the gradient is taken, such as awp:gamma=0.005; none for none."""
    hooks: tuple[str, ...] = ()
    """Things done on the way, such as precise_bn, ema:decay=0.999 and swa:start_epoch=65."""
    init: Literal["default", "ibp", "kaiming_normal", "as_built"] = "default"
    """Starting weights; as_built keeps those that your own network comes with."""
    clip_norm: float = -1.0
    """Largest norm of a step's gradient; 0 for no clipping, -1 for the objective's: 10 for certified training, else 0.
    """
    augment: bool = True
    """Whether the data set's augmentation is used."""
    validation: float = 0.1
    """Share of the training images held out to measure progress and to select a checkpoint; 0 for none."""
    validate_every: int = 1
    """Epochs between validations."""
    validator: str = "auto"
    """Verifier or attack that judges the validation images; auto is the objective's: ibp for certified training, else
    a short pgd."""
    select: Literal["last", "best"] = "last"
    """Weights that are kept: the last epoch's, or those of the best certified accuracy (accuracy under the validator's
    attack) on the validation images among epochs at the full radius; last.safetensors then holds the last ones."""
    seed: int = 0
    """Seed of initial weights, data order, augmentation and attacks."""

    def __post_init__(self) -> None:
        self._fill_in()
        self.ball()
        for name in ("epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: expected at least 1")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"seed={self.seed}: expected a number of 64 bits, at most {2**63 - 1}")
        if not 0 <= self.validation < 1:
            raise SettingsError(f"validation={self.validation}: expected a share in [0, 1)")
        if self.train_eps_factor <= 0:
            raise SettingsError(f"train_eps_factor={self.train_eps_factor}: expected a positive factor")
        if self.select == "best" and self.validation == 0:
            raise SettingsError("select='best' needs validation images; set validation above 0")
        if not self.clip_norm >= 0:
            raise SettingsError(
                f"clip_norm={self.clip_norm}: expected a positive norm, 0 for none or -1 for the default"
            )
        if not 0 <= self.micro_batch <= self.batch_size:
            raise SettingsError(f"micro_batch={self.micro_batch}: expected 0 to batch_size={self.batch_size}")

    def _fill_in(self) -> None:
        """Replace what is left open by the objective's defaults, so that a record of the run names them."""
        open_ones = {"eps_schedule": "auto", "clip_norm": -1.0, "validator": "auto"}
        for name, value in open_ones.items():
            if getattr(self, name) == value:
                object.__setattr__(self, name, getattr(defaults_of(self.objective), name))

    def ball(self) -> Ball:
        """Threat model of evaluation."""
        return make_ball(self.norm, self.eps)

    def train_ball(self) -> Ball:
        """Threat model of training at the full radius."""
        return make_ball(
            self.norm,
            min(self.eps * self.train_eps_factor, 1.0) if self.norm == "linf" else self.eps * self.train_eps_factor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name; `from_dict` gives the same settings back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Settings from plain values; absent ones keep their default.

        Raises:
            SettingsError: an unknown name (with the nearest known one), or a value of the wrong type.
        """
        hints = get_type_hints(cls)
        chosen = {}
        for name, value in values.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise SettingsError(f"no setting {name!r}{hint}; settings: {', '.join(hints)}")
            chosen[name] = _checked(name, value, hints[name])
        return cls(**chosen)


@dataclass(frozen=True)
class Published:
    """A row of a paper's table that a recipe stands for; accuracies in percent, None where none is published.

    `attack` is what the accuracy `adversarial` was measured with.
    """

    clean: float | None
    certified: float | None
    source: str
    adversarial: float | None = None
    attack: str = ""


@dataclass(frozen=True)
class Recipe:
    """Named settings, with the published result that they aim at (None for our own small recipes)."""

    name: str
    title: str
    settings: Settings
    published: Published | None
    note: str = ""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the suite."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Recipe by name, or from the path of a TOML file.

    Raises:
        SettingsError: no such recipe or file, invalid TOML, unknown keys.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise SettingsError(f"no recipe file at {path.resolve()}")
        return parse_recipe(path.stem, path.read_text(encoding="utf-8"))
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4)
        raise SettingsError(f"no recipe {name!r}; near: {', '.join(near) or 'none'} (`robust recipes` lists all)")
    return parse_recipe(name, (_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def parse_recipe(name: str, text: str) -> Recipe:
    """Recipe from TOML: `title`, optional `note`, table [settings], optional table [published]."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"recipe {name}: {error}") from None
    unknown = set(content) - {"title", "note", "settings", "published"}
    if unknown:
        raise SettingsError(
            f"recipe {name}: unknown key {sorted(unknown)[0]!r}; expected title, note, settings, published"
        )
    published = content.get("published")
    try:
        row = None if published is None else Published(**{"clean": None, "certified": None, **published})
        settings = Settings.from_dict(content.get("settings", {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"recipe {name}: {error}") from None
    return Recipe(name, content.get("title", name), settings, row, content.get("note", ""))


def _folder() -> Any:
    return resources.files("robust") / "recipes"


def _checked(name: str, value: Any, hint: Any) -> Any:
    if hint is float:
        if isinstance(value, str):
            try:
                return number(value)
            except ValueError as error:
                raise SettingsError(f"{name}: {error}") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise SettingsError(f"{name}: expected a number, got {value!r}")
    if hint in (int, bool, str):
        if type(value) is not hint:
            raise SettingsError(f"{name}: expected {hint.__name__}, got {value!r}")
        return value
    if hint == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{name}: expected a list of texts, got {value!r}")
        return tuple(value)
    choices = hint.__args__
    if value not in choices:
        raise SettingsError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value
