"""Memory estimates: of the right size against what a process really takes, and advice where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from attacks.threat import LinfBall
from certify.bounds.crown import ROW_BUDGET
from certify.verifier import VERIFIERS
from robust.memory import Counts, advice, count, free_bytes, note, readable, stages
from robust.model import MODELS
from tests.robust.runs import REPOSITORY

MEASURE = """
import ctypes, json, re, sys
from pathlib import Path
import torch
import certify.bounds.crown
from attacks.threat import LinfBall
from certify.bounds.bound import bound
from certify.spec import margin_spec
from certify.verifier import VERIFIERS
from robust.memory import count, stages
from tests.robust.test_memory import network
torch.set_num_threads(1)
certify.bounds.crown.ROW_BUDGET_ON_CPU = certify.bounds.crown.ROW_BUDGET  # a CPU's chunks are too small to be measured
status = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
name, text, eps, batch = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
model, shape = network(name)
x, ball, verifier = torch.rand(batch, *shape), LinfBall(eps), VERIFIERS.parse(text)
y = model(x).argmax(1)
if "bab" in text:  # certain enough that no point refutes it, not so that the root proves it
    low = bound(model, x, ball, spec=margin_spec(y, 10), method="crown").lb.min()
    [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].bias.data[y[0]] -= 0.35 * low
if text == "crown":  # certain enough that nothing is bounded again in float64
    [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].bias.data[y[0]] += 100
    y[:] = y[0]
