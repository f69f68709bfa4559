"""SIGTERM and Ctrl-C ask the work to stop: it checkpoints at the next update and ends with 75."""

from __future__ import annotations

import signal

_asked = False


def _ask(_signal: int, _frame: object) -> None:
    global _asked
    _asked = True


def install_stop_handler() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)


def stop_asked() -> bool:
    """True once a stop signal has come."""
    return _asked
