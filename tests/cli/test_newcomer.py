"""The newcomer: README word for word with a network and images of one's own, and what a mistake is answered with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attacks.threat import LinfBall
from robust.checkpoint import Checkpoint
from robust.cli import main
from tests.robust.runs import REPOSITORY

SECTION = "## Your own network and your own images, step by step"
SECONDS = 600


def blocks() -> list[tuple[str, str]]:
    """(language, code) of the section's blocks, in order."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split(SECTION)[1].split("\n## ")[0]
    return re.findall(r"```(python|bash)\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.slow
def test_the_readme_followed_word_for_word_ends_in_a_certified_report(tmp_path: Path) -> None:
    """Files are what their first line names, commands are run as they stand by a shell."""
    (tmp_path / "bin").mkdir()
    for name, words in (("robust", '-m robust "$@"'), ("python", '"$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started, printed = time.monotonic(), ""
    for language, code in blocks():
        if language == "python":
            (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        done = subprocess.run(
            ["sh", "-e", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert time.monotonic() - started < SECONDS
    assert "report: my_report/report.html" in printed and "my_library_report/report.html" in printed
    found = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("my_report", "my_library_report")]
    assert found[0]["certified"] == found[1]["certified"] and found[0]["clean"]["total"] == 100
    assert found[0]["certified"]["count"] > 30, "the stand-in is certified for the most part"


# --- mistakes with one's own files


NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    def forward(self, x):
        return self.body(x)
class Sized(Net):
    def __init__(self, hidden):
        super().__init__(hidden)
class Odd(Net):
    def forward(self, x):
        return self.body(torch.fft.fft2(x).real)
class Spatial(Net):
    def forward(self, x):
        return x
class Slip(Net):
    def forward(self, x):
        return self.boddy(x)
class Pairs(Net):
    def forward(self, x):
        return self.body(x.view(2, 3, 36))
def four(): return Net(4)
def number(): return 4
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with my_net.py, weights my_net.pt, images of 6x6 pixels in my_images, and things that are wrong."""
    monkeypatch.chdir(tmp_path)
    Path("my_net.py").write_text(NET)
    Path("broken.py").write_text("import no_such_package\n")
    scope: dict[str, type] = {}
    exec(NET, scope)
    torch.manual_seed(0)
    torch.save(scope["Net"]().state_dict(), "my_net.pt")
    Path("cut.pt").write_bytes(Path("my_net.pt").read_bytes()[:700])
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), "whole_model.pt")
    rng = np.random.default_rng(0)
    for folder, sizes in (("my_images", (6, 6, 6, 6)), ("mixed", (6, 6, 9, 6)), ("three", (6, 6, 6, 6, 6, 6))):
        for number, size in enumerate(sizes):
            path = Path(folder) / "abc"[number // 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    grey = Path("my_images/a/0.png")
    Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).save(grey)
    shutil.copytree("my_images", "damaged")
    Path("damaged/b/2.png").write_bytes(b"not a picture")
    Path("empty").mkdir()
    return tmp_path


CERTIFY = "certify my_net.pt --model my_net.py:Net --data folder:my_images --eps 2/255 --quiet --no-curve --device cpu"


def asked(text: str, **changes: str) -> list[str]:
    words = text.split()
    for name, value in changes.items():
        words[words.index(f"--{name}") + 1 if f"--{name}" in words else 1] = value
    return words


def test_a_grey_image_among_coloured_ones_is_read_as_a_coloured_one(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(CERTIFY.split()) == 0
    out, err = capsys.readouterr()
    assert "of 4; 95 % interval" in out and err == ""
    header = json.loads(Path("certify/rows.jsonl").read_text().splitlines()[0])["header"]
    assert header["model"] == "my_net.py:Net"
    assert main(asked(f"{CERTIFY} --out four", model="my_net.py:four")) == 0


def test_code_that_only_a_checkpoint_names_is_never_run(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.py").write_text("from pathlib import Path\nPath('it_ran').touch()\n" + NET)
    Path("it_ran").unlink(missing_ok=True)
    facts = {"model": "evil.py:Net", "input_shape": [3, 6, 6], "classes": 2, "mean": [0.0] * 3, "std": [1.0] * 3}
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 2))
    Checkpoint(net, {**facts, "data": "folder:my_images"}, LinfBall(0.1)).save(Path("evil.safetensors"))
    assert main(["certify", "evil.safetensors", "--quiet", "--no-curve", "--device", "cpu"]) == 2
    assert "no checkpoint makes code run" in capsys.readouterr().err and not Path("it_ran").exists()
    assert main(asked(CERTIFY, model="evil.py:Net")) == 0 and Path("it_ran").exists(), "named by the user, it runs"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "gone.pt"}, "gone.pt: no such file (looked for /"),
        ({"weights": "whole_mode.pt"}, "whole_mode.pt; did you mean whole_model.pt?)"),
        ({"weights": "cut.pt"}, "cut.pt: truncated, damaged or no file of weights"),
        ({"weights": "cut.pt"}, "; save or copy it again"),
        ({"eps": "2/25x"}, "--eps: expected a number such as 0.1 or 8/255, got '2/25x'"),
        ({"weights": "whole_model.pt"}, "the pickle holds more than tensors"),
        ({"weights": "my_net.py"}, "my_net.py: truncated, damaged or no safetensors file"),
        ({"eps": "2"}, "eps=2 leaves the pixel range [0, 1]; did you mean 2/255?"),
        ({"model": "my_net.py:Nett"}, "no 'Nett' in the file; my_net.py defines Net, Sized, Odd, Spatial, Slip, Pairs"),
        ({"model": "my_net.py"}, "which network? my_net.py defines Net, Sized, Odd, Spatial, Slip, Pairs; write "),
        ({"model": "my_nets.py:Net"}, "there is no file my_nets.py (looked for "),
        ({"model": "broken.py:Net"}, "broken.py cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ({"model": "my_net.py:Sized"}, "Sized() fails (TypeError: "),
        ({"model": "my_net.py:number"}, "number() gives int, expected a torch.nn.Module"),
        ({"model": "my_net.py:Spatial"}, "expected logits [2, classes] for two images 3x6x6 of my_images, got shape"),
        ({"model": "my_net.py:Odd"}, "fft"),
        ({"model": "my_net.py:Slip"}, "does not take the images 3x6x6 of my_images (AttributeError: "),
        ({"model": "my_net.py:Pairs"}, "takes two images 3x6x6 of my_images, but not three (RuntimeError: "),
        ({"model": "cnn7"}, "the weights do not fit the model"),
        ({"model": "cnn77"}, "no model named 'cnn77' (did you mean 'cnn7'?)"),
        ({"data": "folder:no_images"}, "folder: there is no folder no_images (looked for /"),
        ({"data": "folder:empty"}, "no images in class folders; expected files such as empty/CLASS/name.png"),
        ({"data": "folder:mixed"}, "images differ in size (6x6 and 9x9)"),
        ({"data": "folder:damaged"}, "damaged/b/2.png: no image that can be read"),
        ({"data": "folder:three"}, "has 2 logits, but three has 3 classes; give another --data"),
        ({"data": "folder:path=my_images,channels=1"}, "does not take the images 1x6x6 of my_images"),
        ({"data": "digits"}, "does not take the images 1x8x8 of digits"),
        ({"device": "cuda:7"}, "--device cuda:7: not available here"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_with_own_files_is_answered_in_one_line(
    mine: Path, changes: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked(CERTIFY, **changes)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("robust: ") and words in err, err
