"""Processes that are started together end together: pass on stop signals, end the rest when one fails. No torch.

Torch's elastic launcher does the same for the ranks of a machine. It is not used: it raises the stop signal instead of
giving back what the ranks ended with, kills them 30 s after it, and would bring torch into the composing process.
"""

from __future__ import annotations

import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import Popen
from typing import Any

from rlhf.errors import Preempted

LAST_WORDS = 10.0  # seconds that the other ranks have to end by themselves once one has failed


class Ends:
    """How the ranks of one job ended so far, and until when the rest may go on. Times are seconds of one clock."""

    def __init__(self, size: int, grace: float) -> None:
        self.size, self.grace = size, grace
        self.codes: dict[int, int] = {}  # by rank; negative: the signal that ended it
        self.first: tuple[int, int] | None = None  # the first rank that did not end well, and its code
        self.signal: int | None = None  # the stop signal that was passed on
        self.deadline = math.inf

    def ended(self, rank: int, code: int, now: float) -> None:
        """A rank is gone. One that checkpointed (75) leaves the others the time to; after any other failure they wait
        for a rank that never comes."""
        self.codes[rank] = code
        if code and self.first is None:
            self.first = (rank, code)
            self.deadline = min(self.deadline, now + (self.grace if code == Preempted.exit_code else LAST_WORDS))

    def stopped(self, number: int, now: float) -> None:
        """A stop signal came and was passed on."""
        if self.signal is None:
            self.signal, self.deadline = number, min(self.deadline, now + self.grace)

    @property
    def running(self) -> bool:
        return len(self.codes) < self.size

    @property
    def code(self) -> int:
        """What the job ends with: the first failing rank's code, 128 + n if signal n ended it, 75 if it was stopped."""
        if self.first is None:
            return 0
        if self.signal is not None and (Preempted.exit_code in self.codes.values() or self.first[1] == -self.signal):
            return Preempted.exit_code
        code = self.first[1]
        return code if code >= 0 else 128 - code

    def message(self) -> str | None:
        """What to tell where the first rank that failed could not say anything itself."""
        if self.first is None or self.first[1] >= 0:
            return None
        rank, number = self.first[0], -self.first[1]
        who = "the worker process" if self.size == 1 else f"rank {rank} of {self.size}"
        again = "run the same command again to go on"
        if self.signal == number:
            return f"{who} was stopped before it began: {again}"
        if self.signal is not None and number == signal.SIGKILL:
            return f"{who} did not stop within launch.grace_seconds={self.grace:g} and was killed: {again}"
        cause = ", as a machine out of memory does" if number == signal.SIGKILL else ""
        return f"{who} was ended by signal {number} ({signal.strsignal(number)}){cause}: {again}"


def supervise(
    start: Sequence[Callable[[], Popen[Any]]], grace: float,
    stop: Callable[[int, list[Popen[Any]]], None] | None = None, kill: Callable[[Popen[Any]], None] = Popen.kill,
) -> int:  # fmt: skip
    """Start every rank, wait until all are gone, and give back the job's exit code; no process outlives the call.

    `stop(number, processes)` passes a stop signal on; without it every process gets the signal. `kill` ends a process
    whose time is over. An OSError of a start ends those that were started.
    """
    ends, gone = Ends(len(start), grace), queue.SimpleQueue[tuple[int, int]]()
    processes: list[Popen[Any]] = []

    def pass_on(number: int, _frame: object) -> None:
        ends.stopped(number, time.monotonic())
        if stop is not None:
            stop(number, processes)
            return
        for process in processes:
            process.send_signal(number)

    with _handling(pass_on):
        try:
            for rank, begin in enumerate(start):
                process = begin()
                processes.append(process)
                threading.Thread(target=_report, args=(rank, process, gone), daemon=True).start()
            while ends.running:
                _wait_for_one(ends, processes, gone, kill)
        finally:
            for process in processes:
                kill(process)  # nothing if it is gone
                process.wait()
    message = ends.message()
    if message:
        sys.stderr.write(f"error: {message}\n")
    return ends.code


def kill_session(process: Popen[Any]) -> None:
    """Kill a process that was started with a session of its own, and all that it has started there: another launcher's
    process is not the ranks, which would go on without it. Nothing that a process which ended by itself has left."""
    if process.poll() is None or process.returncode < 0:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _report(rank: int, process: Popen[Any], gone: queue.SimpleQueue[tuple[int, int]]) -> None:
    gone.put((rank, process.wait()))


def _wait_for_one(
    ends: Ends, processes: list[Popen[Any]], gone: queue.SimpleQueue[tuple[int, int]],
    kill: Callable[[Popen[Any]], None],
) -> None:  # fmt: skip
    """Until a rank is gone, or the time of the rest is over. Looks once a second, since a signal moves the deadline."""
    try:
        rank, code = gone.get(timeout=min(1.0, max(0.0, ends.deadline - time.monotonic())))
    except queue.Empty:
        if time.monotonic() >= ends.deadline:
            for process in processes:
                kill(process)
            ends.deadline = math.inf
        return
    ends.ended(rank, code, time.monotonic())


@contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C go to `handler` inside the block."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
