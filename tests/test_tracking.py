from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_files import segments

from rlhf.config import TrackerConfig, TrackerMode
from rlhf.tracking import JsonlTracker, open_tracker, publish, read_lines

OFFLINE = TrackerConfig(mode=TrackerMode.offline)


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


def wandb_tracker(folder: Path) -> Any:
    names = {"group": "g", "stage": "ppo", "folder": str(folder)}
    return open_tracker(OFFLINE, folder, names, {"seed": 0})


KILLED = """
import os, sys
from pathlib import Path
from test_tracking import wandb_tracker
tracker = wandb_tracker(Path(sys.argv[1]))
for step in (1, 2, 3):
    tracker.samples([{"text": f"old {step}"}], step)
    tracker.log({"loss": 0.5, "rollout/tokens": 10.0, "rollout/episodes": 2.0}, step)
os._exit(9)
"""


@pytest.mark.slow
def test_the_newest_wandb_file_of_a_resumed_run_is_complete(tmp_path: Path) -> None:
    """A process that ends without `finish` may leave an empty file: the next one shows all steps, in their order, and
    only once, with the samples between the metrics of their steps."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 9
    tracker = wandb_tracker(tmp_path)
    tracker.samples([{"text": "new 3"}], 3)
    for step in (3, 4):
        tracker.log({"loss": 0.25, "rollout/tokens": 10.0, "rollout/episodes": 2.0}, step)
    tracker.finish()
    found = segments(tmp_path)
    assert len(found) == 2 and len({segment.run_id for segment in found}) == 1
    newest = found[-1]
    rows = newest.rows
    assert [(row["_step"], row["update"], row["loss"]) for row in rows] == [
        (1, 1, 0.5),
        (2, 2, 0.5),
        (3, 3, 0.25),
        (4, 4, 0.25),
    ]
    assert [(row["tokens"], row["episodes"]) for row in rows] == [(10, 2), (20, 4), (30, 6), (40, 8)]
    tables = [row["eval/samples/path"] for row in rows if "eval/samples/path" in row]
    shown = [json.loads((newest.path.parent / "files" / path).read_text())["data"] for path in tables]
    assert shown == [[[1, "old 1"]], [[2, "old 2"]], [[3, "new 3"]]]


VERDICT = {
    "verdict_id": "sha256:v", "decision": "FAIL", "reason": "", "policy_id": "p", "policy_digest": "sha256:p",
    "artifact": {"digest": "sha256:m"},
    "checks": [
        {"id": "toxicity", "status": "FAIL", "estimate": 0.5, "bound": 0.6, "limit": 0.02, "reason": "shown unsafe"},
        {"id": "kl", "status": "PASS", "estimate": 1.0, "bound": 1.5, "limit": 8.0, "reason": "the bound keeps it"},
    ],
}  # fmt: skip
MANIFEST = {"stage": "ppo", "digest": "sha256:m", "parents": {"sft": "sha256:s"}, "inputs": {}, "status": "UNPROMOTED"}


@pytest.mark.slow
def test_a_judged_stage_is_shown_once_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    for name, value in (("manifest.json", MANIFEST), ("verdict.json", VERDICT)):
        (tmp_path / name).write_text(json.dumps(value))
    log(tmp_path, [1, 2], 0.5)
    publish(OFFLINE, tmp_path, "a run", MANIFEST, VERDICT)
    publish(OFFLINE, tmp_path, "a run", MANIFEST, VERDICT)
    (found,) = segments(tmp_path)
    assert [row["_step"] for row in found.rows[:2]] == [1, 2]
    assert found.summary["gate/decision"] == "FAIL" and found.summary["gate/checks/nrows"] == 2
    (alert,) = found.alerts
    assert alert.title == "a run/ppo: gate FAIL" and alert.text == "toxicity: shown unsafe"
    made = {a.name: (a.type, json.loads(a.metadata)) for a in found.artifacts if a.type in ("model", "verdict")}
    assert made["a-run-ppo-model"][1]["parents"] == {"sft": "sha256:s"}
    assert made["a-run-ppo-verdict"][1]["artifact"] == {"digest": "sha256:m"}
    publish(OFFLINE, tmp_path, "a run", {**MANIFEST, "status": "WAIVED"}, VERDICT)
    assert [segment.summary["gate/status"] for segment in segments(tmp_path)] == ["UNPROMOTED", "WAIVED"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789abcdef" not in written


def test_a_tracker_that_is_off_writes_the_record_alone(tmp_path: Path) -> None:
    off = TrackerConfig(mode=TrackerMode.disabled)
    open_tracker(off, tmp_path, {}, {}).log({"loss": 1.0}, 1)
    publish(off, tmp_path, "g", MANIFEST, VERDICT)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_two_wandb_runs_at_a_time_stay_apart(tmp_path: Path) -> None:
    """As a reward model beside the first has one while its stage's is open."""
    trackers = []
    for name in ("rm", "holdout"):
        (tmp_path / name).mkdir()
        names = {"group": "g", "stage": name, "folder": str(tmp_path / name)}
        trackers.append(open_tracker(OFFLINE, tmp_path / name, names, {"seed": 0}))
    for tracker in reversed(trackers):
        tracker.log({"loss": 0.25}, 1)
        tracker.finish()
    for name in ("rm", "holdout"):
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))) == 1
