"""When a rank counts as hanging, and what is said then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf import pulse
from rlhf.console import progress
from rlhf.pulse import State, Watchdog, describe


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(pulse, "_state", State())
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    yield now


def test_only_a_phase_that_is_not_idle_stalls(clock: list[float], tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(1, tmp_path, 60.0, said.append)
    assert not dog.look(1e9), "before any phase"
    with pulse.phase("sft"):
        assert not dog.look(160.0), "60 s are allowed"
        assert dog.look(160.5) and "rank 1 has not moved for 60 s (launch.hang_seconds=60), in sft" in said[0]
        clock[0] = 150.0
        pulse.beat()
        assert not dog.look(210.0) and dog.look(210.5)
        with pulse.phase("waiting for rank 0", idle=True):
            assert not dog.look(1e9)
        assert dog.look(210.5), "back in the phase around it"
        clock[0] = 300.0
    assert not dog.look(1e9)


def test_a_bar_is_a_phase_and_its_updates_are_beats(clock: list[float], tmp_path: Path) -> None:
    dog = Watchdog(0, tmp_path, 60.0, lambda _: None)
    with progress(10, "ppo") as bar:
        clock[0] = 150.0
        bar.advance(loss=1.0)
        assert not dog.look(205.0)
        state, _ = dog.read()[0]
        assert (state.phase, state.beats, state.moved, state.idle) == ("ppo", 1, 150.0, False)
        assert dog.look(211.0)


def test_the_message_names_every_rank_the_least_advanced_first(clock: list[float], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "2.json").write_text('{"phase": "rm", "beats": 0, "moved": 1.0, "idle": false}', encoding="utf-8")
    with pulse.phase("rm"):
        pulse.beat()
        Watchdog(0, tmp_path, 5.0, said.append).look(200.0)
    assert said[0].endswith(
        "All ranks, the least advanced first:\n  rank 2: in rm, after 0 signs of progress\n"
        "  rank 0: in rm, after 1 signs of progress"
    )


def test_a_rank_that_cannot_write_its_state_is_watched_all_the_same(clock: list[float], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").touch()
    with pulse.phase("rm"):
        assert Watchdog(0, tmp_path / "file" / "ranks", 5.0, said.append).look(200.0)
    assert said[0].startswith("rank 0 has not moved for 100 s")


def test_a_rank_that_writes_no_more_is_said_to_be_silent() -> None:
    lines = describe({0: (State("sft", 3), 2.0), 1: (State("sft", 3), 95.0)}).splitlines()
    assert lines[0] == "  rank 0: in sft, after 3 signs of progress"
    assert lines[1] == "  rank 1: in sft, after 3 signs of progress, which itself has not been heard of for 95 s"
