"""`robust doctor`: what is installed and found here, and whether bounds, attacks and verdicts can be trusted here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from attacks.attack import ATTACKS
from attacks.threat import LinfBall
from certify.bounds.bound import bound
from certify.spec import margin_spec
from certify.verifier import VERIFIERS
from robust.dataset import DATASETS, MissingData, data_root, parse_dataset
from robust.memory import free_bytes, readable
from robust.versions import versions

Outcome = Literal["ok", "absent", "FAILED"]

EXTRAS = {
    "onnx": "robust vnnlib: pip install '.[onnx]'",
    "onnxruntime": "robust vnnlib: pip install '.[onnx]'",
    "tensorboard": "robust train --tensorboard: pip install '.[tensorboard]'",
    "torchattacks": "--attack torchattacks: pip install '.[torchattacks]'",
}
"""Packages that the suite works without, and what they are for."""

METHODS = ("ibp", "crown_ibp", "crown", "alpha_crown")
SAMPLES = 2000
ROUNDING = 1e-5
"""How far a float32 forward pass may be beyond a bound that holds for real numbers, relative to the logits."""
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: "ok", "absent" (the suite works without it) or "FAILED"."""

    topic: str
    name: str
    outcome: Outcome
    words: str


def examine(root: Path | None = None) -> Iterator[Finding]:
    """All findings, one after the other; a check that raises is a finding, too."""
    yield from _software()
    yield from _devices()
    yield from _data(data_root(root))
    yield from _folders(data_root(root))
    for name, check in SELF_TESTS.items():
        yield _tested(name, check)


