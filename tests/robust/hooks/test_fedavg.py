"""FedAvg: two clients in processes of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robust.hooks.fedavg import FedAvg
from robust.run_setup import CHECKPOINT
from tests.robust.runs import environment, torchrun, weights

CLIENT = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
from robust.active import Moment
from robust.hooks.fedavg import FedAvg, average_over_clients
from robust.team import disconnect
from robust.trainer import train
from tests.robust.runs import gloo_threads, tiny

torch.set_num_threads(1)
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])

model = nn.BatchNorm1d(1)
with torch.no_grad():
    model.weight.fill_(10.0 + rank)
run = SimpleNamespace(model=model, images=(30, 10)[rank], epochs=4)
active = FedAvg(local_epochs=2).start(run)
assert float(model.weight) == 10.0  # the first client's
for epoch in (1, 2):
    with torch.no_grad():
        model.weight.fill_(2.0 + rank)
        model.running_mean.fill_(8.0 * rank)
        model.num_batches_tracked.fill_(7 + rank)
    active.after_epoch(Moment(model, 0, float(epoch), lambda: iter(())))
    if epoch == 1:
        assert float(model.weight) == 2.0 + rank
assert float(model.weight) == 0.75 * 2 + 0.25 * 3
assert float(model.running_mean) == 2.0 and int(model.num_batches_tracked) == 7 + rank
try:
    average_over_clients(model, 10, epoch=3 + rank)
    raise SystemExit("clients in different epochs went on")
except RuntimeError as error:
    assert "clients are in epochs 3 to 4" in str(error)
assert float(model.weight) == 0.75 * 2 + 0.25 * 3

settings = tiny(objective="pgd:attack=(fgsm:mode=keep)", hooks=("fedavg",), seed=rank, epochs=1, batch_size=650)
train(settings, out / str(rank), progress=False)
assert gloo_threads() or sys.platform != "linux"
del active
disconnect()
assert gloo_threads() == []
"""


@pytest.mark.slow
def test_two_clients_of_different_seeds_end_with_the_mean_of_their_weights(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    clients = torchrun(str(script), str(tmp_path))
    done = subprocess.run(clients, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (weights(tmp_path / str(rank)) for rank in range(2))
    assert first.keys() == second.keys()
    for name, value in first.items():
        # The file's batch counts are each client's own; sums over clients are the same on both.
        assert torch.equal(value, second[name]), name
    assert (tmp_path / "0" / CHECKPOINT).exists()


def test_a_run_without_processes_or_with_a_rest_of_epochs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"fedavg needs the processes of its clients: torchrun"):
        FedAvg().start(SimpleNamespace(epochs=3))
    with pytest.raises(ValueError, match="3 epochs are no multiple of local_epochs=2"):
        FedAvg(local_epochs=2).start(SimpleNamespace(epochs=3))
