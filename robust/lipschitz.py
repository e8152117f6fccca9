"""Local Lipschitz constants of a classifier over a data set: one row per example, a summary and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.threat import Ball
from certify.lipschitz.local import local_lipschitz
from certify.spec import margin_spec
from certify.verdict import evaluation, logits_of
from robust import lipschitz_plots, plots
from robust.checkpoint import ball_facts
from robust.files import JsonLines, encode, read_json_lines, write_whole
from robust.images import Images
from robust.page import NORM_WORDS

LIPSCHITZ_FOLDER = "lipschitz"
ROWS_FILE = "lipschitz.jsonl"
EPS_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        method, options: of `certify.local_lipschitz`.
        margins: constants of the margins z_y - z_t of the label, and the radius that they certify; else of the logits.
        curve: examples whose constants over smaller balls are measured, too; 0 for none.
    """

    method: str = "crown"
    options: tuple[tuple[str, Any], ...] = ()
    margins: bool = False
    curve: int = 20
    batch_size: int = 10

    def facts(self) -> dict[str, Any]:
        """JSON form of what the rows depend on."""
        return {"method": self.method, "options": dict(self.options), "margins": self.margins}


@dataclass(frozen=True)
class Constants:
    """Local Lipschitz constants that `measure` wrote: an upper bound and an attained value per example.

    Attributes:
        words: of what, over which ball and by which method.
    """

    upper: tuple[float, ...]
    attained: tuple[float, ...]
    words: str

    @classmethod
    def load(cls, folder: Path, report: Mapping[str, Any]) -> Constants | None:
        """Those in `folder`; None where there are none of the network that the header of a report names.

        Raises:
            ValueError: the file is none of `measure`.
        """
        path = folder / ROWS_FILE
        if not path.exists():
            return None
        header, *rows = read_json_lines(path) or [{}]
        if not rows or any(header.get(name) != report.get(name) for name in ("checkpoint", "code")):
            return None
        try:
            what = "margins" if header["margins"] else "logits"
            ball = f"{NORM_WORDS[header['ball']['norm']]}, ε = {plots.radius(header['ball']['eps'])}"
            words = f"of the {what} around {len(rows)} images ({ball}, method {header['method']})"
            return cls(tuple(row["constant"] for row in rows), tuple(row["attained"] for row in rows), words)
        except KeyError as error:
            raise ValueError(f"{path}: no file of `robust lipschitz`, {error} is missing; remove it") from None


