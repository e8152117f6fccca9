"""The safetensors primitive: exact, whole or refused, never executed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from robust.tensor_file import CheckpointError, content_hash, load_tensors, save_tensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_tensors_of_every_kind_come_back_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.rand(3, 4, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "rng": generator.get_state()}
    tensors |= {"transposed": tensors["torch.float32"].t(), "tied": tensors["torch.float32"]}
    save_tensors(tmp_path / "state", tensors, {})
    loaded, _ = load_tensors(tmp_path / "state")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_metadata_comes_back_exactly(tmp_path: Path) -> None:
    metadata = {"eps": 8 / 255, "step": 10**18, "text": 'ü "\n', "deep": {"list": [1, None, True]}, "inf": math.inf}
    save_tensors(tmp_path / "state", {"a": torch.ones(1)}, metadata)
    assert load_tensors(tmp_path / "state")[1] == metadata


def test_numbers_of_numpy_and_torch_are_stored_as_numbers(tmp_path: Path) -> None:
    metadata = {"numpy": np.float32(0.5), "torch": torch.tensor(3), "path": Path("a/b")}
    save_tensors(tmp_path / "state", {"a": torch.ones(1)}, metadata)
    assert load_tensors(tmp_path / "state")[1] == {"numpy": 0.5, "torch": 3, "path": "a/b"}
    with pytest.raises(TypeError, match="which JSON cannot store"):
        save_tensors(tmp_path / "state", {}, {"model": object()})


def test_the_hash_depends_on_every_part_of_the_content() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    variants = [
        (tensors, {"x": 1}),
        (tensors, {"x": 2}),
        ({"a": torch.zeros(3, 2), "b": torch.ones(2)}, {"x": 1}),
        ({"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)}, {"x": 1}),
        ({"a": torch.zeros(2, 3), "c": torch.ones(2)}, {"x": 1}),
        ({"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])}, {"x": 1}),
        ({"a": torch.zeros(2, 3)}, {"x": 1}),
    ]
    assert len({content_hash(*variant) for variant in variants}) == len(variants)
    assert content_hash(dict(reversed(tensors.items())), {"x": 1}) == content_hash(tensors, {"x": 1})


def test_the_returned_hash_is_the_content_hash(tmp_path: Path) -> None:
    tensors, metadata = {"a": torch.randn(5, generator=torch.Generator().manual_seed(0))}, {"x": 0.1}
    assert save_tensors(tmp_path / "state", tensors, metadata) == content_hash(tensors, metadata)
    assert content_hash(*load_tensors(tmp_path / "state")) == content_hash(tensors, metadata)


def test_a_file_cut_at_any_byte_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_tensors(path, {"a": torch.ones(4)}, {"x": 1})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="state: truncated, damaged or no safetensors file") as refusal:
            load_tensors(path)
        assert "\n" not in str(refusal.value)


def test_a_file_with_one_changed_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_tensors(path, {"a": torch.ones(4), "b": torch.zeros(2, dtype=torch.int32)}, {"x": 1})
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            tensors, metadata = load_tensors(path)
        except CheckpointError:
            continue
        # Only spaces that pad the header may differ without changing what is read.
        assert content[position : position + 1] == b" ", position
        assert content_hash(tensors, metadata) == content_hash(
            {"a": torch.ones(4), "b": torch.zeros(2).int()}, {"x": 1}
        )


def test_missing_files_folders_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        load_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_tensors(tmp_path)
    foreign = tmp_path / "foreign"
    safetensors.torch.save_file({"a": torch.ones(1)}, foreign)
    with pytest.raises(CheckpointError, match="no checkpoint of this suite"):
        load_tensors(foreign)
    safetensors.torch.save_file({"a": torch.ones(1)}, foreign, metadata={"format": "robust-suite", "version": "2"})
    with pytest.raises(CheckpointError, match="written in format 2, and this suite reads format 1"):
        load_tensors(foreign)


def test_a_pickle_is_refused_by_its_first_bytes_whatever_its_name(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name}: a pickled file can run code, .* with --model"):
            load_tensors(tmp_path / name)


def test_metadata_that_was_edited_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_tensors(path, {"a": torch.ones(1)}, {"accuracy": 0.5})
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    header["metadata"] = json.dumps({"accuracy": 0.9})
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata=header)
    with pytest.raises(CheckpointError, match="do not match their SHA-256"):
        load_tensors(path)


def test_a_file_obeys_the_umask_as_any_other_does(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
