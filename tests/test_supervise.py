"""What a job of several processes ends with, on a clock of the test's; and real processes that end together."""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from rlhf.supervise import LAST_WORDS, Ends, kill_session, supervise

TERM, KILL = -signal.SIGTERM, -signal.SIGKILL


def job(*ended: tuple[int, int, float], size: int = 2, stopped: float | None = None) -> Ends:
    """Ranks that ended as (rank, code, time); a grace of 100 s."""
    ends = Ends(size, 100.0)
    if stopped is not None:
        ends.stopped(signal.SIGTERM, stopped)
    for rank, code, now in ended:
        ends.ended(rank, code, now)
    return ends


def test_all_well_is_0() -> None:
    ends = job((1, 0, 5.0), (0, 0, 7.0))
    assert (ends.code, ends.message(), ends.running, ends.deadline) == (0, None, False, math.inf)


def test_the_first_failing_ranks_code_counts_and_the_others_have_some_seconds() -> None:
    ends = job((1, 10, 5.0))
    assert ends.running and ends.deadline == 5.0 + LAST_WORDS < 5.0 + 30.0
    ends.ended(0, 1, 6.0)
    assert (ends.code, ends.message(), ends.running) == (10, None, False)
    assert ends.deadline == 5.0 + LAST_WORDS


def test_a_rank_that_a_signal_ended_is_128_and_named() -> None:
    ends = job((1, KILL, 5.0), (0, 1, 5.5))
    assert ends.code == 137
    cause = "was ended by signal 9 (Killed), as a machine out of memory does"
    assert ends.message() == f"rank 1 of 2 {cause}: run the same command again to go on"
    assert "the worker process was ended by signal 15" in str(job((0, TERM, 1.0), size=1).message())


def test_a_stop_is_75_and_has_its_time() -> None:
    ends = job(stopped=50.0)
    assert ends.deadline == 150.0
    ends.stopped(signal.SIGTERM, 60.0)
    assert ends.deadline == 150.0, "a second signal gives no more time"
    ends.ended(0, 75, 70.0)
    assert ends.deadline == 150.0
    ends.ended(1, 75, 71.0)
    assert (ends.code, ends.message()) == (75, None)


def test_a_rank_that_checkpointed_leaves_the_others_the_time_to() -> None:
    assert job((0, 75, 10.0)).deadline == 110.0


def test_a_stop_before_the_handlers_are_there_is_75_too() -> None:
    ends = job((1, TERM, 51.0), (0, 1, 52.0), stopped=50.0)
    assert ends.code == 75 and "was stopped before it began" in str(ends.message())
    assert job((1, 1, 51.0), (0, 75, 52.0), stopped=50.0).code == 75, "its peer was faster, and left it alone"


def test_a_crash_under_a_stop_is_no_75() -> None:
    assert job((1, 1, 51.0), (0, 1, 52.0), stopped=50.0).code == 1
    late = job((0, KILL, 150.0), (1, KILL, 150.0), stopped=50.0)
    assert late.code == 137 and "did not stop within launch.grace_seconds=100" in str(late.message())


def python(code: str) -> partial[subprocess.Popen[bytes]]:
    return partial(subprocess.Popen, [sys.executable, "-S", "-c", code])


def test_one_failing_process_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlhf.supervise.LAST_WORDS", 0.1)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    waits = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    assert supervise([python(waits), python("raise SystemExit(12)"), python(waits)], 100.0) == 12
    assert capsys.readouterr().err == ""
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_reaches_every_process_and_the_codes_come_back(tmp_path: Path) -> None:
    """The second process sends the stop signal to its launcher, this one, once the first is ready; both get it."""
    ends_75 = "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    os.mkfifo(tmp_path / "ready")
    waits = f"{ends_75}open({str(tmp_path / 'ready')!r}, 'w').close()\nsignal.pause()"
    asks = f"{ends_75}open({str(tmp_path / 'ready')!r}).read()\nos.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    started: list[subprocess.Popen[bytes]] = []

    def begin(code: str) -> subprocess.Popen[bytes]:
        started.append(python(code)())
        return started[-1]

    assert supervise([partial(begin, waits), partial(begin, asks)], 5.0) == 75
    assert [process.returncode for process in started] == [75, 75]


def test_what_a_launcher_has_started_ends_with_it() -> None:
    """The launcher sends this process the stop signal and does not heed it; it and its child hold a pipe open."""
    reading, writing = os.pipe()
    command = ["sh", "-c", "sleep 30 & kill -TERM $PPID; wait"]
    start = partial(subprocess.Popen, command, start_new_session=True, pass_fds=(writing,))
    assert supervise([start], 0.1, lambda *_: None, kill_session) == 137
    os.close(writing)
    assert select.select([reading], [], [], 5.0)[0] and os.read(reading, 1) == b""
    os.close(reading)


def test_a_start_that_fails_leaves_no_process() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        started.append(python("import signal; signal.pause()")())
        return started[0]

    def fail() -> subprocess.Popen[bytes]:
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        supervise([begin, fail], 100.0)
    assert started[0].returncode == KILL
