"""Care for users and for programs: doctor, dry runs, results as JSON, completion, exit codes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import doctor as doctor_module
from robust import dry_run
from robust.checkpoint import load
from robust.cli import command_parser, main
from robust.completion import FLAG_KINDS, SHELLS, script
from robust.doctor import bounds_hold, examine, planted_counterexample_is_found
from robust.listing import KINDS
from robust.settings import recipe_names

SMALL = "--model cnn3:width=2 --objective ibp --eps 0.03 --epochs 2 --seed 1 --quiet --device cpu".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("front") / "run"
    assert main(["train", *SMALL, "--out", str(out)]) == 0
    return out / "checkpoint.safetensors"


def answered(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one JSON object on stdout, and stderr."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return code, found, err


# --- results for programs


def test_results_are_one_json_object_and_words_go_to_stderr(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--limit", 4, "--quiet", "--no-curve", "--device", "cpu")
    code, found, err = answered(capsys, "certify", checkpoint, *common, "--verifier", "ibp", "--out", tmp_path / "c")
    assert code == 0 and found["clean"]["total"] == 4 and found["header"]["verifier"] == "ibp"
    assert found["report"] == str(tmp_path / "c" / "report.html") and "certified:" in err
    assert found["certified"] == json.loads((tmp_path / "c" / "summary.json").read_text())["certified"]
    _, found, _ = answered(capsys, "attack", checkpoint, *common, "--attack", "fgsm", "--out", tmp_path / "a")
    assert found["header"]["attack"] == "fgsm" and set(found["attacks"]) <= {"fgsm"}
    _, found, _ = answered(capsys, "report", tmp_path / "c", tmp_path / "a")
    assert [run["run"] for run in found["runs"]] == ["c", "a"] and found["differ_in"] == []
    assert found["runs"][0]["clean"]["count"] == found["runs"][1]["clean"]["count"]
    _, found, _ = answered(capsys, "lipschitz", checkpoint, *common, "--method", "interval", "--out", tmp_path / "l")
    assert found["examples"] == 4 and found["constant"]["max"] > 0
    _, found, _ = answered(capsys, "train", *SMALL, "--out", checkpoint.parent)
    assert found["checkpoint"] == str(checkpoint) and "validation/clean" in found["metrics"]


def test_listings_as_json_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    _, found, _ = answered(capsys, "methods")
    assert {kind: list(names) for kind, names in found.items()} == {kind: KINDS[kind].names() for kind in KINDS}
    assert found["attacks"]["pgd"]["fields"]["steps"] == "20"
    _, found, _ = answered(capsys, "recipes")
    assert list(found) == recipe_names() and found["digits_sabr"]["settings"]["data"] == "digits"


def test_a_mistake_leaves_stdout_empty_with_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "gone.safetensors", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("robust: gone.safetensors: no such file (looked for /") and err.count("\n") == 1


# --- dry runs


def test_a_dry_training_says_what_it_would_do_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, found, err = answered(capsys, "train", *SMALL, "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert found["settings"]["eps"] == 0.03 and found["out"] == "runs/digits_ibp"
    assert main(["train", *SMALL]) == 0
    model = load(Path("runs/digits_ibp/checkpoint.safetensors")).model
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["steps"] == 2 * 11 and found["training_images"] == 1293
    assert found["seconds"] == pytest.approx(found["steps"] * found["seconds_per_step"])
    assert "nothing was written" in err and "22 steps" in err


def test_a_dry_certification_estimates_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    command = ("certify", checkpoint, "--verifier", "cascade:timeout=5", "--limit", 50, "--dry-run", "--device", "cpu")
    code, found, err = answered(capsys, *command)
    assert code == 0 and sorted(checkpoint.parent.rglob("*")) == before
    assert found["images"] == 50 and found["batch_size"] == 20 and found["eps"] == pytest.approx(0.03)
    assert found["advice"] is None and found["seconds"] > 0 and "its timeout allows 4.2 min at most" in err
    monkeypatch.setattr(dry_run.memory, "free_bytes", lambda device: 2**18)
    _, found, err = answered(capsys, *command)
    assert "are needed for 20 images at a time (crown_ibp), and 256 KiB are free; give --batch-size" in found["advice"]
    assert main([*map(str, command[:-3]), "--no-curve", "--quiet", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "robust: note: about" in capsys.readouterr().err, "the same before a run that would not fit"


def test_a_stream_that_cannot_spell_a_sign_gets_its_number(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    command = ("certify", checkpoint, "--verifier", "ibp", "--limit", 4, "--dry-run", "--quiet", "--device", "cpu")
    assert main([*map(str, command)]) == 0
    written = ascii_only.buffer
    assert isinstance(written, io.BytesIO)
    assert b"L\\u221e" in written.getvalue() and b"nothing was written" in written.getvalue()


# --- doctor


def test_the_doctor_finds_this_machine_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "METHODS", ("ibp", "crown_ibp"))
    monkeypatch.chdir(tmp_path)
    code, found, err = answered(capsys, "doctor", "--root", tmp_path / "data")
    assert code == 0 and found["failed"] == [] and "everything that the suite needs works here" in err
    by_name = {(one["topic"], one["name"]): one for one in found["findings"]}
    assert by_name["software", "torch"]["words"] == torch.__version__
    assert by_name["data", "digits"]["words"] == "1x8x8, 10 classes"
    assert by_name["data", "mnist"]["outcome"] == "absent" and str(tmp_path) in by_name["data", "mnist"]["words"]
    assert by_name["self-test", "bounds"]["words"].startswith("8000 points stay inside the bounds of ibp, crown_ibp")
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


def test_an_unsound_bound_a_blind_attack_and_a_folder_without_permission_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = doctor_module.bound

    def too_tight(*arguments: Any, **named: Any) -> Any:
        found = bound(*arguments, **named)
        middle = (found.lb + found.ub) / 2
        return type(found)(found.lb + 0.7 * (middle - found.lb), found.ub - 0.7 * (found.ub - middle))

    monkeypatch.setattr(doctor_module, "METHODS", ("crown",))
    monkeypatch.setattr(doctor_module, "bound", too_tight)
    with pytest.raises(AssertionError, match="a point of the ball escapes the bounds of crown"):
        bounds_hold()

    def refused(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_module.tempfile, "TemporaryFile", refused)
    code, found, _ = answered(capsys, "doctor")
    assert code == 1 and found["failed"] == ["folders: runs", "folders: temporary files", "self-test: bounds"]
    monkeypatch.setattr(doctor_module.ATTACKS, "parse", lambda text: lambda model, x, y, ball: x)
    with pytest.raises(AssertionError, match="PGD misses an adversarial example that is there"):
        planted_counterexample_is_found()


def test_damaged_data_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10.npz").write_bytes(b"nothing")
    monkeypatch.setattr(doctor_module, "SELF_TESTS", {})
    (found,) = [one for one in examine(tmp_path) if one.name == "cifar10"]
    assert found.outcome == "FAILED" and "cifar10.npz" in found.words


# --- completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("robust ce", {"certify"}),
        ("robust certify --verifier ca", {"cascade"}),
        ("robust certify x.safetensors --bat", {"--batch-size"}),
        ("robust train --eps-s", {"--eps-schedule"}),
        ("robust train --hooks ema sw", {"swa"}),
        ("robust train --select ", {"last", "best"}),
        ("robust methods bran", {"branchings"}),
        ("robust recipes digits_s", {name for name in recipe_names() if name.startswith("digits_s")}),
        ("robust certify my_f", {"my_file.pt"}),
        ("robust certify w.pt --model my_f", {"my_file.pt"}),
        ("robust completion f", {"fish"}),
    ],
)
def test_bash_completes_commands_flags_methods_and_files(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "robust.bash").write_text(script("bash", command_parser()))
    (tmp_path / "my_file.pt").touch()
    *words, last = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in (*words, last))
    asked = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _robust; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", f"source robust.bash; {asked}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == expected and done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_accepted_by_its_shell_and_names_every_command(shell: str, tmp_path: Path) -> None:
    text = script(shell, command_parser())
    for name in ("certify", "doctor", "cascade", "autoattack", "digits_mtl_ibp"):
        assert name in text
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", "script"], cwd=tmp_path, check=True)


def test_flags_that_take_methods_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    text = capsys.readouterr().out
    for flag in FLAG_KINDS:
        assert f":{flag})" in text
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "exit codes:" in text and "130  interrupted" in text
