"""What a command would do: what it was asked for in full, and the time and memory that a few steps of it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks.attack import ATTACKS
from attacks.threat import Ball
from certify.op import UnsupportedOp
from certify.tracing import CaptureError
from certify.verifier import VERIFIERS
from robust import memory
from robust.checkpoint import Checkpoint
from robust.dataset import DataSet
from robust.evaluate import BLOCK, describe, evaluate
from robust.images import Images
from robust.memory import readable
from robust.page import duration
from robust.plots import NORMS, radius
from robust.settings import Settings
from robust.trainer import rehearse

STEPS = 5
"""Optimiser steps that are timed for an estimate."""

DECIDED = 3
"""Images that are decided for an estimate."""

COUNTED = 2
"""Images on which unstable neurons are counted, for an estimate of memory."""


def dry_train(settings: Settings, out: Path, root: Path | None, device: str) -> dict[str, Any]:
    """Print and return what `robust train` would do; nothing is written."""
    trial = rehearse(settings, root, torch.device(device), STEPS)
    seconds = trial.seconds_per_step * trial.steps_per_epoch * settings.epochs
    facts: dict[str, Any] = {
        "settings": settings.to_dict(),
        "out": str(out),
        "device": device,
        "training_images": trial.images,
        "parameters": trial.parameters,
        "steps": trial.steps_per_epoch * settings.epochs,
        "seconds_per_step": trial.seconds_per_step,
        "seconds": seconds,
        "memory": _peak(device),
        "free_memory": memory.free_bytes(device),
    }
    for name, value in facts["settings"].items():
        print(f"  {name} = {value!r}")
    print(f"model: {settings.model}, {trial.parameters:,} parameters; {trial.images:,} training images")
    print(
        f"time: about {duration(seconds)} for {facts['steps']:,} steps of {duration(trial.seconds_per_step)}, measured"
    )
    print(f"      on {STEPS} steps spread over the run on {device}; validation comes on top")
    _print_memory(facts)
    print(f"it would write to {out}; nothing was written")
    return facts


def dry_judgement(
    checkpoint: Checkpoint,
    data: DataSet,
    ball: Ball,
    verifier: Any,
    attack: Any,
    out: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Print and return what `robust certify` or `robust attack` would do; nothing is written.

    Args:
        options: `split`, `limit`, `batch_size` and `device` of the command.
    """
    images = len(getattr(data, options["split"]))
    count = min(options["limit"] or images, images)
    batch = min(options["batch_size"] or getattr(verifier, "block", BLOCK), count)
    few = {"split": options["split"], "device": options["device"]}
    evaluate(checkpoint, data, ball, verifier, attack, limit=1, **few)  # to warm up
    timed = range(max(0, count - DECIDED), count)
    started = time.perf_counter()
    evaluate(checkpoint, data, ball, verifier, attack, indices=timed, **few)
    each = (time.perf_counter() - started) / len(timed)
    facts: dict[str, Any] = {
        "model": checkpoint.settings["model"],
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "data": data.name,
        "images": count,
        "norm": ball.norm,
        "eps": float(ball.eps),
        "verifier": describe(VERIFIERS, verifier),
        "attack": describe(ATTACKS, attack),
        "device": options["device"],
        "batch_size": batch,
        "out": str(out),
        "seconds": each * count,
        "memory": _peak(options["device"]),
        "free_memory": memory.free_bytes(options["device"]),
    }
    print(f"model: {facts['model']}, {facts['parameters']:,} parameters")
    print(f"images: {count:,} of {data.name}, part {options['split']}, {batch} at a time")
    print(f"ball: {NORMS.get(ball.norm, ball.norm)}, eps {radius(float(ball.eps))} in pixel units")
    print(f"method: {facts['verifier'] or facts['attack']} on {options['device']}")
    timeout = getattr(verifier, "timeout", None)
    limit = f"; its timeout allows {duration(timeout * count)} at most" if timeout else ""
    print(f"time: about {duration(each * count)}, measured on {len(timed)} of the images{limit}")
    note = memory_advice(checkpoint.model, getattr(data, options["split"]), ball, batch, verifier, options["device"])
    facts["advice"] = note
    _print_memory(facts)
    if note is not None:
        print(f"memory: {note}")
    print(f"it would write to {out}; nothing was written")
    return facts


def memory_advice(model: nn.Module, images: Images, ball: Ball, batch: int, verifier: Any, device: str) -> str | None:
    """What to do where the verifier's bounds would not fit; None where they do, or where nothing can be estimated."""
    if verifier is None:
        return None
    x, _ = images.batch(torch.arange(min(COUNTED, len(images))), device)
    try:
        return memory.note(model.to(device).eval(), x, ball, batch, verifier, memory.free_bytes(device))
    except (CaptureError, UnsupportedOp):
        return None  # verifiers that need no bounds take such a model, the others say what they cannot do


def _print_memory(facts: Mapping[str, Any]) -> None:
    print(f"memory: {readable(facts['memory'])} at the most so far, {readable(facts['free_memory'])} are free")


def _peak(device: str) -> int:
    """Most bytes in use so far: of tensors on a GPU, of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
