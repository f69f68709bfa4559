"""The process that does the work: `python -m rlhf.worker config.json`, started by `rlhf.launch`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from rlhf.errors import Preempted, RLHFError
from rlhf.launch import PARENT_VARIABLE, from_plain
from rlhf.signals import StoppedAtOnce, install_stop_handler


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
    install_stop_handler()
    try:
        cfg = from_plain(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        from rlhf.verbs import dispatch

        return dispatch(cfg)
    except StoppedAtOnce:
        error: RLHFError = Preempted("stopped by a signal: run the same command again to go on")
    except RLHFError as raised:
        error = raised
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
