"""The files that the README shows as extensions, taken from it and used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+/\S+\.py)\n(.*?)```", README, flags=re.DOTALL))

USE = """
import torch
from torch import nn

import corners, logit_pairing, softplus, stripes
from attacks import LinfBall
from certify import bound
from robust.cli import main

train = "train --data stripes:count=300 --model cnn3:width=4 --objective logit_pairing:weight=0.2 --eps 0.05"
assert main([*train.split(), *"--epochs 8 --optimizer adam:lr=0.01 --out run --quiet".split()]) == 0
rest = ["run/checkpoint.safetensors", "--quiet", "--no-curve", "--limit", "50"]
assert main(["attack", *rest, "--attack", "corners:tries=5"]) == 0
assert main(["certify", *rest, "--verifier", "crown"]) == 0
assert main(["methods", "objectives"]) == 0

torch.manual_seed(0)
for scale in (1e-4, 1.0, 30.0):
    network = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 3)).requires_grad_(False)
    network[0].weight *= scale
    x, ball = torch.rand(4, 6), LinfBall(0.2)
    low, high = ball.box(x)
    points = low + (high - low) * torch.rand(5000, 4, 6)
    logits = network(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    lb, ub = bound(network, x, ball, method="crown")
    slack = 1e-5 * logits.abs().max()
    assert (logits >= lb - slack).all() and (logits <= ub + slack).all()
    assert (ub - lb < 4 * (logits.amax(0) - logits.amin(0)) + slack).all()
"""


def test_the_four_extensions_of_the_readme_work_as_written(tmp_path: Path) -> None:
    assert sorted(FILES) == [
        "attacks/methods/corners.py",
        "certify/ops/softplus.py",
        "robust/data/stripes.py",
        "robust/objectives/logit_pairing.py",
    ]
    for name, text in FILES.items():
        assert not (ROOT / name).exists()
        (tmp_path / Path(name).name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    clean = re.search(r"clean: +([\d.]+) %", done.stdout)
    assert clean is not None and float(clean[1]) > 80
    assert "logit_pairing" in done.stdout
