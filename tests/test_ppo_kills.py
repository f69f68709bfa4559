"""kill -9 anywhere in PPO: the run that goes on ends as the unbroken one, to the last bit.

Twenty kills in four runs, of full fine-tuning and of LoRA. Each run is killed five times, each time in a new process
that resumes what the last one left, and then goes to its end. The moments are random but always the same: an event (a
call or return) of a part of the run, drawn from as many as that part has in the unbroken run.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ppo_tiny import metrics
from runs import digests, environment

from rlhf.artifacts import checkpoints

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("ppo_killed.py")
# (part, its occurrence in that process, the update that the process must have resumed after). Checkpoints are written
# after updates 2, 4 and 6, evaluations are made at 0, 3 and 6; "weights" happens several times in one checkpoint.
CHAINS = {
    "one": [("update", 2, 0), ("weights", 1, 0), ("learn", 3, 0), ("seal", 2, 2), ("model", 1, 4)],
    "two": [("evaluate", 1, 0), ("rollout", 4, 0), ("flush", 1, 2), ("prune", 1, 2), ("learn", 2, 4)],
    "three": [("learn", 1, 0), ("state", 1, 0), ("log", 4, 0), ("resume", 1, 2), ("evaluate", 1, 2)],
    "four": [("update", 1, 0), ("update", 3, 0), ("update", 2, 2), ("flush", 2, 2), ("update", 2, 4)],
}
ENDS = {"one": 6, "two": 4, "three": 2, "four": 4}  # what the last process, which is not killed, resumes after


def drive(folder: Path, model: Path, rank: int, *moment: object) -> tuple[int, int]:
    """Exit code of a process of the run in `folder`, and the update that it resumed after."""
    command = [sys.executable, str(DRIVER), str(folder), str(model), str(rank), *map(str, moment)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    found = re.search(r"resumed after update (\d+) of 6", done.stdout)
    return done.returncode, int(found[1]) if found else 0


@dataclass
class Whole:
    """The unbroken run, and how many events each entry into each part of it had."""

    folder: Path
    rank: int
    events: dict[str, list[int]]


@pytest.fixture(scope="module", params=[0, 2], ids=["full", "lora"])
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: pytest.FixtureRequest) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    assert drive(folder, tiny_model, request.param) == (0, 0)
    return Whole(folder, request.param, json.loads((folder.parent / "parts.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_five_times_it_ends_as_the_unbroken_run(
    chain: str, tmp_path: Path, whole: Whole, tiny_model: Path
) -> None:
    folder, drawn = tmp_path / "ppo", random.Random(chain)
    for part, occurrence, resumed in CHAINS[chain]:
        # Short of the end, since a part has more events the first time that a process comes to it.
        event = drawn.randrange(1, max(2, int(0.9 * min(whole.events[part]))))
        code, after = drive(folder, tiny_model, whole.rank, part, occurrence, event)
        assert (code, after) == (-signal.SIGKILL, 0 if part == "resume" else resumed)
        assert not (folder / "model").exists()
    assert drive(folder, tiny_model, whole.rank) == (0, ENDS[chain])
    assert metrics(folder) == metrics(whole.folder)
    assert (folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert digests(folder / "model") == digests(whole.folder / "model")
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-4", "step-6"]


def test_the_unbroken_run_has_something_to_lose(whole: Whole) -> None:
    """Each state of a checkpoint has moved by the end, so that a resume that forgot it would show."""
    lines = metrics(whole.folder)
    assert [line["step"] for line in lines] == list(range(7))
    assert [step for step, line in enumerate(lines) if "eval/kl" in line] == [0, 3, 6]
    assert len({line["kl/coef"] for line in lines[1:]}) == 6
    kept = whole.folder / "checkpoints" / "step-4"
    assert json.loads((kept / "state.json").read_text(encoding="utf-8"))["best_step"] is not None
    assert {"best.safetensors", "average.safetensors"} <= {p.name for p in kept.iterdir()}
