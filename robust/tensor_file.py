"""Named tensors with metadata in one safetensors file that is whole or refused, and cannot run code.

The file's metadata holds one JSON text and a SHA-256 over that text and over every tensor's name, type, shape and
bytes. The hash finds damage and careless edits; it is no signature, since whoever writes the file can write the hash.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from robust.files import replacing

FORMAT = "robust-suite"
VERSION = 1

PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".tar", ".ckpt", ".bin")


class CheckpointError(ValueError):
    """A file that cannot be used as what it was given for; the message is one line and begins with its path."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write tensors and metadata to `path`, whole or not at all; return their SHA-256.

    Args:
        tensors: any dtype and shape that safetensors stores; shared storage is stored once per name.
        metadata: what JSON can hold; tuples come back as lists. Floats come back exactly, NaN and infinities too.
    """
    text = json.dumps(dict(metadata), default=_plain)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    digest = _sha256(stored, text)
    header = {"format": FORMAT, "version": str(VERSION), "metadata": text, "sha256": digest}
    with replacing(Path(path)) as sibling:
        # Not save_file: its errors have no number, and it writes through a file of its own, which has mode 0600
        # whatever the umask and which nobody removes behind a kill.
        sibling.write_bytes(safetensors.torch.save(stored, metadata=header))
    return digest


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata that `save_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, pickled, truncated, damaged, or from another program or a newer suite.
    """
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but no checkpoint of this suite; `robust certify` and `attack` take its "
            "weights with --model"
        )
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path}: written in format {header.get('version')}, and this suite reads format {VERSION}"
        )
    text = header.get("metadata", "")
    if header.get("sha256") != _sha256(tensors, text):
        raise CheckpointError(
            f"{path}: tensors and metadata do not match their SHA-256; the file is damaged or was edited"
        )
    return tensors, json.loads(text)


def written_here(path: Path) -> bool:
    """Whether this suite wrote the file; CheckpointError where it is missing, or a damaged safetensors file."""
    return not pickled(path) and read_safetensors(path)[1].get("format") == FORMAT


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """The SHA-256 that `save_tensors` would store."""
    return _sha256(tensors, json.dumps(dict(metadata), default=_plain))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of anybody's safetensors file; CheckpointError where `path` is not one, in full."""
    if pickled(path):
        raise CheckpointError(
            f"{path}: a pickled file can run code, and is no checkpoint of this suite; `robust certify` and `attack` "
            "take its weights, and nothing else in it, with --model"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated, damaged or no safetensors file ({error}); copy or save it again"
        ) from None


def pickled(path: Path) -> bool:
    """Whether the file looks like a pickle, by its first bytes or else by its name; nothing is unpickled.

    Raises:
        CheckpointError: there is no such file, or it is a folder.
    """
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder, expected a file, such as {path / 'checkpoint.safetensors'}")
        raise CheckpointError(f"{path}: no such file{_near(path)}")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file has its header's length in 8 bytes and then "{". The length can equal a pickle's first bytes.
    if start[8:] == b"{":
        return False
    zipped, protocol = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80"
    return zipped or protocol or path.suffix.lower() in PICKLE_SUFFIXES


def _near(path: Path) -> str:
    """Where a missing file was looked for, and the name there that it may have been meant to have."""
    there = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f" (looked for {path.resolve()}{f'; did you mean {path.parent / near[0]}?' if near else ''})"


def _sha256(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash of a sequence of length-prefixed parts, so that no two contents give the same sequence of bytes."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(f"{FORMAT} {VERSION}".encode())
    add(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        add(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        add(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """JSON form of a number of numpy or torch, and of a path."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"metadata holds {value!r} of type {type(value).__qualname__}, which JSON cannot store")
