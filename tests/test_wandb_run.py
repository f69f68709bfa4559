"""The offline W&B files of all three stages, PPO killed half way and resumed, with one rank and with two."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import STAGES, TINY, interrupt, lines, read_json, rlhf, write_data
from wandb_files import Segment, segments

pytestmark = pytest.mark.slow
FAILED_GATES = {10, 11, 12}  # no gate can pass a random model
UPDATES = 6


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run's folder."""
    folder = tmp_path_factory.mktemp("wandb")
    options = [o for o in TINY if not o.startswith(("tracker=", "ppo.updates=", "ppo.eval_every="))]
    options += ["tracker=wandb", f"ppo.updates={UPDATES}", "ppo.eval_every=2", f"launch.gpus={request.param}"]
    arguments = [*options, f"model.path={tiny_model}", *write_data(folder), f"run.root={folder}/runs"]
    run = folder / "runs" / "own"
    metrics = run / "ppo" / "metrics.jsonl"
    seals = run / "ppo" / "checkpoints"

    def half_way() -> bool:
        return any(seals.glob("step-[234]/digests.json")) and len(metrics.read_text(encoding="utf-8").splitlines()) > 3

    assert interrupt(*arguments, cwd=folder, when=half_way) == -signal.SIGKILL
    assert not (run / "ppo" / "manifest.json").exists(), "it ended before it was killed"
    done = rlhf(*arguments, cwd=folder)
    assert done.returncode in FAILED_GATES, done.stderr
    assert [r["stage"] for r in lines(run / "ledger.jsonl") if r["event"] == "resumed"] == ["ppo"]
    return run


def newest(run: Path, stage: str) -> Segment:
    return segments(run / stage)[-1]


def table(segment: Segment, path: str) -> dict[str, Any]:
    return dict(json.loads((segment.path.parent / "files" / path).read_text(encoding="utf-8")))


def test_each_stage_is_one_run_of_one_group(run: Path) -> None:
    ids = {stage: {segment.run_id for segment in segments(run / stage)} for stage in STAGES}
    assert [len(found) for found in ids.values()] == [1, 1, 1] and len(set.union(*ids.values())) == 3
    assert {newest(run, stage).group for stage in STAGES} == {"own"}
    # One file when a stage trains and one when it is judged; of PPO another before the kill. Rank 0 alone has any.
    assert [len(segments(run / stage)) for stage in STAGES] == [2, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
def test_the_newest_file_holds_every_recorded_row(run: Path, stage: str) -> None:
    segment = newest(run, stage)
    assert segment.exited, "it was closed"
    steps = [row["_step"] for row in segment.rows]
    assert steps == sorted(set(steps)), "a row for each step, in order"
    assert all(row["update"] == row["_step"] for row in segment.rows if "update" in row)
    shown = {row["_step"]: row for row in segment.rows}
    recorded = lines(run / stage / "metrics.jsonl")
    assert {row["step"] for row in recorded} <= shown.keys()
    for row in recorded:
        told = shown[row["step"]]
        assert {key: told.get(key) for key in row if key != "step"} == {k: v for k, v in row.items() if k != "step"}
    if stage == "ppo":
        assert [row["step"] for row in recorded] == list(range(UPDATES + 1))


def test_episodes_and_tokens_grow_beside_the_updates(run: Path) -> None:
    recorded = {row["step"]: row for row in lines(run / "ppo" / "metrics.jsonl")}
    shown = {row["_step"]: row for row in newest(run, "ppo").rows}
    for step in range(1, UPDATES + 1):
        assert shown[step]["episodes"] == 4 * step
        assert shown[step]["tokens"] == sum(recorded[i]["rollout/tokens"] for i in range(1, step + 1))


def test_the_tables_hold_the_samples_and_the_checks(run: Path) -> None:
    ppo = newest(run, "ppo")
    recorded: dict[int, list[str]] = {}
    for row in lines(run / "ppo" / "samples.jsonl"):
        recorded.setdefault(row["step"], []).append(row["response"])
    assert sorted(recorded) == [0, 2, 4, 6]
    for row in ppo.rows:
        if "eval/samples/path" in row:
            found = table(ppo, row["eval/samples/path"])
            assert [cells[found["columns"].index("response")] for cells in found["data"]] == recorded.pop(row["_step"])
    assert recorded == {}
    for stage in STAGES:
        verdict, segment = read_json(run / stage / "verdict.json"), newest(run, stage)
        assert segment.summary["gate/decision"] == verdict["decision"]
        (last,) = [row for row in segment.rows if "gate/checks/path" in row]
        shown = table(segment, last["gate/checks/path"])
        assert [cells[0] for cells in shown["data"]] == [check["id"] for check in verdict["checks"]]
        assert (len(segment.alerts) == 1) == (verdict["decision"] != "PASS")


def test_the_artifacts_name_their_parents(run: Path) -> None:
    manifests = {stage: read_json(run / stage / "manifest.json") for stage in STAGES}
    for stage in STAGES:
        logged = [a for a in newest(run, stage).artifacts if a.type in ("model", "verdict")]
        made = {artifact.name: json.loads(artifact.metadata) for artifact in logged}
        model, verdict = made[f"own-{stage}-model"], made[f"own-{stage}-verdict"]
        assert model["digest"] == manifests[stage]["digest"] == verdict["artifact"]["digest"]
        assert model["parents"] == manifests[stage]["parents"]
    assert set(manifests["ppo"]["parents"]) == {"sft", "rm"}
    assert manifests["ppo"]["parents"]["sft"] == manifests["rm"]["parents"]["sft"] == manifests["sft"]["digest"]
