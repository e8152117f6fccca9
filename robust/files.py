"""Files that survive a killed process: replaced whole, or appended line by line.

A file written through `replacing` is either the old one or the new one, never a part. A `JsonLines` file may end in a
torn line after a kill; opening it again drops that line and goes on behind the last whole one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two writers of one file are then the user's own lookout
    fcntl = None  # type: ignore[assignment]


class FileInUse(RuntimeError):
    """Another process is appending to the file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context whose value is a temporary sibling of `path`; at its end the sibling takes the place of `path`.

    The sibling reaches the disk before it is renamed, so after a crash `path` holds the old or the new content in full.
    If the block raises, `path` is untouched and the sibling is removed. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield sibling
        with sibling.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except OSError as error:
        raise _naming(path, error) from error
    finally:
        sibling.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_parts(path: Path) -> None:
    """Remove what killed processes left of `path` beside it; for a process that alone may write it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` so that no reader ever sees a part of it."""
    with replacing(path) as sibling:
        sibling.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def encode(record: Mapping[str, Any]) -> str:
    """One line of standard JSON; NaN and infinities, which it lacks, become null; numpy and torch numbers are read."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


class JsonLines:
    """Append-only file with one JSON object a line, for one writer at a time.

    The lock is on the file, not on its name: where somebody removes the folder, another writer can make it anew and
    lock its own. So the first one looks whether the name still means its file (`require_in_place`) before it writes.

    Attributes:
        records: the objects in the file, those of earlier runs included.

    Raises:
        FileInUse: another process has the file open as JsonLines.
        ValueError: a line is no JSON object and no torn one, so the file is not one that a kill could leave.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            _lock(self._file.fileno(), self.path)
            remove_parts(self.path)
            self.records, self._ends = _whole_lines(self._file.read(), self.path)
            self.keep(len(self.records))
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records at the end; they are on the disk when this returns."""
        self.require_in_place()
        lines = [encode(record).encode("utf-8") + b"\n" for record in records]
        try:
            self._write(b"".join(lines))
            self._sync()
        except OSError:
            with contextlib.suppress(OSError):
                self.keep(len(self.records))  # what a full disk took of a line would tear the next one
            raise
        for line in lines:
            self.records.append(json.loads(line))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(line))

    def keep(self, count: int) -> None:
        """Drop every record behind the first `count`."""
        del self.records[count:], self._ends[count:]
        end = self._ends[-1] if self._ends else 0
        self._file.seek(end)
        self._file.truncate()
        self._sync()

    def require_in_place(self) -> None:
        """OSError where somebody removed or replaced the file; what is in its folder may then be another process's."""
        there = self.path.stat() if self.path.exists() else None
        if there is None or not os.path.samestat(there, os.fstat(self._file.fileno())):
            words = "was removed or replaced while it was being written; what was to follow is not kept"
            raise OSError(errno.ESTALE, words, str(self.path))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        # Unbuffered: a buffer that could not be written would be tried, and fail, again when the file is closed.
        left = memoryview(content)
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                raise _naming(self.path, error) from error

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _naming(self.path, error) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole records of a JSON-lines file, a torn last line left out; the file is not changed.

    Raises:
        FileNotFoundError, or ValueError naming the line that is no JSON object.
    """
    return _whole_lines(Path(path).read_bytes(), Path(path))[0]


def _whole_lines(content: bytes, path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Records and the byte offset behind each, up to the tail that a kill may have torn."""
    *lines, tail = content.split(b"\n")
    records: list[dict[str, Any]] = []
    ends: list[int] = []
    for number, line in enumerate(lines, start=1):
        record = _object(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}")
        records.append(record)
        ends.append((ends[-1] if ends else 0) + len(line) + 1)
    # A torn record begins like a whole one, or is zeros where the length reached the disk before the text did.
    # Anything else was written by somebody else and is not ours to drop.
    if tail.strip(b"\0") and not tail.startswith(b"{"):
        raise ValueError(f"{path}, line {len(lines) + 1}: expected one JSON object, got {tail[:60]!r}")
    return records, ends


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are both
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, float) and hasattr(value, "item"):
        return _finite(value.item())
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _naming(path: Path, error: OSError) -> OSError:
    """The error with the name of the file: a full disk's has none, a temporary file's means nothing to a user."""
    known = error.filename is not None and Path(error.filename).parent != path.parent
    return error if known or error.errno is None else OSError(error.errno, error.strerror, str(path))


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileInUse(f"{path} is being written by another process; wait for it or choose another file") from None
    except OSError:
        return  # a file system without locks


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
