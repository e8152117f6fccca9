"""Several processes that share the blocks of one evaluation through the store of torch.distributed.

Started by torchrun, on one host or on several. Rank 0 hands out the work and writes the report; every rank, 0 included,
takes the next block that nobody has, so a slow device only takes fewer. A block whose owner is lost (its pulse stops)
is taken up by another rank. A block decided twice, by a rank that was only thought lost, is decided alike: its rows
depend on nothing but its number.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import DistError, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

BEAT = 0.5
"""Seconds between two beats of a rank's pulse."""

LOST_AFTER = 15.0
"""Seconds without a beat after which a rank is taken to be lost. Longer than native code keeps a process from beating
in the usual case; where it is not, a block is decided twice and nothing else happens."""

POLL = 0.1

Records = list[dict[str, Any]]
"""Rows of a block in their JSON form."""


class CrewError(RuntimeError):
    """The other processes cannot be reached; one line."""


class Crew:
    """This process among those of one torchrun.

    Attributes:
        rank, size: number of this process, and how many there are.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size, self._store = rank, size, store
        # Of this process, not of its rank: a process that torchrun starts in the place of a lost one is another.
        self._name = f"{rank}-{secrets.token_hex(8)}"
        self._beats: dict[str, tuple[int, float]] = {}
        store.set(f"member/{rank}", self._name)
        self._finished: set[int] = set()
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    @classmethod
    def join(cls, task: str = "") -> Crew | None:
        """The crew that torchrun started this process for; None outside of torchrun or for a single process.

        A crew does one thing; processes that do several together form one for each, under a name of its own.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        store, rank, size = next(iter(rendezvous("env://")))
        # torchrun may keep its store when it restarts its processes; what the former ones left there is of no use.
        crew = cls(PrefixStore(f"crew/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{task}", store), rank, size)
        atexit.register(crew._end)
        return crew

    def lead(
        self,
        header: dict[str, Any],
        todo: Sequence[int],
        decide: Callable[[int], Records],
        accept: Callable[[Records], None],
    ) -> None:
        """Rank 0: hand out the blocks `todo`, and decide some of them.

        A thread beside this one gives the rows of each block to `accept` as soon as some rank has decided it.
        """
        self._store.set("plan", json.dumps({"header": header, "todo": list(todo)}))
        halted = threading.Event()
        collector = threading.Thread(target=self._collect, args=(todo, accept, halted))
        collector.start()
        try:
            self._work(todo, decide)
        except BaseException:
            halted.set()
            raise
        finally:
            collector.join()
        self._raise_failure()

    def follow(self, header: dict[str, Any], decide: Callable[[int], Records]) -> Records:
        """Other ranks: decide blocks until none is left; the rows of the whole report, from rank 0.

        Raises:
            CrewError: this process evaluates something else than rank 0, or rank 0 is gone.
        """
        try:
            plan = json.loads(self._await("plan"))
            different = sorted(name for name in header if header[name] != plan["header"].get(name))
            if different:
                raise CrewError(f"rank {self.rank} evaluates something else than rank 0: {', '.join(different)} differ")
            self._work(plan["todo"], decide)
            rows: Records = json.loads(self._await("report"))
            self._store.set(f"bye/{self.rank}", "")
        except DistError as error:
            raise CrewError(
                "rank 0, which writes the report, is gone; the same command goes on where it stopped"
            ) from error
        finally:
            self._end()
        return rows

    def dismiss(self, rows: Records) -> None:
        """Rank 0: give the others the finished report, and wait until each has it or is lost."""
        self._store.set("report", json.dumps(rows))
        waiting = set(range(1, self.size))
        while waiting:
            waiting = {r for r in waiting if not self._store.check([f"bye/{r}"]) and not self._is_lost(self._member(r))}
            time.sleep(POLL)
        self._end()

    def _end(self) -> None:
        """Stop the pulse: a thread that comes back from native code while the interpreter ends aborts the process."""
        self._ended.set()
        self._pulse.join(LOST_AFTER)

    def _collect(self, todo: Sequence[int], accept: Callable[[Records], None], halted: threading.Event) -> None:
        try:
            left = list(todo)
            while left:
                last = halted.is_set()
                ready = [number for number in left if self._is_finished(number)]
                for number in ready:
                    left.remove(number)
                    accept(json.loads(self._store.get(_rows(number))))
                if last:
                    return
                if not ready:
                    halted.wait(POLL)
        except BaseException as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self, todo: Sequence[int], decide: Callable[[int], Records]) -> None:
        while (number := self._claim(todo)) is not None:
            self._store.set(_rows(number), json.dumps(decide(number)))
            self._raise_failure()

    def _claim(self, todo: Sequence[int]) -> int | None:
        """The next block for this rank, waiting for those of others that may yet be lost; None when all are done."""
        while (ticket := self._store.add("tickets", 1) - 1) < len(todo):
            if self._take(todo[ticket], ""):
                return todo[ticket]
        while left := [number for number in todo if not self._is_finished(number)]:
            self._raise_failure()
            for number in left:
                owner = self._store.get(_owner(number)).decode() if self._store.check([_owner(number)]) else ""
                if (not owner or self._is_lost(owner)) and self._take(number, owner):
                    return number
            time.sleep(POLL)
        return None

    def _take(self, number: int, owner: str) -> bool:
        """Become the owner of a block in place of `owner`, unless another rank was faster."""
        return self._store.compare_set(_owner(number), owner, self._name) == self._name.encode()

    def _is_finished(self, number: int) -> bool:
        if number not in self._finished and self._store.check([_rows(number)]):
            self._finished.add(number)
        return number in self._finished

    def _member(self, rank: int) -> str:
        """Name of the process of a rank, also of one that never came."""
        return self._store.get(f"member/{rank}").decode() if self._store.check([f"member/{rank}"]) else f"{rank}-none"

    def _is_lost(self, name: str) -> bool:
        """Whether a process's pulse has stood still for LOST_AFTER seconds of this process's watching."""
        if name == self._name:
            return False
        beats, now = self._store.add(f"pulse/{name}", 0), time.monotonic()
        before, since = self._beats.get(name, (-1, now))
        if beats != before:
            self._beats[name] = beats, now
            return False
        return now - since > LOST_AFTER

    def _await(self, key: str) -> bytes:
        # Not Store.wait: it would keep the connection from the pulse.
        while not self._store.check([key]):
            time.sleep(POLL)
        return self._store.get(key)

    def _beat(self) -> None:
        try:
            while not self._ended.wait(BEAT):
                self._store.add(f"pulse/{self._name}", 1)
        except DistError:  # the store is gone; the main thread notices and says so
            return


def _rows(number: int) -> str:
    return f"rows/{number}"


def _owner(number: int) -> str:
    return f"owner/{number}"
