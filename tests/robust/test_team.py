"""Several processes that train one network: the result of one, whatever the method, and one line for mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attacks.noise import Share, normal, uniform
from robust.cli import main
from robust.objective import OBJECTIVES
from robust.run_setup import CHECKPOINT, STATE, TrainingError
from robust.settings import Settings
from robust.team import Team
from robust.trainer import train
from robust.weighting import WEIGHTINGS
from tests.robust.runs import environment, free_port, records, torchrun, weights

# Float64: what differs in more than rounding then differs by far more than the tolerance, and no sign of a gradient
# near 0 turns over. Every process reads all cases from a file and trains one after the other.
RUNS = """
import json, sys
from pathlib import Path
import torch
from robust.images import MemoryImages
from robust.settings import Settings
from robust.team import Team
from robust.trainer import train
from tests.robust.runs import gloo_threads
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
read = MemoryImages.batch
MemoryImages.batch = lambda self, index, device="cpu": (lambda x, y: (x.double(), y))(*read(self, index, device))
team = Team.join("cpu")
for name, changes in json.loads(Path(sys.argv[1]).read_text()).items():
    train(Settings.from_dict(changes), Path(sys.argv[2]) / name, progress=False, team=team)
if team is not None:
    assert gloo_threads() or sys.platform != "linux"
    team.leave()
    assert gloo_threads() == []  # they may abort the process at its end