found = {tight: stages(count(model, x[:1], ball, tight), batch, verifier) for tight in (False, True)}
VERIFIERS.parse("ibp")(model, x[:1], y[:1], ball)
ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken without growth
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a child starts with that of its parent
before = status("VmRSS")
verifier(model, x, y, ball)
taken = (status("VmHWM") - before) * 1024
print(json.dumps({"taken": taken, "rough": max(found[False].values()), "tight": max(found[True].values())}))
"""


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """An untrained network whose neurons are unstable even in small balls, and the shape of its images."""
    torch.manual_seed(0)
    shape = (1, 28, 28) if name.startswith("gowal") else (3, 32, 32)
    architecture = MODELS.parse(name)
    model = architecture(shape, 10, (0.5,) * shape[0], (0.25,) * shape[0])
    return model.eval().requires_grad_(False), shape


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measured as Linux and glibc report it")
@pytest.mark.parametrize(
    ("name", "verifier", "eps", "batch"),
    [
        ("cnn7:width=16", "ibp", 0.01, 60),
        ("gowal_small", "crown", 0.1, 2),
        ("gowal_small", "alpha_crown:iterations=1", 0.05, 2),
        ("gowal_small", "bab:timeout=15,tighten_iterations=0,batch=512", 0.05, 1),
        ("gowal_small", "cascade:attack=none,long_attack=none,last=none,alpha=none", 0.03, 4),
        ("cnn7:width=4", "alpha_crown:iterations=1", 0.01, 2),
        ("preactresnet18:width=4", "crown", 0.0005, 1),
    ],
)
def test_an_estimate_is_of_the_size_of_what_a_process_takes(name: str, verifier: str, eps: float, batch: int) -> None:
    command = [sys.executable, "-c", MEASURE, name, verifier, str(eps), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tight"] <= found["rough"]
    assert found["taken"] < 1.2 * found["tight"], f"an estimate that is too small lets a run fail: {found}"
    assert found["tight"] < 4 * found["taken"], f"an estimate that is too large frightens: {found}"


SMALL = Counts((100, 400, 400, 200, 200, 10), (0, 0, 0, 600, 600, 800), {3: 60}, {1: 300, 3: 60}, 4, ROW_BUDGET)


def needed(counts: Counts, batch: int, verifier: str) -> dict[str, int]:
    return stages(counts, batch, VERIFIERS.parse(verifier))


def test_unstable_neurons_are_counted_more_closely_by_crown_and_all_rows_are() -> None:
    model, shape = network("cnn3:width=4")
    x, ball = torch.rand(2, *shape), LinfBall(0.01)
    rough, tight = count(model, x, ball), count(model, x, ball, tight=True)
    assert rough.sizes == tight.sizes and rough.sizes[-1] == 10 and rough.slopes == tight.slopes
    assert rough.slopes[-1] == sum(m.numel() for m in activations(model, x[:1]))
    assert all(tight.unstable[place] <= rough.unstable[place] for place in rough.unstable)
    assert sum(tight.unstable.values()) < sum(rough.unstable.values())
    one = [count(model, image, ball).unstable for image in x.split(1)]
    assert rough.unstable == {place: max(found[place] for found in one) for place in rough.unstable}
    assert sum(count(model, x, LinfBall(1e-6)).unstable.values()) < 30


def activations(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    values: list[torch.Tensor] = []
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    handles = [relu.register_forward_hook(lambda _, __, value: values.append(value)) for relu in relus]
    model(x)
    for handle in handles:
        handle.remove()
    return values


def test_estimates_follow_rows_slopes_children_and_batches() -> None:
    assert needed(SMALL, 8, "ibp") == {"intervals": 8 * needed(SMALL, 1, "ibp")["intervals"]}
    assert needed(SMALL, 900, "ibp") == needed(SMALL, 256, "ibp"), "the verifier's own batch is smaller"
    more = dataclasses.replace(SMALL, unstable={1: 300, 3: 160})
    slopes = [needed(c, 2, "alpha_crown")["alpha_crown"] for c in (SMALL, more)]
    assert slopes[1] - slopes[0] == pytest.approx(12 * 2 * (2 * 100) * 600 * 4)
    assert needed(SMALL, 2, "alpha_crown:optimise_intermediate=false")["alpha_crown"] < slopes[0] / 5
    children = [needed(SMALL, 20, f"bab:batch={n}")["bab"] for n in (128, 1024)]
    assert children[0] < children[1] < 8 * children[0]
    assert set(needed(SMALL, 20, "cascade")) == {"intervals", "attack", "crown_ibp", "crown", "bab"}
    assert "alpha_crown" in needed(SMALL, 20, "cascade:last=none")
    many = dataclasses.replace(SMALL, sizes=(3072, 2**17, 2**17, 10), slopes=(0, 0, 0, 2**17), rows={1: 2**17})
    assert needed(many, 1, "crown")["crown"] < 10 * 2**30, "rows keep their budget"


def test_advice_names_what_is_needed_what_is_free_and_flags_that_fit() -> None:
    alpha = VERIFIERS.parse("alpha_crown")
    most = max(stages(SMALL, 4, alpha).values())
    assert advice(SMALL, 4, alpha, most) is None
    words = advice(SMALL, 4, alpha, most - 1)
    assert words is not None and words.startswith(
        f"about {readable(most)} are needed for 4 images at a time (alpha_crown)"
    )
    assert words.endswith("give --batch-size 3 or --verifier alpha_crown:optimise_intermediate=false")
    bab = VERIFIERS.parse("bab")
    needed_by_bab = stages(SMALL, 20, bab)["bab"]
    words = advice(SMALL, 20, bab, needed_by_bab // 2)
    assert words is not None and "--verifier bab:batch=32" in words and "--batch-size" not in words
    words = advice(SMALL, 2, VERIFIERS.parse("cascade"), needed_by_bab // 2)
    assert words is not None and "--verifier cascade:last=(bab:batch=32)" in words
    words = advice(SMALL, 1, VERIFIERS.parse("ibp"), 10)
    assert words is not None and words.endswith("give a smaller --model")
    for text, batch in (("alpha_crown", 4), ("bab", 20), ("cascade", 20), ("crown", 16)):
        for free in (2**16, 2**19, 2**21):
            words = advice(SMALL, batch, VERIFIERS.parse(text), free)
            for size in re.findall(r"--batch-size (\d+)", words or ""):
                assert max(needed(SMALL, int(size), text).values()) <= free
            for method in re.findall(r"--verifier ([^ ]+)", words or ""):
                assert max(needed(SMALL, batch, method.rstrip(",")).values()) <= free


def test_what_intervals_say_does_not_fit_is_counted_again() -> None:
    model, shape = network("cnn5:width=2")
    x, ball, verifier = torch.rand(1, *shape), LinfBall(0.003), VERIFIERS.parse("alpha_crown")
    rough, tight = (max(stages(count(model, x, ball, t), 4, verifier).values()) for t in (False, True))
    assert tight < rough and note(model, x, ball, 4, verifier, (rough + tight) // 2) is None
    assert (note(model, x, ball, 4, verifier, tight - 1) or "").startswith(f"about {readable(tight)} are needed")


def test_free_memory_is_known_here() -> None:
    assert 2**20 < free_bytes("cpu") < 2**50
    assert [readable(n) for n in (10, 2048, 3 * 2**20, 5 * 2**30)] == ["10 bytes", "2 KiB", "3 MiB", "5.0 GiB"]
