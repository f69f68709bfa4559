"""The watchdog of a rank: where its work is, and an end to it when nothing has moved for too long. No torch.

Ranks that wait for each other wait for ever if one of them took another way. The work says where it is (`phase`) and
that it goes on (`beat`); a thread looks at that, also while the work waits inside a library. Each rank's state lies in
a small file that all can read, so that the message can name every rank and its phase, whatever launcher started them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STARTING = "starting"


@dataclass(slots=True)
class State:
    """What a rank says about itself. `moved` is its clock's time of the last beat or change of phase; nobody waits for
    an idle rank."""

    phase: str = STARTING
    beats: int = 0
    moved: float = 0.0
    idle: bool = True

    def stalled(self, now: float, limit: float) -> bool:
        """True if the work has not moved for more than `limit` seconds."""
        return not self.idle and now - self.moved > limit


_state = State()


@contextmanager
def phase(name: str, *, idle: bool = False) -> Iterator[None]:
    """Inside, the work is at `name`. Idle: it may take as long as it likes, as a rank that waits for orders does."""
    before = (_state.phase, _state.idle)
    _enter(name, idle)
    try:
        yield
    finally:
        _enter(*before)


def _enter(name: str, idle: bool) -> None:
    _state.phase, _state.idle, _state.moved = name, idle, time.monotonic()


def beat() -> None:
    """The work has moved: an update, a batch of responses."""
    _state.beats += 1
    _state.moved = time.monotonic()


def describe(states: dict[int, tuple[State, float]]) -> str:
    """One line a rank, the one that moved least often first; each with the seconds since it last wrote its state."""
    order = sorted(states, key=lambda rank: (states[rank][0].beats, rank))
    shown = []
    for rank in order:
        state, age = states[rank]
        silent = f", which itself has not been heard of for {age:.0f} s" if age > 60 else ""
        shown.append(f"  rank {rank}: in {state.phase}, after {state.beats} signs of progress{silent}")
    return "\n".join(shown)


class Watchdog:
    """Writes this rank's state to `folder` and calls `act` with a message once it has stalled."""

    def __init__(self, rank: int, folder: Path, limit: float, act: Callable[[str], None]) -> None:
        self.rank, self.folder, self.limit, self.act = rank, folder, limit, act
        self._ended = threading.Event()

    def start(self) -> None:
        """Look from a thread of its own until the process ends or `stop` is called."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(10.0, self.limit / 4)):
            if self.look(time.monotonic()):
                return

    def look(self, now: float) -> bool:
        """Write the state; True if the work has stalled, after `act`. A full disk keeps nobody from looking."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f".{self.rank}.part"
            part.write_text(json.dumps(asdict(_state)), encoding="utf-8")
            part.replace(self.folder / f"{self.rank}.json")
        if not _state.stalled(now, self.limit):
            return False
        self.act(
            f"rank {self.rank} has not moved for {now - _state.moved:.0f} s (launch.hang_seconds={self.limit:g}), in "
            f"{_state.phase}. All ranks, the least advanced first:\n{describe(self.read())}"
        )
        return True

    def read(self) -> dict[int, tuple[State, float]]:
        """Each rank's state and its age in seconds."""
        found = {}
        for path in self.folder.glob("*.json"):
            written = path.stat().st_mtime
            found[int(path.stem)] = (State(**json.loads(path.read_text(encoding="utf-8"))), time.time() - written)
        return found


def end_process(message: str) -> None:
    """Say what hangs and where the interpreter stands, give the other ranks the time to say theirs, and end."""
    sys.stderr.write(f"error: {message}\n")
    faulthandler.dump_traceback(sys.stderr)
    sys.stderr.flush()
    threading.Event().wait(5.0)
    os._exit(1)
