"""Checkpoints on the Hub: what is uploaded, and that what is downloaded is a checkpoint. Without a network.

Uploads and downloads go through the real client, to a small hub on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from robust.checkpoint import CheckpointError, load
from robust.cli import main
from robust.hub import HubError, card, local_checkpoint, push, reports_beside
from robust.report import Report
from tests.robust.hub_server import TOKEN, Hub, serving
from tests.robust.runs import REPOSITORY, tiny, trained

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra [hub] is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a small run that was certified."""
    out = tmp_path_factory.mktemp("run")
    trained(tiny(epochs=1, model="mlp:hidden=8"), out)
    flags = ["--verifier", "ibp", "--limit", "16", "--quiet", "--no-curve", "--device", "cpu"]
    assert main(["certify", str(out / "checkpoint.safetensors"), *flags]) == 0
    return out


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this machine, which the client of this process takes for the real one, with a token that may write."""
    with serving() as local:
        monkeypatch.setattr(constants, "ENDPOINT", local.address)
        # The other way of sending large files, Xet, is a binary of its own; this one is plain HTTP.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield local


def stored(server: Hub, name: str, folder: Path) -> Path:
    """The files of a repository, in a folder."""
    for path, content in server.repositories[name].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_checkpoint_is_uploaded_with_its_rows_and_a_card_of_its_numbers(
    run: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(run / "checkpoint.safetensors"), "user/digits-ibp", "--private"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    address = f"{server.address}/user/digits-ibp"
    assert told == {"repository": address, "reports": [str(run / "certify")]}
    assert server.repositories["user/digits-ibp"].private and len(server.large) == 1
    assert main(command) == 0, "a repository that is there already is written to"
    assert capsys.readouterr().out == f"{address}\n"
    there = stored(server, "user/digits-ibp", tmp_path)
    assert load(there / "checkpoint.safetensors").hash() == load(run / "checkpoint.safetensors").hash()
    report = Report.load(there / "certify")
    words, rate = (there / "README.md").read_text(encoding="utf-8"), report.summary().rates.certified
    assert words.startswith("---\nlibrary_name: robust-suite\n") and "\n---\n" in words
    assert f"| certified | {100 * rate.fraction:.2f} | {rate.count} of 16 |" in words
    assert "Method: `ibp`" in words and "linf, eps = 0.1" in words and "robust certify hf:user/digits-ibp" in words
    # IBP attacks nothing, so the card claims nothing about attacks.
    assert "under attack" not in words


def test_a_card_says_where_nothing_was_measured(run: Path) -> None:
    assert "Nothing was measured on test images" in card(load(run / "checkpoint.safetensors"), "user/name", [])


def test_a_network_of_ones_own_is_uploaded_without_its_file(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    trained(tiny(epochs=1, model="my_net.py:net"), tmp_path)
    assert main(["push", "checkpoint.safetensors", "user/own"]) == 2
    assert "name it yourself: --model my_net.py:net" in capsys.readouterr().err and not server.asked
    assert main(["push", "checkpoint.safetensors", "user/own", "--model", "my_net.py:net"]) == 0
    files = server.repositories["user/own"].files
    words = files["README.md"].decode()
    assert "robust certify hf:user/own --model my_net.py:net\n" in words
    assert "`net` of `my_net.py`, a file that is not part of this upload" in words
    assert sorted(files) == ["README.md", "checkpoint.safetensors"]


def test_reports_of_another_checkpoint_and_files_that_are_none_are_refused(
    run: Path, server: Hub, tmp_path: Path
) -> None:
    trained(tiny(epochs=1, model="mlp:hidden=8", seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match="evaluates another checkpoint than the one to upload"):
        push(tmp_path / "other" / "checkpoint.safetensors", "user/name", reports_beside(run / "checkpoint.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        push(tmp_path / "broken.safetensors", "user/name")
    assert not server.asked


def test_an_upload_that_fails_is_one_line_with_its_reason(
    run: Path, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    server.full = True
    assert main(["push", str(run / "checkpoint.safetensors"), "user/digits-ibp", "--reports"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # behind the client's progress bar
    assert "robust: user/digits-ibp: the Hugging Face Hub gave no answer that helps (" in line and "507" in line
    assert not server.repositories["user/digits-ibp"].files


def test_without_the_right_to_write_one_line_says_so(
    run: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert main(["push", str(run / "checkpoint.safetensors"), "user/digits-ibp"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("robust: user/digits-ibp: the Hugging Face Hub gave no answer that helps (")
    assert "401" in line and line.endswith("; for a private repository or an upload: `hf auth login`, or $HF_TOKEN")
    assert not server.repositories


def certify(name: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = ["--verifier", "ibp", "--limit", "4", "--quiet", "--no-curve", "--device", "cpu"]
    home = {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "robust", "certify", name, *flags],
        env={**os.environ, **home, **environment},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )


def test_what_was_pushed_is_certified_by_its_name(server: Hub, run: Path, tmp_path: Path) -> None:
    assert main(["push", str(run / "checkpoint.safetensors"), "user/digits-ibp", "--private"]) == 0
    done = certify("hf:user/digits-ibp", tmp_path, HF_ENDPOINT=server.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "runs" / "hub" / "user" / "digits-ibp"
    assert load(there / "checkpoint.safetensors").hash() == load(run / "checkpoint.safetensors").hash()
    assert len(Report.load(there / "certify").rows) == 4


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_line(server: Hub, tmp_path: Path) -> None:
    absent = certify("hf:user/nothing", tmp_path, HF_ENDPOINT=server.address)
    assert absent.returncode == 2 and len(absent.stderr.splitlines()) == 1
    assert absent.stderr.startswith("robust: user/nothing: the Hugging Face Hub gave no answer that helps")


def test_without_a_network_one_line_says_so(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert main(["push", str(run / "checkpoint.safetensors"), "user/name"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("robust: user/name: the Hugging Face Hub gave no answer that helps (") and "\n" not in err
    assert "is there a network, and does it need $HTTPS_PROXY?" in err


def test_names_are_checked_and_files_stay_files() -> None:
    assert local_checkpoint(Path("runs/a/checkpoint.safetensors")) == Path("runs/a/checkpoint.safetensors")
    for name in ("hf:name", "hf:../../etc", "hf:user/../..", "hf:user/name/more"):
        with pytest.raises(HubError, match="expected user/name"):
            local_checkpoint(Path(name))
