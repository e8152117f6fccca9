"""Ctrl-C and SIGTERM, noted and obeyed where work can stop without being left half done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()
"""By which an interrupt comes again that Python dropped; Windows has none."""

USUAL = (signal.SIG_DFL, signal.default_int_handler)
"""What handles a signal in a process where nobody has said otherwise."""


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


class _Leave:
    """Signal handler that ends the process at once, with one line from the first of torchrun's processes."""

    def __init__(self, command: str) -> None:
        self.line = f"{command}: interrupted\n".encode()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, self.line)
        os._exit(130)


def leave_at_a_signal(command: str) -> None:
    """For a process that is a command: from here to `termination_interrupts`, Ctrl-C and SIGTERM end it in one line.

    There is nothing to save yet, and an exception would have to find its way out of half imported modules. Behind
    `termination_interrupts` the process ignores both signals: its answer is given, and only the interpreter is left to
    end. Signals that somebody handles or ignores are left alone.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in USUAL:
            signal.signal(number, _Leave(command))


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt as Ctrl-C does, unless somebody handles or ignores it.

    Python drops what is raised in a weak reference's callback or in __del__; the interrupt then comes again behind it.
    Where C++ made another error of the interrupt, it leaves the context as KeyboardInterrupt all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *AGAIN)}
    before = {number: h for number, h in before.items() if h in USUAL or isinstance(h, _Leave)}
    hook, asked, over = sys.unraisablehook, False, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not over:
            asked = True
            raise KeyboardInterrupt

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt) and set(AGAIN) & set(before):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(dropped)

    for number in before:
        signal.signal(number, interrupt)
    sys.unraisablehook = again
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        over = True
        sys.unraisablehook = hook
        if set(AGAIN) & set(before):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if isinstance(handler, _Leave) else handler)
