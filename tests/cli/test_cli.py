"""The command line as a user types it: exit codes, files, and the text of every refusal."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
import pkgutil
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from robust import cli, commands, judging
from robust.checkpoint import load
from robust.cli import main
from robust.commands.train import _run_name
from robust.listing import KINDS
from robust.settings import Settings, load_recipe, recipe_names
from robust.trainer import train
from tests.robust.runs import REPOSITORY, start, stop_once

SMALL = (
    "--model cnn3:width=4 --objective ibp --eps 0.03 --epochs 2 --eps-schedule linear:start=0.2,end=1 "
    "--optimizer adam:lr=0.01 --batch_size 64 --seed 3"
).split()
MODEL = "cnn3:width=4"
REPORT_FILES = {
    "rows.jsonl", "rows.csv", "summary.json", "summary.csv", "report.html", "sources.json",
    "examples.png", "per_class.png", "training.png", "over_eps.png", "nearest.safetensors",
}  # fmt: skip

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def robust(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command in a fresh folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROBUST_DATA", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        text = capsys.readouterr()
        return code, text.out, text.err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint, made by the command line."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SMALL, "--out", str(out), "--quiet", "--device", "cpu"]) == 0
    return out / "checkpoint.safetensors"


def refused(outcome: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr with these words and no traceback."""
    code, out, err = outcome
    assert code == 2, (out, err)
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("robust") and "Traceback" not in err, err
    for word in words:
        assert word in err, err


# --- end to end


def test_train_certify_report_and_attack_on_digits(robust: Cli, tmp_path: Path) -> None:
    code, out, err = robust("train", *SMALL, "--quiet")
    assert code == 0 and err == ""
    path = Path("runs/digits_ibp/checkpoint.safetensors")
    assert out.splitlines()[0].startswith("validation: ") and "% clean" in out and "% certified (ibp)" in out
    assert out.splitlines()[1:] == [f"checkpoint: {path}", f"next: robust certify {path}"]
    assert {file.name for file in path.parent.iterdir()} == {"checkpoint.safetensors", "log.jsonl", "settings.json"}

    code, out, err = robust("certify", path, "--limit", 60, "--quiet")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["clean", "under attack", "certified", "report"]
    assert all("of 60; 95 % interval" in line for line in lines[:3])
    folder = path.parent / "certify"
    assert lines[-1] == f"report: {folder / 'report.html'}"
    assert {file.name for file in folder.iterdir()} == REPORT_FILES
    rates = json.loads((folder / "summary.json").read_text())
    assert rates["clean"]["count"] >= rates["under_attack"]["count"] >= rates["certified"]["count"] > 0

    code, out, err = robust("attack", path, "--limit", 30, "--attack", "pgd:steps=5", "--quiet", "--no-curve")
    assert code == 0 and "certified" not in out and "under attack" in out
    header = json.loads((path.parent / "attack" / "rows.jsonl").read_text().splitlines()[0])["header"]
    assert header["attack"] == "pgd:steps=5" and header["verifier"] is None


def test_masked_gradients_are_looked_for_and_the_report_shows_what_was_found(robust: Cli, checkpoint: Path) -> None:
    out = checkpoint.parent / "attack"
    code, text, _ = robust("masking", checkpoint, "--limit", 10)
    assert code == 0 and "flags: " in text and (out / "masking.json").exists()
    code, text, _ = robust("attack", checkpoint, "--attack", "pgd:steps=2", "--limit", 10, "--no-curve", "--quiet")
    assert code == 0 and "Can the attacks be trusted?" in (out / "report.html").read_text()