"""

TRADES = "trades:attack=(pgd:steps=2,step_size=0.5,start=gaussian,loss=kl,keep=last,mode=keep)"

# 21 steps with a last mini-batch of 13 images, which two processes cannot share evenly.
USUAL = {
    "model": "cnn3:width=2,batch_norm=true",
    "batch_size": 64,
    "epochs": 1,
    "validation": 0.0,
    "optimizer": "sgd:lr=0.05",
    "eps_schedule": "linear:start=0.1,end=0.6",
}
TWO_EPOCHS = {"epochs": 2, "batch_size": 128}

CASES: dict[str, dict[str, Any]] = {
    "natural": {"objective": "natural", "optimizer": "adam:lr=0.001", "model": "cnn3:width=2"},
    "pgd": {"objective": "pgd", "clip_norm": 1.0},
    "trades": {"objective": TRADES, "weight_perturbation": "awp", "hooks": ["ema"]},
    "mtl_ibp": {"objective": "mtl_ibp", "micro_batch": 24, "augment": True},
    "shi_ibp": {"objective": "shi_ibp", "regularizers": ["shi", "l1"], "validation": 0.1, "validator": "ibp"},
    "hr": {"objective": TRADES, "weightings": ["hr"]},
    "dafa": {"objective": TRADES, "weightings": ["dafa:warmup_epochs=1"], **TWO_EPOCHS},
}

NEEDS_CHECKPOINTS = ("awr", "hat", "mtard", "pubdef")
FOR_OTHER_MODELS = ("dverge", "emma", "gloro", "gloro_trades", "logit_annealing")
UNDIVIDED = ("fat", "free_at")


def every_method() -> dict[str, dict[str, Any]]:
    """A run of every objective, weighting, regulariser, weight perturbation and hook that processes may share."""
    texts = {"taps": "taps:steps=2,restarts=1", "lbgat": "lbgat:teacher=cnn3"}
    short = {"taps", "staps"}
    constant = {"gat", "lbgat"}  # parameters that only their terms train
    left_out = {*NEEDS_CHECKPOINTS, *FOR_OTHER_MODELS, *UNDIVIDED}
    cases: dict[str, dict[str, Any]] = {}
    for name in set(OBJECTIVES.names()) - left_out:
        schedule = "linear:start=0,end=0.3" if name in short else "constant" if name in constant else None
        cases[f"objective_{name}"] = {
            "objective": texts.get(name, name),
            **({"eps_schedule": schedule} if schedule else {}),
        }
    options = {
        "cfa": ":start_epoch=1",
        "dafa": ":warmup_epochs=1",
        "effective_number": ":start_epoch=1",
        "gairat": ":start_epoch=0",
        "mail": ":start_epoch=0",
        "frl": ":attack=(pgd:steps=2)",
    }
    for name in WEIGHTINGS.names():
        objective = "pgd" if name in ("gairat", "mail") else TRADES.replace("trades:", "trades:kl_weight=1,")
        cases[f"weighting_{name}"] = {
            "objective": objective,
            "weightings": [name + options.get(name, "")],
            "validation": 0.1 if name == "frl" else 0.0,
            **TWO_EPOCHS,
        }
    for text, objective in {
        "grad_align": "fgsm_rs",
        "elle:weight=10": "fgsm_rs",
        "elle_a:weight=10": "fgsm_rs",
        "saf:start_epoch=1,epochs_back=1": "fgsm_rs",
        "mesa:start_epoch=0": "fgsm_rs",
        "vat:xi=0.01": "natural",
        "fomo:start_epoch=1": "pgd",
    }.items():
        name = text.partition(":")[0]
        constant_radius = {"eps_schedule": "constant"} if name == "fomo" else {}
        cases[f"regularizer_{name}"] = {
            "objective": objective,
            "regularizers": [text],
            **TWO_EPOCHS,
            **constant_radius,
        }
    for text in ("rwp:iterations=2", "sam"):
        cases[f"perturbation_{text.partition(':')[0]}"] = {"objective": TRADES, "weight_perturbation": text}
    for text in ("precise_bn", "swa", "catastrophic_overfitting", "fawa"):
        cases[f"hook_{text}"] = {"objective": "fgsm_rs", "hooks": [text], "validation": 0.1, **TWO_EPOCHS}
    return cases


def differences(cases: dict[str, dict[str, Any]], folder: Path, processes: int = 2) -> dict[str, float]:
    """Largest difference between the weights of one process and of several, for every case."""
    script, table = folder / "runs.py", folder / "cases.json"
    script.write_text(RUNS)
    table.write_text(json.dumps({name: {**USUAL, **case} for name, case in cases.items()}))
    one, several = folder / "one", folder / "several"
    commands = [
        [sys.executable, str(script), str(table), str(one)],
        torchrun(str(script), str(table), str(several), processes=processes),
    ]
    for started in [
        subprocess.Popen(c, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]:
        output, _ = started.communicate(timeout=600)
        assert started.returncode == 0, output[-2000:]
    for name, case in cases.items():
        if case.get("validation"):
            assert records(one / name)[-1].keys() == records(several / name)[-1].keys()
            assert {k: v for k, v in records(one / name)[-1].items() if "validation" in k} == {
                k: v for k, v in records(several / name)[-1].items() if "validation" in k
            }
    return {name: _difference(weights(one / name), weights(several / name)) for name in cases}


def _difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    found = differences(CASES, tmp_path)
    assert {name: value for name, value in found.items() if not value < 1e-10} == {}


@pytest.mark.slow
def test_three_processes_train_what_one_trains_with_every_method(tmp_path: Path) -> None:
    found = differences(every_method(), tmp_path, processes=3)
    assert {name: value for name, value in found.items() if not value < 1e-7} == {}


def test_shares_of_noise_are_rows_of_one_draw() -> None:
    like, rows = torch.zeros(()), [torch.tensor([0, 1, 4]), torch.tensor([2, 3])]

    def share(part: int) -> Share:
        return Share(torch.Generator().manual_seed(3), rows[part], 5)

    for sampler in (uniform, normal):
        whole = sampler((5, 2), like, torch.Generator().manual_seed(3))
        points = sampler((10, 2), like, torch.Generator().manual_seed(3)).view(5, 2, 2)
        for part in (0, 1):
            assert torch.equal(sampler((len(rows[part]), 2), like, share(part)), whole[rows[part]])
            several = sampler((2 * len(rows[part]), 2), like, share(part))
            assert torch.equal(several.view(-1, 2, 2), points[rows[part]])
    # Where rows were dropped the processes draw apart, and none draws what another draws.
    assert not torch.equal(uniform((1, 2), like, share(0)), uniform((1, 2), like, share(1)))


def command(out: Path, *flags: str, processes: int = 2) -> list[str]:
    usual = ("--model", "cnn3:width=2,batch_norm=true", "--quiet", "--device", "cpu", "--out", str(out))
    return torchrun("-m", "robust", "train", *usual, *flags, processes=processes)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes_with_one_line(tmp_path: Path) -> None:
    flags = ("--optimizer", "sgd:lr=1e30", "--objective", "natural", "--epochs", "1")
    done = subprocess.run(command(tmp_path, *flags), env=environment(), capture_output=True, text=True, timeout=300)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("robust: ")]
    assert done.returncode != 0 and "Try a lower learning rate" in line and "SIGABRT" not in done.stderr


def test_a_process_that_is_gone_is_one_line_of_the_first_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(error: Exception, rank: int) -> tuple[int | str | None, str]:
        def failing(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(Team, "join", lambda _: Team(rank, 2))
        monkeypatch.setattr("robust.commands.train.train", failing)
        try:
            code: int | str | None = main(["train", "--device", "cpu", "--out", str(tmp_path)])
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().err

    gloo = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:35545")
    line = "robust: another process of this run is gone; the same command goes on where it stopped\n"
    for error in (gloo, torch.distributed.DistBackendError("NCCL communicator was aborted")):
        assert cut_off(error, 0) == (2, line)
        assert cut_off(error, 1) == (2, "")
    with pytest.raises(RuntimeError, match="of our own"):
        cut_off(RuntimeError("a mistake of our own"), 0)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_in_one_line_and_the_run_goes_on(tmp_path: Path) -> None:
    flags = ("--objective", "pgd", "--epochs", "12", "--batch_size", "64", "--out", str(tmp_path), "--quiet")
    arguments = [sys.executable, "-m", "robust", "train", "--model", "cnn3:width=2", "--device", "cpu", *flags]

    def started() -> list[subprocess.Popen[str]]:
        shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            subprocess.Popen(arguments, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]

    lead, other = started()
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() or not records(tmp_path):
        assert time.monotonic() < deadline and lead.poll() is None
        time.sleep(0.01)
    other.kill()
    said = lead.communicate(timeout=120)[1]
    other.communicate()
    assert (lead.returncode, "Traceback" in said) == (2, False), said
    line = "robust: another process of this run is gone; the same command goes on where it stopped"
    assert [text for text in said.splitlines() if text.startswith("robust: ")] == [line]
    assert [process.communicate(timeout=120) and process.returncode for process in started()] == [0, 0]


def test_what_processes_cannot_share_is_refused_in_one_line(tmp_path: Path) -> None:
    team = Team(0, 2)
    for changes, message in (
        ({"objective": "free_at"}, "objective free_at can not be trained by several processes together; start one"),
        ({"objective": "fat"}, r"objective fat can not be trained by several processes together; start one"),
        ({"objective": "pgd:attack=(friendly_pgd:mode=keep)"}, "can not be trained by several processes together"),
        ({"hooks": ("fedavg",)}, "hook fedavg can not be trained by several processes together; start one"),
    ):
        with pytest.raises(TrainingError, match=message):
            train(Settings(**changes), tmp_path, team=team)
    with pytest.raises(ValueError, match="1 images of a mini-batch are too few for 2 processes; choose another batch"):
        team.parts(25, 6)
    for rank in (0, 1):
        parts = Team(rank, 2).parts(25, 10)
        assert [part.count for part in parts] == [10, 10, 5]
        assert [(part.share.start, part.share.stop) for part in parts][2] == ((0, 2), (2, 5))[rank]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    flags = ("--objective", "pgd", "--epochs", "12", "--batch_size", "64")
    straight = subprocess.run(
        command(tmp_path / "straight", *flags), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert straight.returncode == 0, straight.stderr[-2000:]
    broken = command(tmp_path / "broken", *flags)
    first = subprocess.Popen(broken, env=environment(), stdout=-1, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "broken" / "log.jsonl").exists() or not records(tmp_path / "broken"):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert (tmp_path / "broken" / STATE).exists() and not (tmp_path / "broken" / CHECKPOINT).exists()
    again = subprocess.run(broken, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on with the run" in again.stdout
    assert _difference(weights(tmp_path / "straight"), weights(tmp_path / "broken")) == 0
    assert records(tmp_path / "straight") == records(tmp_path / "broken")
