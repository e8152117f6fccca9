"""Checkpoints rebuild their model exactly, and nothing that a file holds is ever executed."""

from __future__ import annotations

import collections
import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from attacks.threat import L2Ball, LinfBall
from robust.checkpoint import Checkpoint, CheckpointError, load, load_state_dict_file, save_tensors
from robust.model import MODELS

SHAPE, CLASSES, MEAN, STD = (1, 4, 4), 3, (0.1307,), (0.3081,)


def settings(model: str = "mlp:hidden=5") -> dict[str, Any]:
    return {"model": model, "input_shape": SHAPE, "classes": CLASSES, "mean": MEAN, "std": STD, "seed": 3}


def network(model: str = "mlp:hidden=5", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS.parse(model)(SHAPE, CLASSES, MEAN, STD)


def checkpoint(model: str = "mlp:hidden=5") -> Checkpoint:
    return Checkpoint(network(model), settings(model), LinfBall(8 / 255), {"clean": 0.5}, {"recipe": "tiny"})


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_a_loaded_checkpoint_is_the_saved_one(tmp_path: Path) -> None:
    saved = checkpoint("mlp:hidden=5,batch_norm=true")
    saved.model(torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1)))  # moves the running statistics
    digest = saved.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.settings == settings("mlp:hidden=5,batch_norm=true") | {
        "input_shape": list(SHAPE),
        "mean": list(MEAN),
        "std": list(STD),
    }
    assert (loaded.ball, loaded.metrics, loaded.extra) == (LinfBall(8 / 255), {"clean": 0.5}, {"recipe": "tiny"})
    assert loaded.hash() == saved.hash() == digest
    assert not loaded.model.training
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.model(x), saved.model.eval()(x))


def test_the_radius_and_the_pixel_range_come_back_exactly(tmp_path: Path) -> None:
    for ball in (LinfBall(2 / 255), L2Ball(36 / 255, None), L2Ball(0.1, (-1.0, 1.0))):
        Checkpoint(network(), settings(), ball).save(tmp_path / "model")
        assert load(tmp_path / "model").ball == ball


def test_a_double_precision_model_comes_back_unrounded(tmp_path: Path) -> None:
    model = network().double()
    Checkpoint(model, settings(), LinfBall(0.1)).save(tmp_path / "model")
    loaded = load(tmp_path / "model").model.state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_ball_with_one_radius_per_example_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one eps, got one per example"):
        Checkpoint(network(), settings(), LinfBall(torch.tensor([0.1, 0.2]))).save(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_an_interrupted_save_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    first = checkpoint()
    first.save(path)

    def half(target: Path, content: bytes) -> None:
        with target.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        Checkpoint(network(seed=1), settings(), LinfBall(0.1)).save(path)
    assert load(path).hash() == first.hash()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_unknown_model_is_refused_with_the_known_names(tmp_path: Path) -> None:
    for text in ("cnnn7", "mlp:hiden=5"):
        Checkpoint(network(), settings(text), LinfBall(0.1)).save(tmp_path / "model")
        with pytest.raises(CheckpointError, match=r"model: .*(known: .*mlp|fields: .*hidden)"):
            load(tmp_path / "model")


def test_settings_that_cannot_rebuild_the_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    Checkpoint(network(), {"model": "mlp", "classes": 3}, LinfBall(0.1)).save(path)
    with pytest.raises(CheckpointError, match="settings lack input_shape, mean, std"):
        load(path)
    Checkpoint(network(), settings() | {"std": [0.0]}, LinfBall(0.1)).save(path)
    with pytest.raises(CheckpointError, match="cannot be built"):
        load(path)
    Checkpoint(network(), settings("mlp:hidden=6"), LinfBall(0.1)).save(path)
    with pytest.raises(
        CheckpointError, match=r"do not fit the model; of another shape: .*\(5, 16\) instead of \(6, 16\)"
    ):
        load(path)


def test_a_file_of_training_state_is_no_checkpoint(tmp_path: Path) -> None:
    save_tensors(tmp_path / "state", {"a": torch.ones(1)}, {"kind": "training state"})
    with pytest.raises(CheckpointError, match="holds 'training state', expected a checkpoint"):
        load(tmp_path / "state")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_never_executed(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "harm"
    plain, zipped, wrapped = (tmp_path / name for name in ("plain.safetensors", "zipped.pt", "wrapped.pt"))
    plain.write_bytes(pickle.dumps(Malicious(target), protocol=protocol))
    torch.save({"fc": Malicious(target)}, zipped)
    torch.save({"state_dict": network().state_dict(), "extra": Malicious(target)}, wrapped)
    for path in (plain, zipped, wrapped):
        for attempt in (load, lambda path: load_state_dict_file(path, network())):
            with pytest.raises(CheckpointError) as refusal:
                attempt(path)
            assert "\n" not in str(refusal.value)
            assert not target.exists()
    with pytest.raises(CheckpointError, match=r"refused without running it.*posix\.system"):
        load_state_dict_file(zipped, network())
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists(), "the pickle is harmless, so this test shows nothing"


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_state_dict_file(tmp_path / "model.pt", network())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_removed(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, model = network(seed=1), network(seed=2)
    state: Any = collections.OrderedDict((prefix + name, tensor) for name, tensor in source.state_dict().items())
    torch.save({wrapper: state, "epoch": 7} if wrapper else state, tmp_path / "weights.pt")
    load_state_dict_file(tmp_path / "weights.pt", model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_a_state_dict_is_read_from_safetensors_and_the_old_format(tmp_path: Path) -> None:
    source = network(seed=1).state_dict()
    safetensors.torch.save_file(source, tmp_path / "weights.safetensors")
    torch.save(source, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    checkpoint().save(tmp_path / "ours.safetensors")
    for name in ("weights.safetensors", "weights.pt"):
        model = network(seed=2)
        load_state_dict_file(tmp_path / name, model)
        assert all(torch.equal(tensor, source[key]) for key, tensor in model.state_dict().items())
    load_state_dict_file(tmp_path / "ours.safetensors", network(seed=2))


def test_keys_and_shapes_that_differ_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    state = dict(network(seed=1).state_dict())
    first, *_, last = state
    state[first] = torch.zeros(7)
    del state[last]
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError) as refusal:
        load_state_dict_file(tmp_path / "weights.pt", model)
    message = str(refusal.value)
    assert f"missing: {last}" in message
    assert "unexpected: extra0, extra1, extra2 and 2 more" in message
    assert f"of another shape: {first} (7,) instead of {tuple(before[first].shape)}" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "lr": 0.1}, {}, "text"])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_state_dict_file(tmp_path / "weights.pt", network())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torn_pickle_is_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as refusal:
            load_state_dict_file(path, network())
        assert "\n" not in str(refusal.value)


def test_a_state_dict_with_a_changed_byte_is_refused(tmp_path: Path) -> None:
    """torch stores check sums with the weights, and loads them without a look at these."""
    path = tmp_path / "weights.pt"
    torch.save({name: tensor + 1 for name, tensor in network().state_dict().items()}, path)
    content = bytearray(path.read_bytes())
    weights = (next(iter(network().state_dict().values())) + 1).numpy().tobytes()
    content[content.index(weights)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged .*the check sum of .* in it is wrong"):
        load_state_dict_file(path, network())
