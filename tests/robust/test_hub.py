"""Checkpoints on the Hub: what is uploaded, and that what is downloaded is a checkpoint. Without a network.

Downloads go through the real client to a server of this test; uploads end in a folder that stands for the Hub.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robust.checkpoint import CheckpointError, load
from robust.cli import main
from robust.hub import HubError, card, local_checkpoint, push, reports_beside
from robust.report import Report
from tests.robust.runs import REPOSITORY, tiny, trained

hub = pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a small run that was certified."""
    out = tmp_path_factory.mktemp("run")
    trained(tiny(epochs=1, model="mlp:hidden=8"), out)
    flags = ["--verifier", "ibp", "--limit", "16", "--quiet", "--no-curve", "--device", "cpu"]
    assert main(["certify", str(out / "checkpoint.safetensors"), *flags]) == 0
    return out


class Folder:
    """Stands for the Hub's client: repositories are folders."""

    root: Path
    private: dict[str, bool]

    def create_repo(self, name: str, *, exist_ok: bool, private: bool) -> str:
        assert exist_ok
        self.private[name] = private
        return f"https://hub.example/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Folder, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(Folder, "private", {}, raising=False)
    monkeypatch.setattr(hub, "HfApi", Folder)
    return tmp_path / "hub"


def test_a_checkpoint_is_uploaded_with_its_rows_and_a_card_of_its_numbers(
    run: Path, uploads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["push", str(run / "checkpoint.safetensors"), "user/digits-ibp", "--private"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"repository": "https://hub.example/user/digits-ibp", "reports": [str(run / "certify")]}
    assert main(command) == 0
    assert capsys.readouterr().out == "https://hub.example/user/digits-ibp\n" and Folder.private == {
        "user/digits-ibp": True
    }
    there = uploads / "user" / "digits-ibp"
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
    uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_net.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    trained(tiny(epochs=1, model="my_net.py:net"), tmp_path)
    assert main(["push", "checkpoint.safetensors", "user/own"]) == 2
    assert "name it yourself: --model my_net.py:net" in capsys.readouterr().err and not uploads.exists()
    assert main(["push", "checkpoint.safetensors", "user/own", "--model", "my_net.py:net"]) == 0
    words = (uploads / "user" / "own" / "README.md").read_text(encoding="utf-8")
    assert "robust certify hf:user/own --model my_net.py:net\n" in words
    assert "`net` of `my_net.py`, a file that is not part of this upload" in words
    assert sorted(path.name for path in (uploads / "user" / "own").iterdir()) == ["README.md", "checkpoint.safetensors"]


def test_reports_of_another_checkpoint_and_files_that_are_none_are_refused(
    run: Path, uploads: Path, tmp_path: Path
) -> None:
    trained(tiny(epochs=1, model="mlp:hidden=8", seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match="evaluates another checkpoint than the one to upload"):
        push(tmp_path / "other" / "checkpoint.safetensors", "user/name", reports_beside(run / "checkpoint.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        push(tmp_path / "broken.safetensors", "user/name")
    assert not uploads.exists()


@pytest.fixture
def server(run: Path) -> Iterator[str]:
    """Serves the run's checkpoint as the Hub serves a file, and nothing else."""
    content = (run / "checkpoint.safetensors").read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            known = self.path == "/user/digits-ibp/resolve/main/checkpoint.safetensors"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


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


def test_a_name_of_the_hub_stands_for_its_file(server: str, run: Path, tmp_path: Path) -> None:
    done = certify("hf:user/digits-ibp", tmp_path, HF_ENDPOINT=server)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "runs" / "hub" / "user" / "digits-ibp"
    assert load(there / "checkpoint.safetensors").hash() == load(run / "checkpoint.safetensors").hash()
    assert len(Report.load(there / "certify").rows) == 4


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_line(server: str, tmp_path: Path) -> None:
    absent = certify("hf:user/nothing", tmp_path, HF_ENDPOINT=server)
    assert absent.returncode == 2 and len(absent.stderr.splitlines()) == 1
    assert absent.stderr.startswith("robust: user/nothing: the Hugging Face Hub gave no answer that helps")


def test_names_are_checked_and_files_stay_files() -> None:
    assert local_checkpoint(Path("runs/a/checkpoint.safetensors")) == Path("runs/a/checkpoint.safetensors")
    for name in ("hf:name", "hf:../../etc", "hf:user/../..", "hf:user/name/more"):
        with pytest.raises(HubError, match="expected user/name"):
            local_checkpoint(Path(name))
