"""`python -m rlhf rm.members=3 rm.holdout=true`: from rankings to a policy, killed, altered and run again."""

from __future__ import annotations

import shutil
import signal
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, digests, flip_a_byte, interrupt, lines, read_json, rlhf, words, write_data

from rlhf.config import ModelConfig
from rlhf.models import load_reward_model
from rlhf.render import Renderer, load_tokenizer
from rlhf.scoring import score_ids

pytestmark = pytest.mark.slow
SEVERAL = ("members/1", "members/2", "holdout")
# So long that a signal finds the second member at work.
LONGER = ("rm.members=3", "rm.holdout=true", "rm.optim.epochs=60", "rm.optim.checkpoint_every=3")
FAILED_GATES = {10, 11, 12}  # of a random model, looked at with gate.mode=observe


@dataclass
class Done:
    folder: Path
    arguments: list[str]
    output: str

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Done:
    folder = tmp_path_factory.mktemp("members")
    overrides = dict(item.split("=", 1) for item in (*TINY, *LONGER))
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    arguments += [f"model.path={tiny_model}", *write_data(folder), f"run.root={folder}/runs"]
    whole = rlhf(*arguments, "run.name=whole", cwd=folder)
    assert whole.returncode in FAILED_GATES, whole.stderr
    return Done(folder, arguments, words(whole.stdout))


def scores(folder: Path, extra: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    """What one reward model says, in its standard deviations, by its forward pass alone."""
    renderer = Renderer(load_tokenizer(folder / "model", ModelConfig()))
    ids = [renderer.full_ids([{"role": "user", "content": row["prompt"]}], row["response"])[0] for row in rows]
    model = load_reward_model(folder / "model", ModelConfig(), torch.device("cpu"))
    return [(score - extra["reward_mean"]) / extra["reward_std"] for score in score_ids(model, ids, 64)]


def test_ppo_is_paid_by_the_members_and_judged_by_the_holdout(done: Done) -> None:
    run = done.run("whole")
    manifest = read_json(run / "rm" / "manifest.json")
    extras = {"": manifest["extra"], **{name: manifest["extra"]["members"][name]["extra"] for name in SEVERAL}}
    rows = lines(run / "ppo" / "samples.jsonl")
    said = {name: scores(run / "rm" / name, extra, rows) for name, extra in extras.items()}
    columns = list(zip(said[""], said["members/1"], said["members/2"], strict=True))
    expected = [statistics.fmean(column) - statistics.pstdev(column) for column in columns]
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-4)
    first = next(row for row in lines(run / "ppo" / "metrics.jsonl") if row["step"] == 0)
    holdout = [score for score, row in zip(said["holdout"], rows, strict=True) if row["step"] == 0]
    assert first["eval/holdout"] == pytest.approx(statistics.fmean(holdout), abs=1e-4)
    trained = [row for row in lines(run / "ppo" / "metrics.jsonl") if row["step"] == 1]
    assert any(row.get("reward/parts/disagreement", 0) > 0 for row in trained)
    parts = {key for row in trained for key in row if key.startswith("reward/parts/")}
    assert parts == {f"reward/parts/{name}" for name in ("model", "member_1", "member_2", "disagreement")}
    assert "paid by the run's 3 reward models together" in done.output
    parents = read_json(run / "ppo" / "verdict.json")["artifact"]["parents"]
    assert parents["rm"] == str(run / "rm" / "holdout" / "model")


def test_the_same_command_again_skips_all(done: Done) -> None:
    before = digests(done.run("whole") / "rm")
    again = rlhf(*done.arguments, "run.name=whole", cwd=done.folder)
    assert again.returncode in FAILED_GATES, again.stderr
    for stage in ("sft", "rm", "ppo"):
        assert f"{stage}: skipped: finished" in again.stdout
        assert f"{stage}: gate: " in again.stdout and "judging again" not in again.stdout
    assert digests(done.run("whole") / "rm") == before
    plan = words(rlhf("do=plan", *done.arguments, "run.name=whole", cwd=done.folder).stdout)
    assert "ppo reward × 4" in plan and "4 reward models" in plan


def test_killed_in_the_second_member_the_first_stays_and_all_end_with_the_same_bits(done: Done) -> None:
    run = done.run("killed") / "rm"

    def at_work() -> bool:
        return any((run / "members" / "2").glob("checkpoints/[!.]*-*/digests.json"))

    code = interrupt(*done.arguments, "run.name=killed", cwd=done.folder, when=at_work)
    assert code == -signal.SIGKILL
    assert not (run / "members" / "2" / "manifest.json").exists() and not (run / "holdout").exists()
    first = (run / "members" / "1" / "model" / "model.safetensors").stat().st_mtime_ns
    again = rlhf(*done.arguments, "run.name=killed", cwd=done.folder)
    assert again.returncode in FAILED_GATES, again.stderr
    assert (run / "members" / "1" / "model" / "model.safetensors").stat().st_mtime_ns == first
    whole = done.run("whole") / "rm"
    for name in ("", *SEVERAL):
        assert digests(run / name / "model") == digests(whole / name / "model")
        assert lines(run / name / "metrics.jsonl") == lines(whole / name / "metrics.jsonl")
    manifests = [read_json(folder / "manifest.json") for folder in (run, whole)]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert digests(run.parent / "ppo" / "model") == digests(whole.parent / "ppo" / "model")


@pytest.mark.parametrize("name", ["members/2", "holdout"])
def test_a_byte_flipped_in_one_of_them_is_13(done: Done, name: str) -> None:
    run = done.run(f"flipped-{name.replace('/', '-')}")
    shutil.copytree(done.run("whole"), run)
    flip_a_byte(run / "rm" / name / "model" / "model.safetensors")
    refused = rlhf(*done.arguments, "stage=ppo", f"run.name={run.name}", cwd=done.folder)
    assert refused.returncode == 13, refused.stdout + refused.stderr
    assert "altered" in refused.stderr and f"rm/{name}/model" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_ensemble_of_one_and_too_few_prompts_are_told_before_anything_starts(done: Done) -> None:
    single = [argument for argument in done.arguments if not argument.startswith(("rm.members", "rm.holdout"))]
    alone = rlhf(*single, "reward=ensemble", "run.name=alone", cwd=done.folder)
    assert (alone.returncode, (done.run("alone") / "sft").exists()) == (2, False), alone.stderr
    assert "reward.members: names none" in words(alone.stderr)
    many = rlhf(*single, "rm.members=90", "run.name=many", cwd=done.folder)
    assert (many.returncode, (done.run("many") / "sft").exists()) == (2, False), many.stderr
    assert "cannot be cut into 90 folds" in words(many.stderr)