def measure(
    model: nn.Module,
    images: Images,
    ball: Ball,
    plan: Plan,
    out: Path,
    *,
    source: Mapping[str, Any],
    classes: Sequence[str],
    limit: int | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """The summary; rows, summary and pictures are written to `out`. Rows that are there already are not measured again.

    Args:
        source: what else the rows depend on (`model_facts`, `data_facts`), kept in the file's first line.

    Raises:
        ValueError: `out` holds rows of another measurement.
    """
    count = len(images) if limit is None else min(limit, len(images))
    header = {"kind": "header", **source, "ball": ball_facts(ball), **plan.facts()}
    with JsonLines(out / ROWS_FILE) as rows, evaluation(model):
        if not rows.records:
            rows.append([header])
        elif rows.records[0] != header:
            there = rows.records[0]
            other = [name for name in {**there, **header} if there.get(name) != header.get(name)]
            words = ", ".join(f"{name} is {there.get(name)!r} there and {header.get(name)!r} now" for name in other)
            raise ValueError(f"{out / ROWS_FILE} holds another measurement ({words}); give another --out")
        done = len(rows.records) - 1
        with tqdm(total=count, initial=done, disable=not progress, unit="example", dynamic_ncols=True) as bar:
            for begin in range(done, count, plan.batch_size):
                index = torch.arange(begin, min(begin + plan.batch_size, count))
                rows.append(_rows(model, images, index, ball, plan, device))
                bar.update(len(index))
        found = rows.records[1 : count + 1]
        curve = _over_eps(model, images, min(plan.curve, count), ball, plan, device)
    summary = {**header, "kind": "summary", **_summary(found), "over_eps": curve}
    write_whole(out / "lipschitz_summary.json", encode(summary) + "\n")
    _draw(out, found, curve, classes)
    return summary


def _rows(model: nn.Module, images: Images, index: Tensor, ball: Ball, plan: Plan, device: str) -> list[dict[str, Any]]:
    x, y = images.batch(index, device)
    logits = logits_of(model, x).double()
    spec = margin_spec(y, logits.shape[1], torch.float64) if plan.margins else None
    found = local_lipschitz(model, x, ball, plan.method, spec, **dict(plan.options))
    rows = []
    for place, i in enumerate(index.tolist()):
        ub, lb = found.ub[place], found.lb[place]
        row = {"kind": "example", "index": i, "label": int(y[place]), "prediction": int(logits[place].argmax())}
        row |= {"constant": float(ub.max()), "attained": float(lb.max()), "ub": ub.tolist(), "lb": lb.tolist()}
        if spec is not None:
            margins = spec[place] @ logits[place]
            # A margin that its rounding might make up certifies nothing.
            safe = margins - 1e-6 * logits[place].abs().max()
            radius = float(torch.where(ub > 0, safe / ub.clamp(min=1e-300), math.inf).min())
            row["radius"] = min(max(radius, 0.0), float(ball.eps)) if bool((safe > 0).all()) else 0.0
        rows.append(row | {"seconds": found.seconds / len(index)})
    return rows


def _over_eps(
    model: nn.Module, images: Images, count: int, ball: Ball, plan: Plan, device: str
) -> dict[str, list[float]]:
    """Means of the examples' greatest bounds over growing balls."""
    curve: dict[str, list[float]] = {"eps": [], "constant": [], "attained": []}
    if not count:
        return curve
    x, y = images.batch(torch.arange(count), device)
    classes = logits_of(model, x[:1]).shape[1]
    spec = margin_spec(y, classes, torch.float64) if plan.margins else None
    for factor in EPS_FACTORS:
        found = local_lipschitz(model, x, ball.scaled(factor), plan.method, spec, **dict(plan.options))
        curve["eps"].append(factor * float(ball.eps))
        curve["constant"].append(float(found.ub.amax(1).mean()))
        curve["attained"].append(float(found.lb.amax(1).mean()))
    return curve


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    constants = torch.tensor([row["constant"] for row in rows], dtype=torch.float64)
    attained = torch.tensor([row["attained"] for row in rows], dtype=torch.float64)
    summary = {
        "examples": len(rows),
        "constant": {
            "mean": float(constants.mean()),
            "median": float(constants.median()),
            "max": float(constants.max()),
        },
        "attained": {"mean": float(attained.mean()), "median": float(attained.median()), "max": float(attained.max())},
        "seconds": sum(row["seconds"] for row in rows),
    }
    if "radius" in rows[0]:
        radii = torch.tensor([row["radius"] for row in rows], dtype=torch.float64)
        summary["radius"] = {"mean": float(radii.mean()), "median": float(radii.median())}
    return summary


def _draw(
    out: Path, rows: Sequence[Mapping[str, Any]], curve: Mapping[str, list[float]], classes: Sequence[str]
) -> None:
    constants, attained = ([row[name] for row in rows] for name in ("constant", "attained"))
    histogram = lipschitz_plots.constants_histogram({"upper bound": constants, "attained": attained})
    plots.save(histogram, out / "lipschitz_histogram.png")
    per_class = lipschitz_plots.constants_per_class(constants, attained, [row["label"] for row in rows], classes)
    plots.save(per_class, out / "lipschitz_per_class.png")
    if curve["eps"]:
        over_eps = lipschitz_plots.constants_over_eps(curve["eps"], {"mean": (curve["constant"], curve["attained"])})
        plots.save(over_eps, out / "lipschitz_over_eps.png")