def _software() -> Iterator[Finding]:
    for name, version in versions().items():
        yield Finding("software", name, "ok", version)
    try:
        importlib.import_module("torchvision.datasets")
        yield Finding("software", "torchvision", "ok", importlib.metadata.version("torchvision"))
    except (ImportError, RuntimeError, OSError) as error:
        words = f"cannot be imported beside torch {torch.__version__} ({_line(error)}); install its matching build"
        yield Finding("software", "torchvision", "FAILED", words)
    for name, use in EXTRAS.items():
        try:
            yield Finding("software", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("software", name, "absent", f"not installed; for {use}")


def _devices() -> Iterator[Finding]:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Finding("devices", "cpu", "ok", f"{threads}, {readable(free_bytes('cpu'))} free")
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", "absent", "no CUDA device that this torch can use; the suite runs on the CPU")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{number}"
        total = torch.cuda.get_device_properties(number).total_memory
        words = f"{torch.cuda.get_device_name(number)}, {readable(free_bytes(name))} of {readable(total)} free"
        yield Finding("devices", name, "ok", words)


def _data(root: Path) -> Iterator[Finding]:
    yield Finding(
        "data", "looked for in", "ok" if root.is_dir() else "absent", f"{root.resolve()} (ROBUST_DATA, --root)"
    )
    for name in DATASETS:
        try:
            data = parse_dataset(name)(root)
        except MissingData as error:
            yield Finding("data", name, "absent", _line(error))
        except ValueError as error:
            # A user's own data needs a path: there is nothing to look for.
            if "needs" not in str(error):
                yield Finding("data", name, "FAILED", _line(error))
        except RuntimeError as error:
            yield Finding("data", name, "FAILED", _line(error))
        else:
            shape = "x".join(map(str, data.input_shape))
            yield Finding("data", name, "ok", f"{shape}, {len(data.classes)} classes")


def _folders(root: Path) -> Iterator[Finding]:
    for name, folder in (("runs", Path("runs")), ("data", root), ("temporary files", Path(tempfile.gettempdir()))):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
            yield Finding("folders", name, "ok", f"{folder.absolute()} can be written")
        except OSError as error:
            outcome: Outcome = "absent" if name == "data" else "FAILED"
            yield Finding("folders", name, outcome, f"{folder.absolute()} cannot be written ({error.strerror})")


def _tested(name: str, check: Callable[[], str]) -> Finding:
    started = time.perf_counter()
    try:
        words = check()
    except Exception as error:  # whatever a broken installation raises is what is to be reported
        return Finding("self-test", name, "FAILED", _line(error))
    return Finding("self-test", name, "ok", f"{words}; {time.perf_counter() - started:.1f} s")


def bounds_hold(device: str = "cpu") -> str:
    """AssertionError where a sampled point of the ball escapes the bounds of a random convolutional network."""
    model, x, y, ball = _problem(device)
    spec = margin_spec(y, 5)
    noise = torch.Generator().manual_seed(1)
    margins = []
    for sample in range(SAMPLES // 100):
        step = torch.rand((100, *x.shape), generator=noise) * 2 - 1
        # Half of the points are corners of the ball, where a network's extremes lie.
        step = (step.sign() if sample % 2 else step).to(device) * float(ball.eps)
        points = ball.project((x + step).flatten(0, 1), x.repeat(100, 1, 1, 1))
        logits = model(points).view(100, len(x), 5)
        margins.append(torch.einsum("brk,sbk->sbr", spec, logits))
    found = torch.cat(margins)
    slack = ROUNDING * found.abs().max()
    for method in METHODS:
        lb, ub = bound(model, x, ball, spec=spec, method=method)
        assert bool((found.amin(0) >= lb - slack).all()) and bool((found.amax(0) <= ub + slack).all()), (
            f"a point of the ball escapes the bounds of {method}: certificates cannot be trusted here"
        )
    return f"{SAMPLES * len(x)} points stay inside the bounds of {', '.join(METHODS)}"


def planted_counterexample_is_found() -> str:
    """AssertionError where an adversarial example that is there by construction is missed, or one is claimed."""
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.ones(16), -torch.ones(16)]))
        linear.bias.copy_(torch.tensor([-7.2, 7.2]))
    model = nn.Sequential(nn.Flatten(), linear).eval()
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    # The margin is 2 (sum x - 8 + 0.8) = 1.6 and falls by 32 eps: it reaches zero at eps = 0.05.
    point = ATTACKS.parse("pgd:steps=10")(model, x, y, LinfBall(0.06))
    assert int(model(point).argmax()) == 1, "PGD misses an adversarial example that is there"
    verifier = VERIFIERS.parse("cascade:timeout=10")
    statuses = [verifier(model, x, y, LinfBall(eps))[0].status for eps in (0.04, 0.06)]
    assert statuses == ["certified", "falsified"], f"expected certified and falsified, got {' and '.join(statuses)}"
    return "found by PGD and by the cascade, and none is claimed in a smaller ball"


def gpu_agrees() -> str:
    """AssertionError where bounds on the GPU escape those on the CPU by more than rounding, or hold no point."""
    if not torch.cuda.is_available():
        return "no GPU here, nothing to compare"
    bounds_hold("cuda")
    (model, x, y, ball), (other, x_gpu, _, _) = _problem("cpu"), _problem("cuda")
    for method in METHODS:
        here = bound(model, x, ball, spec=margin_spec(y, 5), method=method).lb
        there = bound(other, x_gpu, ball, spec=margin_spec(y, 5).to("cuda"), method=method).lb.cpu()
        off = float((here - there).abs().max() / here.abs().max())
        assert off < AGREEMENT, f"lower bounds of {method} differ by {off:.2g} of their size between CPU and GPU"
    return f"bounds of {', '.join(METHODS)} agree on CPU and GPU"


SELF_TESTS: dict[str, Callable[[], str]] = {
    "bounds": bounds_hold,
    "planted counterexample": planted_counterexample_is_found,
    "CPU and GPU": gpu_agrees,
}


def _problem(device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, LinfBall]:
    """A random network, the same everywhere, with images, labels and a ball."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=noise) / max(1, parameter[0].numel()) ** 0.5)
    x, y = torch.rand(4, 1, 8, 8, generator=noise), torch.tensor([0, 1, 2, 3])
    return model.requires_grad_(False).eval().to(device), x.to(device), y.to(device), LinfBall(0.05)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
