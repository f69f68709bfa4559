"""The process that does the work, one rank or the only one: `python -m rlhf.worker config.json`, started by
`rlhf.launch` or by a launcher of many machines."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import pulse
from rlhf.artifacts import sha256_text
from rlhf.config import Do
from rlhf.errors import Preempted, RLHFError
from rlhf.heap import keep_freed_memory
from rlhf.launch import PARENT_VARIABLE, STATES, from_plain
from rlhf.signals import STOP_FILE, StoppedAtOnce, install_stop_handler

if TYPE_CHECKING:
    from rlhf.config import Config
    from rlhf.engine.ranks import Ranks

_states: Path | None = None  # where several ranks say how they are


def die_with_launcher() -> None:
    """End this process when the launching one is killed: an orphan would hold the run directory. Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.environ.get(PARENT_VARIABLE, str(os.getppid())) != str(os.getppid()):
            os._exit(1)  # the launcher was gone before the call


def main() -> int:
    die_with_launcher()
    sys.path.append(os.getcwd())  # a user's own reward module, without letting the folder shadow this package
    spec = Path(sys.argv[1])
    install_stop_handler(spec.with_name(STOP_FILE))
    try:
        return work_as_a_rank(json.loads(spec.read_text(encoding="utf-8")))
    except StoppedAtOnce:
        error: RLHFError = Preempted("stopped by a signal: run the same command again to go on")
    except RLHFError as raised:
        error = raised
    if first_to_say(str(error)):
        sys.stderr.write(f"error: {error}\n")
    return error.exit_code


def first_to_say(message: str) -> bool:
    """True on one rank alone for each message: what stops all ranks alike is said once."""
    if _states is None:
        return True
    try:
        _states.mkdir(parents=True, exist_ok=True)
        (_states / sha256_text(message)[7:23]).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no place for the file: then each rank says it
        return True
    return True


def work_as_a_rank(plain: dict[str, Any]) -> int:
    """Join the other ranks, if there are any, and do what rank 0's configuration says; the exit code."""
    keep_freed_memory()
    mine = from_plain(plain)
    if mine.do is Do.report:
        from rlhf.report.verb import report

        return report(mine)
    from rlhf.engine.ranks import open_ranks

    with open_ranks(mine.launch, alone=mine.do is Do.run and mine.engine.kind.zero > 0) as ranks:
        cfg = from_plain(ranks.broadcast(plain))  # each has composed one where another launcher has started us
        if ranks.size == 1:
            from rlhf.verbs import dispatch

            return dispatch(cfg, ranks)
        return _one_of_many(cfg, ranks)


def _one_of_many(cfg: Config, ranks: Ranks) -> int:
    from rlhf.verbs import dispatch, obey

    global _states
    states = Path(cfg.run.dir) / STATES
    if ranks.is_main:
        shutil.rmtree(states, ignore_errors=True)  # of ranks that were killed
    ranks.barrier()
    _states = states
    if cfg.launch.hang_seconds is not None:
        pulse.Watchdog(ranks.rank, states, cfg.launch.hang_seconds, pulse.end_process).start()
    return dispatch(cfg, ranks) if ranks.is_main else obey(cfg, ranks)


if __name__ == "__main__":
    sys.exit(main())
