from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import TrackerConfig, TrackerMode
from rlhf.tracking import JsonlTracker, open_tracker, read_lines


def log(folder: Path, steps: list[int], value: float) -> None:
    tracker = JsonlTracker(folder)
    for step in steps:
        tracker.log({"loss": value}, step)
        tracker.log({"eval": value}, step)
        tracker.samples([{"text": "a"}], step)


def test_a_resumed_run_replaces_the_lines_that_it_logs_again(tmp_path: Path) -> None:
    log(tmp_path, [1, 2, 3], 0.5)
    log(tmp_path, [3, 4], 0.25)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("loss")) for r in lines if "loss" in r] == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]
    assert len(lines) == 8
    assert [r["step"] for r in read_lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, [1], 0.5)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    log(tmp_path, [2], 0.25)
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2]


@pytest.mark.slow
def test_wandb_offline_replays_what_was_logged_before_the_kill(tmp_path: Path) -> None:
    log(tmp_path, [1, 2], 0.5)
    names = {"group": "g", "stage": "sft", "folder": str(tmp_path)}
    tracker = open_tracker(TrackerConfig(mode=TrackerMode.offline), tracker_folder(tmp_path), names, {"seed": 0})
    tracker.log({"loss": 0.25}, 3)
    tracker.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_two_wandb_runs_at_a_time_stay_apart(tmp_path: Path) -> None:
    """As a reward model beside the first has one while its stage's is open."""
    trackers = []
    for name in ("rm", "holdout"):
        (tmp_path / name).mkdir()
        names = {"group": "g", "stage": name, "folder": str(tmp_path / name)}
        trackers.append(open_tracker(TrackerConfig(mode=TrackerMode.offline), tmp_path / name, names, {"seed": 0}))
    for tracker in reversed(trackers):
        tracker.log({"loss": 0.25}, 1)
        tracker.finish()
    for name in ("rm", "holdout"):
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))) == 1


def tracker_folder(folder: Path) -> Path:
    return folder
