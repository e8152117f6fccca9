"""Signals wait for a safe point, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from robust import interruption
from robust.interruption import SIGNALS, Interruption, termination_interrupts
from tests.robust.runs import REPOSITORY, start


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_waits_and_the_second_does_not(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert not interruption.asked
        signal.raise_signal(number)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.usefixtures("listening")
def test_handlers_are_put_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(OSError, match="disk"), Interruption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise OSError("disk")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_touched() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interruption() as interruption:
            seen.append((interruption.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_sigterm_is_a_ctrl_c_unless_somebody_handles_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), termination_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with termination_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_that_python_drops_comes_again(number: signal.Signals) -> None:
    """As where a tensor that a WeakKeyDictionary knew is freed at that very moment."""

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    alarm = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        freed = Freed()
        seen = weakref.ref(freed, lambda _: signal.raise_signal(number))
        del freed
        assert seen() is None
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is alarm and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.usefixtures("listening")
def test_an_interrupt_that_became_another_error_is_one_again() -> None:
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("c10: an unknown error") from None
    with pytest.raises(RuntimeError, match="of its own"), termination_interrupts():
        raise RuntimeError("of its own")


def answered(script: str) -> tuple[int, str]:
    """Exit code and stderr of a process that runs the script as the command `robust`, by its console script's name."""
    lines = ["import os, signal, sys", "sys.argv = ['/usr/bin/robust']", "SIGNALS = (signal.SIGINT, signal.SIGTERM)"]
    lines += ["signal.signal(signal.SIGINT, signal.default_int_handler)", script]
    process = start(script="\n".join(lines))
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize("name", [number.name for number in SIGNALS])
def test_a_signal_during_the_imports_of_the_command_is_one_line(name: str) -> None:
    finder = """
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.%s)
sys.meta_path.insert(0, Finder())
import robust.cli
"""
    assert answered(finder % name) == (130, "robust: interrupted\n")
    assert answered("os.environ['RANK'] = '1'\n" + finder % name) == (130, "")


def test_signals_behind_the_answer_of_the_command_are_ignored_and_a_library_is_left_alone() -> None:
    behind = """
for number in SIGNALS:
    try:
        with file["termination_interrupts"]():
            signal.raise_signal(number)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGTERM)
"""
    library = f"import runpy\nfile = runpy.run_path({interruption.__file__!r})\n"
    assert answered(library + "file['leave_at_a_signal']('robust')" + behind) == (0, "")
    code, err = answered(library + behind)
    assert code == -signal.SIGINT and "KeyboardInterrupt" in err


@pytest.mark.slow
def test_a_users_own_package_that_imports_the_suite_keeps_its_signals(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import robust\n")
    (tmp_path / "mine" / "__main__.py").write_text(
        "import signal\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
    )
    path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    done = subprocess.run([sys.executable, "-m", "mine"], env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == 0
