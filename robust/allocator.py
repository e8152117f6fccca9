"""Keep freed memory for the next step, where the C library is glibc."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # mallopt(3)


def keep_freed_memory() -> bool:
    """Have this process keep freed memory instead of giving it back; whether that could be asked for.

    A training step and a backward bound allocate the same large tensors again and again. By default glibc returns
    them to the system, and the next step pays for clearing every page anew: a tenth of a CROWN-IBP step on a small net
    (scripts/bench/RESULTS.md). For a process of its own, like the command line; a library call leaves it alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    # 32 MiB is the largest threshold that glibc takes for blocks of their own; the others are bounded by an int.
    wanted = ((MMAP_THRESHOLD, 32 * 2**20), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 * 2**20))
    return all(library.mallopt(option, value) for option, value in wanted)