def test_a_report_is_drawn_again_in_full_also_from_another_folder(
    robust: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    assert robust("certify", checkpoint, "--limit", 20, "--out", folder, "--quiet")[0] == 0
    page = (folder / "report.html").read_bytes()
    for name in REPORT_FILES - {"rows.jsonl", "sources.json", "nearest.safetensors"}:
        (folder / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = robust("report", "../report")
    assert code == 0 and err == "" and "certified" in out
    assert {file.name for file in folder.iterdir()} == REPORT_FILES
    assert (folder / "report.html").read_bytes() == page


def test_a_report_is_drawn_again_from_another_folder_with_its_pictures(
    robust: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez("own.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.array([0, 1, 0, 9]))
    common = ("--verifier", "ibp", "--no-curve", "--quiet")
    assert robust("certify", checkpoint, "--data", "npz:own.npz", "--out", "report", *common)[0] == 0
    page = Path("report/report.html").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = Path("report").resolve()
    monkeypatch.chdir(elsewhere)
    code, _, err = robust("report", folder)
    assert code == 0 and err == "" and (folder / "report.html").read_bytes() == page


def test_a_report_is_drawn_without_what_is_gone_and_says_so(robust: Cli, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    assert robust("certify", checkpoint, "--limit", 20, "--out", folder, "--quiet", "--no-curve")[0] == 0
    sources = json.loads((folder / "sources.json").read_text())
    (folder / "sources.json").write_text(json.dumps({**sources, "data": "npz:gone.npz", "log": "nowhere.jsonl"}))
    code, _, err = robust("report", folder)
    assert code == 0 and err.count("\n") == 1 and "without pictures of the examples: npz: there is no file gone" in err
    (folder / "sources.json").write_text("{")
    refused(robust("report", folder), "sources.json: damaged", "remove it")
    (folder / "sources.json").unlink()
    assert robust("report", folder / "rows.jsonl")[0] == 0


def test_the_report_of_a_running_evaluation_has_its_examples_and_training_curves(
    robust: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"

    def interrupted(*arguments: Any, **named: Any) -> None:
        evaluate(*arguments, **{**named, "limit": 5})
        raise KeyboardInterrupt

    evaluate = judging.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(judging, "evaluate", interrupted)
        code, _, err = robust("certify", checkpoint, "--limit", 20, "--out", folder, "--quiet")
    assert code == 130 and err == "robust: interrupted; the same command goes on where it stopped\n"
    assert robust("report", folder)[0] == 0
    assert {"examples.png", "training.png"} <= {file.name for file in folder.iterdir()}


def test_the_same_training_command_again_says_that_the_run_is_finished(robust: Cli, checkpoint: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in checkpoint.parent.glob("*.*")}
    code, out, _ = robust("train", *SMALL, "--out", checkpoint.parent, "--quiet")
    assert code == 0
    assert out.startswith(f"the run in {checkpoint.parent} is finished; give --out another folder to train again\n")
    assert {file: file.stat().st_mtime_ns for file in checkpoint.parent.glob("*.*")} == before
    refused(
        robust("train", *SMALL, "--epochs", 3, "--out", checkpoint.parent, "--quiet"),
        "other settings (epochs: 2 there, 3 now)",
    )


def test_an_interrupted_training_says_so_and_goes_on(robust: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from robust import trainer

    step = trainer._Run._step

    def stopping(self: Any, index: torch.Tensor) -> dict[str, float]:
        self.interruption.asked = self.progress.step == 3
        return step(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "_step", stopping)
        code, _, err = robust("train", *SMALL, "--out", "run", "--quiet")
    assert code == 130 and err == "robust: interrupted; the same command goes on where it stopped\n"
    code, out, _ = robust("train", *SMALL, "--out", "run", "--quiet")
    assert code == 0 and out.startswith("going on with the run in run\n")


def test_the_default_folder_of_a_run_names_recipe_or_data_and_objective() -> None:
    def name(recipe: str | None = None, **changes: Any) -> str:
        return _run_name(Settings(**changes), recipe)

    assert name(objective="mtl_ibp:ibp_weight=0.1") == "digits_mtl_ibp"
    assert name("cifar10_2_255_sabr") == "cifar10_2_255_sabr"
    assert name("there/mine.v2.toml") == "mine.v2"
    assert name(data="npz:path=here/birds.npz,flip=true") == name(data="npz:birds.npz") == "npz_birds_mtl_ibp"


def test_a_run_too_short_for_its_ramp_is_pointed_out(robust: Cli) -> None:
    code, _, err = robust("train", *SMALL, "--epochs", 1, "--eps-schedule", "smooth:start=0,end=9", "--quiet")
    assert code == 0 and err.count("\n") == 1
    assert "the radius grows until epoch 9, but the run ends at epoch 1, before eps=0.03 is reached" in err


def test_a_plain_state_dict_gives_the_rows_of_the_checkpoint(robust: Cli, checkpoint: Path, tmp_path: Path) -> None:
    state = load(checkpoint).model.state_dict()
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, "weights.pt")
    safetensors.torch.save_file(state, "weights.safetensors")
    common = ("--limit", 20, "--quiet", "--no-curve", "--eps", "0.03")
    assert robust("certify", checkpoint, *common, "--out", "a")[0] == 0
    for file in ("weights.pt", "weights.safetensors"):
        assert robust("certify", file, "--model", MODEL, "--data", "digits", *common, "--out", file + "_")[0] == 0
        assert rows(Path(file + "_")) == rows(Path("a"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows without the time they took."""
    path = folder / "rows.jsonl" if folder.is_dir() else folder
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# --- refusals, one line each


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --eps 8", "eps=8 leaves the pixel range [0, 1]; did you mean 8/255?"),
        ("train --eps -0.1", "eps"),
        ("train --eps lots", "expected a number such as 0.1 or 8/255, got 'lots'"),
        ("train --objective mtl_ipb", "no objective named 'mtl_ipb' (did you mean 'mtl_ibp'?); known:"),
        ("train --objective mtl_ibp:ibp_wieght=1", "no field 'ibp_wieght' (did you mean 'ibp_weight'?); fields:"),
        ("train --model cnn77", "no model named 'cnn77' (did you mean 'cnn7'?)"),
        ("train --data digitz", "no data set named 'digitz' (did you mean 'digits'?)"),
        ("train --data npz", "data set 'npz' needs path: npz:path=..."),
        ("train --data npz:none.npz", "npz: there is no file none.npz"),
        ("train --data mnist --root gone", "mnist: gone/MNIST/raw is missing or incomplete; set ROBUST_DATA"),
        ("train --optimizer adm", "no optimizer named 'adm' (did you mean 'adam'?)"),
        ("train --hooks swaa", "no hook named 'swaa' (did you mean 'swa'?)"),
        ("train --regularizers l1 shy", "no regularizer named 'shy' (did you mean 'shi'?)"),
        ("train --eps-schedule smoth", "no schedule named 'smoth' (did you mean 'smooth'?)"),
        ("train --validator ipb", "no verifier named 'ipb' (did you mean 'ibp'?)"),
        ("train --recipe digit_mtl_ibp", "no recipe 'digit_mtl_ibp'; near: digits_mtl_ibp"),
        ("train --recipe gone.toml", "no recipe file at "),
        ("train --epochs many", "--epochs: expected a whole number, got 'many'"),
        ("train --epochs 0", "epochs=0: expected at least 1"),
        ("train --augment yes", "--augment: expected true or false, got 'yes'"),
        ("train --select first", "select: expected one of last, best, got 'first'"),
        ("train --learning-rate 1", "no flag --learning-rate"),
        ("train --epoch=3", "no flag --epoch (did you mean --epochs?) (see robust train --help)"),
        ("train more", "unexpected argument 'more'"),
        ("train --device abacus", "--device abacus: not available here"),
        ("certify gone.safetensors", "gone.safetensors: no such file"),
        ("certify .", ".: is a folder, expected a file"),
        ("certify CHECKPOINT --limit 0", "argument --limit: expected a whole number from 1, got '0'"),
        ("certify CHECKPOINT --limit -5", "argument --limit: expected a whole number from 1, got '-5'"),
        ("certify CHECKPOINT --batch-size 1.5", "argument --batch-size: expected a whole number from 1, got '1.5'"),
        ("certify CHECKPOINT --verifier cascde", "no verifier named 'cascde' (did you mean 'cascade'?)"),
        ("certify CHECKPOINT --verifier cascade:time=3", "verifier 'cascade' has no field 'time' (did you mean"),
        ("certify CHECKPOINT --eps 8", "did you mean 8/255?"),
        ("certify CHECKPOINT --norm l3", "l3"),
        ("certify CHECKPOINT --norm l2", "--norm l2 also needs --eps: the checkpoint's 0.03 is a radius in linf"),
        ("certify CHECKPOINT --split both", "argument --split: invalid choice: 'both'"),
        ("certify CHECKPOINT --device abacus", "--device abacus: not available here"),
        ("certify CHECKPOINT --data OTHER", "takes images 1x8x8 of 10 classes, but other has 3x5x5 of 2"),
        ("certify CHECKPOINT --data ONLYTEST --split train", "no images in its part 'train'; choose the other --split"),
        ("certify CHECKPOINT --model cnn5 --data digits --eps 0.1", "the weights do not fit the model; missing:"),
        ("certify CHECKPOINT --model cnn5", "a plain state dict also needs --data and --eps"),
        ("certify CHECKPOINT --layout tradse", "no layout named 'tradse' (did you mean 'trades'?)"),
        ("certify CHECKPOINT --layout trades", "--layout trades: is for the state dict of another project"),
        ("certify CHECKPOINT --model net.py:Net --layout trades", "--layout trades: is for the state dict of another"),
        ("certify CHECKPOINT --quiet --out CHECKPOINT", "File exists; a file is there; give --out another folder"),
        ("lipschitz CHECKPOINT --timeout -3", "--timeout -3: expected seconds, from 0"),
        ("attack CHECKPOINT --attack pgb", "no attack named 'pgb' (did you mean 'pgd'?)"),
        ("attack CHECKPOINT --attack pgd:step=3", "attack 'pgd' has no field 'step' (did you mean 'steps'?)"),
        ("report gone", "gone/rows.jsonl: no such report; `robust certify` and `robust attack` write one"),
        ("report", "required: RUN"),
        ("methods attack", "argument KIND: invalid choice: 'attack'"),
        ("recipes nosuch", "no recipe 'nosuch'"),
        ("trian", "argument COMMAND: invalid choice: 'trian'"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing_behind(
    robust: Cli, checkpoint: Path, tmp_path: Path, arguments: str, words: str
) -> None:
    other = tmp_path / "inputs"
    other.mkdir()
    np.savez(other / "other.npz", x=np.zeros((4, 5, 5, 3), np.uint8), y=np.array([0, 1, 0, 1]))
    np.savez(other / "onlytest.npz", x=np.zeros((4, 1, 8, 8), np.uint8), y=np.array([0, 1, 0, 9]))
    for name, value in (
        ("CHECKPOINT", checkpoint),
        ("OTHER", f"npz:{other}/other.npz"),
        ("ONLYTEST", f"npz:{other}/onlytest.npz"),
    ):
        arguments = arguments.replace(name, str(value))
    before = sorted(checkpoint.parent.iterdir())
    refused(robust(*arguments.split(" ")), words)
    assert list(tmp_path.iterdir()) == [other]
    assert sorted(checkpoint.parent.iterdir()) == before


@pytest.mark.parametrize("command", ["train", "certify RUN", "report RUN", "compare RUN", "masking RUN", "sweep RUN"])
def test_an_empty_place_for_results_is_not_the_present_folder(robust: Cli, command: str) -> None:
    before = sorted(Path().iterdir())
    refused(robust(*command.split(), "--out", ""), "--out: expected a path, got an empty text")
    assert sorted(Path().iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["train", "certify"])
def test_a_gpu_that_is_not_there_is_refused(robust: Cli, checkpoint: Path, command: str) -> None:
    rest = [checkpoint] if command == "certify" else []
    refused(robust(command, *rest, "--device", "cuda"), "--device cuda: not available here", "use --device cpu")


def test_damaged_and_pickled_checkpoints_are_refused(robust: Cli, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    Path("short.safetensors").write_bytes(content[: len(content) // 2])
    refused(robust("certify", "short.safetensors"), "short.safetensors: truncated, damaged or no safetensors file")
    Path("flipped.safetensors").write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    refused(robust("certify", "flipped.safetensors"), "do not match their SHA-256; the file is damaged or was edited")
    Path("evil.pt").write_bytes(pickle.dumps({"weights": Harmful()}))
    refused(
        robust("certify", "evil.pt"),
        "evil.pt: a pickled file can run code, and is no checkpoint of this suite; `robust certify`",
    )
    refused(
        robust("certify", "evil.pt", "--model", MODEL, "--data", "digits", "--eps", "0.1"), "refused without running it"
    )
    assert not Path("harm").exists()


class Harmful:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("harm"), "done")


def test_debug_shows_where_an_error_came_from(robust: Cli) -> None:
    with pytest.raises(ValueError, match="did you mean 8/255"):
        robust("train", "--eps", "8", "--debug")


def test_another_evaluation_in_the_same_folder_is_refused_and_kept(
    robust: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    common = (checkpoint, "--out", "report", "--quiet", "--no-curve", "--verifier", "ibp", "--limit", 20)
    assert robust("certify", *common)[0] == 0
    before = {file: file.read_bytes() for file in Path("report").iterdir()}
    refused(robust("certify", *common, "--eps", "0.02"), "ball.eps is 0.03 there and 0.02 now; give another --out")
    refused(robust("certify", *common[:-2], "--verifier", "crown"), "verifier is 'ibp' there and 'crown' now")
    assert {file: file.read_bytes() for file in Path("report").iterdir()} == before
    assert robust("certify", *common)[0] == 0
    assert (Path("report") / "rows.jsonl").read_bytes() == before[Path("report") / "rows.jsonl"]


def test_no_command_shows_the_help(robust: Cli) -> None:
    code, _, err = robust()
    assert code == 2 and "certified accuracy of a checkpoint" in err and "examples:" in err


def test_a_reader_that_closes_early_is_no_error() -> None:
    process = start("recipes")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0 and err == ""


def test_closed_streams_are_no_error() -> None:
    """`robust methods attacks >&- 2>&-` of a shell, or a service without streams."""
    command = f"{sys.executable} -m robust methods attacks"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0 and "Traceback" not in done.stderr


# --- killed for real


def certify_killed(checkpoint: Path, out: Path, kills: int) -> int:
    """Certify in a process that is killed so many times; how often it was at work then."""
    noise, hits = random.Random(5), 0
    arguments = [
        "certify",
        str(checkpoint),
        "--out",
        str(out),
        *"--limit 80 --batch-size 4 --no-curve --quiet".split(),
    ]
    for _ in range(kills):
        hits += stop_once(start(*arguments), out / "rows.jsonl", changes=noise.randrange(3, 12))
    process = start(*arguments)
    text = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return hits


def undisturbed_rows(robust: Cli, checkpoint: Path) -> list[dict[str, Any]]:
    common = "--limit 80 --batch-size 4 --no-curve --quiet".split()
    assert robust("certify", checkpoint, "--out", "undisturbed", *common)[0] == 0
    return rows(Path("undisturbed"))


def test_a_killed_certification_goes_on_with_the_same_rows(robust: Cli, checkpoint: Path, tmp_path: Path) -> None:
    assert certify_killed(checkpoint, tmp_path / "killed", kills=1) == 1
    assert rows(tmp_path / "killed") == undisturbed_rows(robust, checkpoint)


@pytest.mark.slow
def test_a_certification_killed_three_times_goes_on_with_the_same_rows(
    robust: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    assert certify_killed(checkpoint, tmp_path / "killed", kills=3) >= 2
    assert rows(tmp_path / "killed") == undisturbed_rows(robust, checkpoint)


# --- what can be read


@pytest.mark.parametrize("command", [module.name for module in pkgutil.iter_modules(commands.__path__)])
def test_help_names_every_flag_and_an_example_that_parses(robust: Cli, command: str) -> None:
    code, out, _ = robust(command, "--help")
    assert code == 0
    (subparsers,) = [action.choices for action in cli.command_parser()._actions if isinstance(action.choices, dict)]
    for action in subparsers[command]._actions:
        assert all(flag in out for flag in action.option_strings) and action.help
    if command == "train":
        assert all(f"--{field.name}" in out for field in dataclasses.fields(Settings))
    examples = [
        line.split("   ")[0].partition(" > ")[0].split() for line in out.splitlines() if line.startswith("  robust ")
    ]
    assert examples
    for words in examples:
        assert cli._parse(words[1:]).run is importlib.import_module(f"robust.commands.{words[1]}").run


def test_methods_lists_everything_registered_with_its_fields(robust: Cli) -> None:
    code, out, _ = robust("methods")
    assert code == 0
    for kind, registry in KINDS.items():
        assert f"{kind}:\n" in out
        for name in registry.names():
            assert f"\n  {name}  " in out
    code, out, _ = robust("methods", "attacks")
    assert code == 0 and out.startswith("attacks:\n") and "verifiers:" not in out
    assert "steps=" in out and "True" not in out and "(0.0" not in out


def test_recipes_lists_all_and_shows_one(robust: Cli) -> None:
    code, out, _ = robust("recipes")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == recipe_names()
    code, out, _ = robust("recipes", "digits_mtl_ibp")
    assert code == 0 and load_recipe("digits_mtl_ibp").title in out
    assert all(f"  {field.name} = " in out for field in dataclasses.fields(Settings))
    assert out.endswith("  train it: robust train --recipe digits_mtl_ibp\n")


def test_python_m_robust_is_the_command(tmp_path: Path) -> None:
    process = start("recipes", "digits_sabr")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "" and "data = 'digits'" in out
    process = start("recipes", "digits_sab")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and err.count("\n") == 1


def test_a_model_trained_by_the_library_is_certified_by_the_command(robust: Cli, tmp_path: Path) -> None:
    """A checkpoint without a pixel range keeps none; one that names no data set is asked for it."""
    checkpoint = train(
        Settings(model=MODEL, objective="natural", epochs=1, batch_size=400), tmp_path / "run", progress=False
    )
    checkpoint.ball = type(checkpoint.ball)(0.01, None)
    checkpoint.save(tmp_path / "free.safetensors")
    code, *_ = robust(
        "certify", "free.safetensors", "--eps", "0.02", "--limit", 5, "--quiet", "--no-curve", "--out", "r"
    )
    header = json.loads(Path("r/rows.jsonl").read_text().splitlines()[0])["header"]
    assert code == 0 and header["ball"] == {"norm": "linf", "eps": 0.02, "pixel_range": None}
    del checkpoint.settings["data"]
    checkpoint.save(tmp_path / "free.safetensors")
    refused(robust("certify", "free.safetensors"), "does not say which data set it was trained on; give --data")


def test_the_packages_import_without_reaching_for_the_network() -> None:
    script = (
        "import socket\n"
        "def closed(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = closed; socket.getaddrinfo = closed; socket.create_connection = closed\n"
        "import robust.cli; robust.cli.main(['methods'])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_lipschitz_writes_rows_a_summary_and_pictures_and_goes_on(robust: Cli, checkpoint: Path) -> None:
    common = (checkpoint, "--out", "constants", "--quiet", "--margins", "--batch-size", 3)
    code, out, _ = robust("lipschitz", *common, "--limit", 4, "--no-curve")
    assert code == 0 and out.splitlines()[0].strip().startswith("constant: mean ") and "radius: mean" in out
    before = Path("constants/lipschitz.jsonl").read_bytes()
    assert robust("lipschitz", *common, "--limit", 6)[0] == 0
    assert Path("constants/lipschitz.jsonl").read_bytes().startswith(before)
    records = [json.loads(line) for line in Path("constants/lipschitz.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["header"] + ["example"] * 6
    for row in records[1:]:
        assert 0 < row["attained"] <= row["constant"] == max(row["ub"]) and len(row["ub"]) == 9
        assert 0 <= row["radius"] <= records[0]["ball"]["eps"]
    summary = json.loads(Path("constants/lipschitz_summary.json").read_text())
    assert summary["examples"] == 6 and summary["constant"]["max"] == max(r["constant"] for r in records[1:])
    assert summary["over_eps"]["constant"] == sorted(summary["over_eps"]["constant"])
    pictures = {"lipschitz_histogram.png", "lipschitz_per_class.png", "lipschitz_over_eps.png"}
    assert pictures <= {path.name for path in Path("constants").iterdir()}
    refused(robust("lipschitz", *common, "--eps", "0.01"), "holds another measurement (ball is", "give another --out")
    refused(robust("lipschitz", *common[:-2], "--method", "exact", "--states", "crown"), "holds another measurement")
    refused(
        robust("lipschitz", checkpoint, "--out", "other", "--quiet", "--method", "exact", "--states", "crown"),
        "method 'exact' has no option 'states'; options: most",
    )


def test_constants_belong_to_the_network_and_the_images_and_not_to_the_path(
    robust: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = Path(shutil.copy(checkpoint, run))
    common = ("--limit", 2, "--no-curve", "--quiet")
    assert robust("lipschitz", path, *common)[0] == 0
    assert robust("certify", path, *common, "--verifier", "ibp")[0] == 0
    words = "Local Lipschitz constants of the logits around 2 images"
    assert words in (run / "certify" / "report.html").read_text()
    other = load(path)
    next(other.model.parameters()).data.mul_(2)
    other.save(path)
    refused(robust("lipschitz", path, *common), "holds another measurement (checkpoint is", "give another --out")
    assert robust("certify", path, *common, "--verifier", "ibp", "--out", run / "again")[0] == 0
    assert words not in (run / "again" / "report.html").read_text()


def test_an_interrupted_command_that_begins_anew_does_not_promise_more(
    robust: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("robust.commands.masking.check_masking", interrupted)
    code, _, err = robust("masking", checkpoint)
    assert (code, err) == (130, "robust: interrupted\n")
