"""What the system refuses (a full disk, a folder without permission) is one line with the file and what to do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import files
from robust.cli import main
from robust.files import JsonLines, write_whole
from robust.tensor_file import save_tensors

TRAIN = "train --model cnn3:width=2 --objective natural --epochs 1 --quiet --device cpu --out run".split()


@pytest.fixture
def tight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A folder in which no file can grow beyond some bytes, which is how a full disk looks to a program."""
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_during_training_is_named_with_the_file(
    tight: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    tight(3000)
    code = main(TRAIN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert err.startswith("robust: run/checkpoint.safetensors") and "File too large" in err
    assert not list(Path("run").glob(".*")), "nothing half written is left"
    assert main(TRAIN) == 0, "with space the same command goes on"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space, or give --out a folder on another disk"),
        (errno.EACCES, "Permission denied; give a place that you may read and write, with --out or --root"),
        (errno.EROFS, "Read-only file system; give --out a folder that can be written"),
    ],
)
def test_a_write_that_the_system_refuses_is_one_line(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refused)
    assert main(TRAIN) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("robust: run/") and words in err, err


def test_an_output_below_a_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*TRAIN[:-1], str(tmp_path / "file" / "run")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "file/run: Not a directory; a part of that path is a file" in err


def test_writers_name_the_file_that_could_not_be_written(tight: Callable[[int], None]) -> None:
    tight(100)
    with pytest.raises(OSError, match=r"a\.txt"):
        write_whole(Path("a.txt"), "x" * 1000)
    with pytest.raises(OSError, match=r"b\.safetensors") as refusal:
        save_tensors(Path("b.safetensors"), {"x": torch.zeros(1000)}, {})
    assert refusal.value.errno == errno.EFBIG
    with JsonLines(Path("c.jsonl")) as lines, pytest.raises(OSError, match=r"c.jsonl"):
        lines.append([{"x": "y" * 1000}])
    assert [path.name for path in Path().iterdir()] == ["c.jsonl"]
