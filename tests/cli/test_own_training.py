"""Training a network of the user's own file: the run, its checkpoint, and what is refused."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robust.checkpoint import CheckpointError, load
from robust.cli import main
from robust.dataset import parse_dataset
from robust.own_model import OwnModelError, own_among, own_network
from robust.run_setup import build_model
from robust.settings import Settings
from tests.robust.runs import REPOSITORY

NET = """
from pathlib import Path
import torch
from torch import nn
Path("was_run").touch()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.shift = nn.Parameter(0.1 * torch.rand(1, 8, 8))
    def forward(self, x):
        return self.body(x + self.shift)
class Gelu(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.GELU())
class Branching(Net):
    def forward(self, x):
        return self.body(x) if x.sum() > 0 else self.body(-x)
"""
TRAIN = (
    "train --data digits --model my_net.py:Net --objective ibp --eps 0.02 --eps_schedule smooth:end=1 --epochs 2 "
    "--out run"
)
QUIET = ["--quiet", "--device", "cpu"]
CERTIFY = "certify run/checkpoint.safetensors --verifier ibp --limit 30 --no-curve"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my_net.py").write_text(NET)
    return tmp_path


def test_it_is_trained_certified_exported_and_not_trained_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    out = capsys.readouterr().out
    assert "next: robust certify run/checkpoint.safetensors --model my_net.py:Net" in out
    command = [*CERTIFY.split(), "--model", "my_net.py:Net", *QUIET]
    assert main([*command, "--out", "report"]) == 0
    summary = json.loads(Path("report/summary.json").read_text())
    x, y = parse_dataset("digits")().test.batch(torch.arange(30))
    model = load(Path("run/checkpoint.safetensors"), own_network("my_net.py:Net")).model
    assert summary["clean"]["total"] == 30 and summary["clean"]["count"] == int((model(x).argmax(1) == y).sum())
    assert main(["export", "run/checkpoint.safetensors", "net.onnx", "--model", "my_net.py:Net"]) == 0
    before = Path("run/checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*TRAIN.split(), *QUIET]) == 0
    assert "the run in run is finished" in capsys.readouterr().out
    assert Path("run/checkpoint.safetensors").read_bytes() == before


def test_an_edited_file_is_not_mixed_with_what_the_former_one_gave(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certify = [*CERTIFY.split(), "--model", "my_net.py:Net", "--out", "report", *QUIET]
    assert main([*TRAIN.split(), *QUIET]) == 0 and main(certify) == 0
    Path("my_net.py").write_text(NET.replace("return self.body(x + self.shift)", "return self.body(x - self.shift)"))
    capsys.readouterr()
    assert main(certify) == 2
    assert "report/rows.jsonl holds another evaluation: the network's code changed" in capsys.readouterr().err
    assert main([*TRAIN.split(), *QUIET]) == 2
    err = capsys.readouterr().err
    assert "run holds a run of my_net.py:Net, and the network's code changed since then" in err and "--out" in err


def test_folders_that_do_not_say_which_code_it_was_are_gone_on_with(here: Path) -> None:
    certify = [*CERTIFY.split(), "--model", "my_net.py:Net", "--out", "report", *QUIET]
    assert main([*TRAIN.split(), *QUIET]) == 0 and main(certify) == 0
    settings, rows = Path("run/settings.json"), Path("report/rows.jsonl")
    facts = json.loads(settings.read_text())
    assert len(facts.pop("code")) == 64
    settings.write_text(json.dumps(facts))
    header, *lines = rows.read_text().splitlines()
    old = json.loads(header)
    assert old["header"].pop("code") == hashlib.sha256(NET.encode()).hexdigest()
    rows.write_text("\n".join([json.dumps(old), *lines]) + "\n")
    assert main([*TRAIN.split(), *QUIET]) == 0 and main(certify) == 0


def test_its_checkpoint_does_not_run_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    Path("was_run").unlink()
    assert main([*CERTIFY.split(), *QUIET]) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].endswith("name it yourself: --model my_net.py:Net")
    assert not Path("was_run").exists()
    with pytest.raises(CheckpointError, match="the weights do not fit the model"):
        load(Path("run/checkpoint.safetensors"), nn.Linear(2, 2))


def test_export_takes_no_other_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    assert main(["export", "run/checkpoint.safetensors", "net.onnx", "--model", "cnn3"]) == 2
    assert "--model cnn3: expected your own network, FILE.py:NAME" in capsys.readouterr().err
    assert not Path("net.onnx").exists()


def test_it_is_compared_with_other_runs_and_only_as_the_network_that_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    other = TRAIN.replace("my_net.py:Net", "mlp:hidden=8").replace("--out run", "--out other")
    assert main([*other.split(), *QUIET]) == 0
    compare = ["compare", "other", "run", "--attacks", "fgsm", "--limit", "30", *QUIET]
    assert main(compare) == 2
    assert "name it yourself: --model my_net.py:Net" in capsys.readouterr().err
    assert main([*compare, "--model", "my_net.py:Branching"]) == 2
    words = "no run was trained as that network; the runs are of mlp:hidden=8, my_net.py:Net"
    assert words in capsys.readouterr().err and not Path("other/comparison").exists()
    Path("elsewhere").mkdir()
    Path("my_net.py").rename("elsewhere/my_net.py")
    assert main([*compare, "--model", "elsewhere/my_net.py:Net", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [line["run"] for line in lines] == ["other", "run"]
    x, y = parse_dataset("digits")().test.batch(torch.arange(30))
    model = load(Path("run/checkpoint.safetensors"), own_network("elsewhere/my_net.py:Net")).model
    assert lines[1]["clean"] == pytest.approx(float((model(x).argmax(1) == y).double().mean()))


def test_of_networks_of_the_same_name_the_one_with_the_same_folder_is_meant() -> None:
    given = ["a/net.py:Net", "b/net.py:Net", "b/net.py:Other"]
    assert own_among("b/net.py:Net", given) == "b/net.py:Net"
    assert own_among("c/net.py:Net", given) is None and own_among("net.py:Other", given) == "b/net.py:Other"
    assert own_among("other.py:Net", given) is None and own_among("cnn3", given) is None


def test_it_teaches_its_like_and_its_file_is_not_run_for_another_network(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    taught = TRAIN.replace("--objective ibp", "--objective hat:standard=run/checkpoint.safetensors")
    taught = taught.replace("--out run", "--out taught --batch_size 400").replace("--epochs 2", "--epochs 1")
    assert main([*taught.split(), *QUIET]) == 0
    Path("was_run").unlink()
    capsys.readouterr()
    assert main([*taught.replace("my_net.py:Net", "mlp:hidden=8").replace("taught", "no").split(), *QUIET]) == 2
    assert "it can teach the run of the same --model my_net.py:Net only" in capsys.readouterr().err
    assert not Path("was_run").exists()


def test_points_that_fool_it_are_stored(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*TRAIN.split(), *QUIET]) == 0
    script = REPOSITORY / "scripts" / "transfer_points.py"
    words = "run/checkpoint.safetensors --model my_net.py:Net --out points.npz --attack fgsm --copies 1"
    monkeypatch.setattr(sys, "argv", [str(script), *words.split()])
    runpy.run_path(str(script), run_name="__main__")
    assert Path("points.npz").exists()


def test_its_file_may_hold_dataclasses_and_import_its_neighbours_late(here: Path) -> None:
    Path("neighbour_of_net.py").write_text("WIDTH = 5\n")
    Path("my_net.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Sizes:\n"
        "    width: int = 4\n"
        "def net():\n"
        "    from neighbour_of_net import WIDTH\n"
        "    return nn.Linear(Sizes().width, WIDTH)\n"
    )
    before, known = list(sys.path), set(sys.modules)
    assert own_network("my_net.py:net")(torch.zeros(2, 4)).shape == (2, 5)
    assert sys.path == before
    Path("my_net.py").write_text("raise ValueError('of mine')\n")
    Path("elsewhere").mkdir()
    Path("my_net.py").rename("elsewhere/my_net.py")
    with pytest.raises(OwnModelError, match="cannot be imported: ValueError: of mine"):
        own_network("elsewhere/my_net.py:net")
    assert len({name for name in set(sys.modules) - known if name.startswith("own_network_")}) == 1


@pytest.mark.parametrize(
    "file",
    [
        "import sys\nsys.exit()",
        "import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])",
        "import sys\ndef net(): sys.exit(3)",
    ],
)
def test_a_file_that_ends_the_command_is_refused(here: Path, file: str) -> None:
    Path("my_net.py").write_text(file)
    with pytest.raises(OwnModelError, match=r"my_net\.py would end the command \(SystemExit") as refusal:
        own_network("my_net.py:net")
    assert 'under if __name__ == "__main__":' in str(refusal.value) and "\n" not in str(refusal.value)


def test_two_runs_of_a_seed_start_from_the_same_weights_and_as_built_keeps_the_files(here: Path) -> None:
    data = parse_dataset("digits")()
    settings = {"data": "digits", "model": "my_net.py:Net", "seed": 3}
    one, two = (build_model(Settings(**settings), data).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    built = build_model(Settings(**settings, init="as_built"), data).state_dict()
    torch.manual_seed(3)
    scope: dict[str, type[nn.Module]] = {}
    exec(NET, scope)
    expected = scope["Net"]().state_dict()
    assert all(torch.equal(built[name], expected[name]) for name in expected)
    assert not torch.equal(one["body.1.weight"], built["body.1.weight"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no_net.py:Net", "--model: there is no file no_net.py"),
        ("my_net.py", "--model my_net.py: which network? write --model my_net.py:NAME"),
        ("my_net.py:Other", "no 'Other' in the file; my_net.py defines Net, Gelu, Branching"),
        ("my_net.py:Gelu", "no bound rule for nn.GELU"),
        ("my_net.py:Branching --init ibp", "control flow must not depend on tensor values"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], model: str, words: str
) -> None:
    assert main([*TRAIN.replace("my_net.py:Net", model).split(), *QUIET]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and "\n" not in err
    assert not Path("run/checkpoint.safetensors").exists()
