"""Ctrl-C and SIGTERM, noted and obeyed where work can stop without being left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first Ctrl-C or SIGTERM only sets `asked`; a second one raises KeyboardInterrupt at once.

    Signals that the process ignores (a background job's Ctrl-C) stay ignored. Outside the main thread, where Python
    allows no signal handlers, the context does nothing.

    Attributes:
        asked: whether the work is to stop at its next safe point.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None is a handler that C code installed and Python could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt as Ctrl-C does, unless somebody handles or ignores it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
