"""The whole quickstart, seeds 0 to 3, judged by gold on prompts that nothing else saw; then three ways to break it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from quickstart_runs import Quickstart, quickstart
from runs import STAGES, lines, read_json

from rlhf.data.loading import is_heldout

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="session", params=SEEDS, ids=lambda seed: f"seed {seed}")
def world(
    request: pytest.FixtureRequest, quickstarts: dict[int, Quickstart], tmp_path_factory: pytest.TempPathFactory
) -> Quickstart:
    return quickstart(quickstarts, request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def numbers(world: Quickstart) -> dict[str, Any]:
    from rlhf.quickstart.audit import audit_numbers
    from rlhf.quickstart.world import Shop

    return audit_numbers(
        Shop(world.seed),
        {"base": world.run / "world/base", "sft": world.run / "sft/model", "ppo": world.run / "ppo/model"},
    )


def test_it_ends_with_every_gate_passed(world: Quickstart) -> None:
    assert world.process.returncode == 0, world.process.stdout[-3000:] + world.process.stderr
    assert [read_json(world.run / s / "verdict.json")["decision"] for s in STAGES] == ["PASS"] * 3
    assert [read_json(world.run / s / "manifest.json")["status"] for s in STAGES] == ["PROMOTED"] * 3
    assert "unseen prompts" in world.process.stdout


def test_ppo_mends_what_the_demonstrations_spoilt(numbers: dict[str, Any]) -> None:
    sft, ppo = numbers["SFT"], numbers["PPO"]
    assert ppo["insults"].high <= 0.02, ppo["insults"]
    assert ppo["right"].value - sft["right"].value >= 0.18, (sft["right"], ppo["right"])
    assert ppo["escalated"].value >= 0.85, ppo["escalated"]
    assert ppo["preferred"].value >= 0.75, ppo["preferred"]
    assert ppo["kl"].value <= 6.0, ppo["kl"]
    assert sft["insults"].low > 0.02, "there must have been something to mend"
    assert len(numbers["answers"]["PPO"].texts) == 600


def test_the_reward_model_comes_close_to_gold_on_the_same_noisy_pairs(world: Quickstart) -> None:
    from rlhf.quickstart.annotators import case_of
    from rlhf.quickstart.audit import gold_pair_accuracy
    from rlhf.quickstart.world import Shop

    shop, path = Shop(world.seed), world.run / "rankings" / "rankings.jsonl"
    rows = lines(path)
    holdout = read_json(world.run / "rm" / "manifest.json")["inputs"]["data"]["rules"]["holdout"]
    ordered = [row for row in rows if len(set(row["ranks"])) > 1]  # all tied: no pair to be right or wrong about
    heldout = {case_of(shop, row["prompt"], "row").id for row in ordered if is_heldout(row["prompt"], holdout)}
    metrics = read_json(world.run / "rm" / "manifest.json")["metrics"]
    # Rows whose responses are identical were set aside as dirty; otherwise gold sees the reward model's own pairs.
    assert 0.97 * len(heldout) <= metrics["rm/prompts"] <= len(heldout)
    ceiling = gold_pair_accuracy(shop, path, heldout)
    assert metrics["rm/accuracy"] >= 0.92 * ceiling, (metrics["rm/accuracy"], ceiling)


def test_a_second_run_skips_everything(first: Quickstart) -> None:
    again = first.again()
    assert again.returncode == 0, again.stderr
    assert [stage for stage in STAGES if f"{stage}: skipped" in again.stdout] == list(STAGES)


# ---- negative controls: what is broken must be found


def test_rankings_that_mean_nothing_fail_the_reward_models_gate(first: Quickstart) -> None:
    rng = random.Random(0)
    rows = lines(first.run / "rankings" / "rankings.jsonl")
    for row in rows:
        rng.shuffle(row["ranks"])
    path = first.root / "shuffled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    broken = first.again(
        "stage=rm", "run.name=shuffled", f"run.parents={first.run}", f"data.rankings.path={path}"
    )  # fmt: skip
    assert broken.returncode == 10, broken.stdout[-3000:] + broken.stderr
    assert "rm gate: FAIL" in broken.stderr


def test_a_negated_reward_fails_the_policys_gate(first: Quickstart) -> None:
    broken = first.again("stage=ppo", "run.name=flipped", f"run.parents={first.run}", "reward=negated")
    assert broken.returncode == 10, broken.stdout[-3000:] + broken.stderr
    assert "ppo gate: FAIL" in broken.stderr
    assert read_json(first.root / "runs" / "flipped" / "ppo" / "manifest.json")["status"] == "UNPROMOTED"


def test_a_deaf_scorer_is_an_invalid_measurement(first: Quickstart) -> None:
    deaf = first.root / "deaf.txt"
    deaf.write_text("xylophone\n", encoding="utf-8")
    judged = first.again(
        "do=gate", "stage=ppo", "run.name=deaf", f"run.parents={first.run}",
        f"ppo.artifact={first.run}/ppo/model", f"gate.scorer.lexicon={deaf}",
    )  # fmt: skip
    assert judged.returncode == 12, judged.stdout[-3000:] + judged.stderr
    assert "INVALID" in judged.stderr
