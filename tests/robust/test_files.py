"""Files that survive a kill: whole replacement and JSON lines with a torn tail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robust.files import FileInUse, JsonLines, encode, read_json_lines, replacing, write_whole

RECORDS = [{"index": 0, "name": "null, ü"}, {"index": 1, "value": 0.1}, {"index": 2, "value": [1, 2]}]


def test_a_replaced_file_holds_the_new_content_and_leaves_no_sibling(tmp_path: Path) -> None:
    path = tmp_path / "made" / "summary.json"
    write_whole(path, "old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write_whole(path, "old")
    with pytest.raises(RuntimeError, match="disk"), replacing(path) as sibling:
        sibling.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_files_obey_the_umask_as_any_other_file_does(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_whole(tmp_path / "whole", "x")
    with JsonLines(tmp_path / "lines"):
        pass
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "whole", "lines")}
    assert modes["whole"] == modes["lines"] == modes["plain"]


def test_records_come_back_and_are_appended_behind_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines(path) as lines:
        lines.append(RECORDS[:1])
    with JsonLines(path) as lines:
        assert lines.records == RECORDS[:1]
        lines.append(RECORDS[1:])
        assert lines.records == RECORDS
    assert read_json_lines(path) == RECORDS


def test_every_torn_tail_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    whole = b"".join(encode(record).encode() + b"\n" for record in RECORDS)
    path = tmp_path / "rows.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        assert read_json_lines(path) == RECORDS[:kept]
        with JsonLines(path) as lines:
            assert lines.records == RECORDS[:kept]
            lines.append(RECORDS[kept:])
        assert path.read_bytes() == whole


def test_zeros_left_by_a_power_cut_are_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\0" * 50)
    with JsonLines(path) as lines:
        lines.append([{"b": 2}])
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


@pytest.mark.parametrize("content", [b"some notes of mine", b"not json\n", b'{"a": 1}\n[1]\n', b'{"a": 1\n{"b": 2}\n'])
def test_a_file_that_no_kill_could_leave_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes, line [12]: expected one JSON object"):
        JsonLines(path)
    assert path.read_bytes() == content


def test_records_behind_the_kept_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines(path) as lines:
        lines.append(RECORDS)
        lines.keep(1)
        lines.append([{"index": 9}])
    assert read_json_lines(path) == [RECORDS[0], {"index": 9}]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with JsonLines(path), pytest.raises(FileInUse, match=r"rows\.jsonl is being written"):
        JsonLines(path)
    JsonLines(path).close()


def test_the_only_writer_removes_what_killed_ones_left_of_its_file(tmp_path: Path) -> None:
    for name in (".rows.jsonl.0a1b2c3d.part", ".rows.json.0a1b2c3d.part"):
        (tmp_path / name).write_text("half of the n")
    JsonLines(tmp_path / "rows.jsonl").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rows.json.0a1b2c3d.part", "rows.jsonl"]


@pytest.mark.parametrize("anew", [False, True], ids=["removed", "replaced"])
def test_a_writer_whose_file_is_gone_stops_and_leaves_what_another_has_there(anew: bool, tmp_path: Path) -> None:
    path = tmp_path / "run" / "rows.jsonl"
    with JsonLines(path) as lines:
        lines.append(RECORDS[:1])
        shutil.rmtree(path.parent)
        if anew:
            JsonLines(path).close()
        with pytest.raises(OSError, match="removed or replaced while") as refusal:
            lines.append(RECORDS[1:])
    assert refusal.value.filename == str(path)
    assert path.read_bytes() == b"" if anew else not path.parent.exists()


def test_what_json_lacks_becomes_null_and_numpy_numbers_are_read() -> None:
    record = {
        "nan": float("nan"),
        "deep": [float("inf"), {"x": -float("inf")}],
        "np": np.float32(0.5),
        "path": Path("a/b"),
    }
    assert json.loads(encode(record)) == {"nan": None, "deep": [None, {"x": None}], "np": 0.5, "path": "a/b"}
    with pytest.raises(TypeError):
        encode({"object": object()})


def test_appended_records_are_whole_lines_after_kill_minus_nine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    program = (
        "import sys; from pathlib import Path; from robust.files import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]))\n"
        "for i in range(10**9):\n"
        "    lines.append([{'index': i, 'padding': 'x' * 2000}])\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        reported = [int(output.readline()) for _ in range(20)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        reported += [int(line) for line in output.read().split()]
    with JsonLines(path) as lines:
        indices = [record["index"] for record in lines.records]
        assert indices == list(range(len(indices)))
        assert len(indices) >= len(reported)
