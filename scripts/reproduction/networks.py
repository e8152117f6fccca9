"""Published networks that are verified as they are: where they lie, and their images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from attacks.threat import LinfBall
from robust.dataset import DataSet
from robust.images import MemoryImages
from tests.golden.networks import LayerList, reference_folder

FILES = ("network.json", "weights.npz", "inputs.npz")


def default_folder() -> Path:
    """`golden` in $ROBUST_REFERENCE, or in shared/reference beside the checkout."""
    return reference_folder() / "golden"


def missing_network(folder: Path, name: str) -> str:
    """Why the network cannot be verified, in words; "" where its files are there."""
    lacking = [file for file in FILES if not (folder / name / file).is_file()]
    return f"there is no {folder / name / lacking[0]}; give --networks or set ROBUST_REFERENCE" if lacking else ""


def network_images(folder: Path, name: str) -> int:
    """How many images come with the network."""
    with np.load(folder / name / "inputs.npz") as inputs:
        return len(inputs["labels"])


def load_network(folder: Path, name: str) -> tuple[LayerList, DataSet, LinfBall]:
    """Network, its images as the test part of a data set, and its threat model.

    Raises:
        ValueError: the images do not share one radius.
    """
    description = json.loads((folder / name / "network.json").read_text(encoding="utf-8"))
    with np.load(folder / name / "weights.npz") as weights, np.load(folder / name / "inputs.npz") as inputs:
        model = LayerList(description, dict(weights)).eval()
        images = MemoryImages(torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["labels"].astype(np.int64)))
        radii = {float(eps) for eps in inputs["eps"]}
    if len(radii) != 1:
        raise ValueError(f"{folder / name}: expected one radius for all images, got {len(radii)}")
    shape = tuple(images.pixels.shape[1:])
    nothing = images.subset(torch.empty(0, dtype=torch.int64))
    classes = tuple(map(str, range(10)))
    identity = (0.0,) * shape[0], (1.0,) * shape[0]
    data = DataSet(f"images of {name}", nothing, images, classes, *identity, None, (shape[0], shape[1], shape[2]))
    return model, data, LinfBall(radii.pop())


def stored_verdicts(folder: Path, name: str, limit: int) -> str:
    """What alpha-beta-CROWN decided on the same images on one CPU core, in words; "" where it is not stored."""
    path = folder / name / "results.json"
    if not path.is_file():
        return ""
    records = json.loads(path.read_text(encoding="utf-8"))["records"][: limit or None]
    stored = [record.get("alpha_beta_crown_init_crown") or record.get("alpha_beta_crown") for record in records]
    if not stored or None in stored:
        return ""
    counts = {word: sum(s["verdict"] == word for s in stored) for word in ("verified", "falsified", "unknown")}
    verdicts = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"alpha-beta-CROWN on the same {len(stored)} images, one core, 20 s each: {verdicts}"
