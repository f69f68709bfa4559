"""PPO on two ranks is PPO on one: the same rollouts, losses and weights, resumed after any end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ppo_cells
import pytest
import torch
from ppo_tiny import metrics
from safetensors.torch import load_file
from two_ranks import CallFailed, TwoRanks

from rlhf.artifacts import checkpoints, read_json
from rlhf.config import KlConfig
from rlhf.engine.ranks import Ranks
from rlhf.ppo.sharing import own_groups, own_passes, shares
from rlhf.rollout import decode_groups

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
FAST = (("llama", False, "ddp", False), ("llama", False, "ddp", True), ("llama", True, "zero3", False))
BATCH = {"batch": 12, "minibatch": 6, "decode_group": 3, "keep_checkpoints": 9}


def on_one(pair: TwoRanks, function: Any, *arguments: Any) -> Any:
    return pair.call(ppo_cells.alone, function, *arguments)[0]


# ---- who does what


def test_a_rank_decodes_whole_groups_which_are_cut_again_as_they_were() -> None:
    lengths = [5, 1, 4, 1, 3, 9, 2, 6, 5, 3, 5]
    whole = decode_groups(lengths, 2)
    assert whole == [[1, 3], [6, 4], [9, 2], [0, 8], [10, 7], [5]]
    for rank in range(3):
        own = own_groups(lengths, 2, Ranks(rank=rank, size=3))
        again = [[own[i] for i in group] for group in decode_groups([lengths[i] for i in own], 2)]
        assert again == whole[rank::3]
    assert own_groups([1, 1], 2, Ranks(rank=1, size=2)) == []


def test_shares_have_about_the_same_tokens() -> None:
    """9, 6 and 5, 5, 5, 4: 9 | 6; 5 to the second, 5 to the first, 5 to the second, 4 to the first."""
    assert shares([5, 9, 4, 5, 6, 5], 2) == [[1, 2, 3], [0, 4, 5]]
    assert shares([3], 2) == [[0], []]
    assert shares([3, 1, 2], 1) == [[0, 1, 2]]


def test_what_one_rank_has_sampled_is_scored_by_both(pair: TwoRanks) -> None:
    lengths = [5, 9, 4, 5, 6, 5]
    assert pair.call(ppo_cells.dealt_places, lengths) == shares(lengths, 2) == [[1, 2, 3], [0, 4, 5]]
    assert on_one(pair, ppo_cells.dealt_places, lengths) == [0, 1, 2, 3, 4, 5]


def test_one_decode_group_is_work_for_both(tmp_path: Path, pair: TwoRanks, tiny_model: Path) -> None:
    """In an evaluation and in an update; the rank that decodes nothing scores half."""
    one = on_one(pair, ppo_cells.scored_rows, tmp_path / "one", tiny_model)
    both = pair.call(ppo_cells.scored_rows, tmp_path / "two", tiny_model)
    assert [sum(parts) for parts in zip(*both, strict=True)] == one and one[1] == 12
    assert all(min(parts) > 0 for parts in zip(*both, strict=True))


def test_ranks_that_wait_for_each_other_make_the_same_number_of_passes() -> None:
    lengths = [8, 4, 4]
    passes = [own_passes(lengths, 4, Ranks(rank=rank, size=2), lockstep=True) for rank in (0, 1)]
    assert passes == [[[0], []], [[1], [2]]]
    assert own_passes(lengths, 4, Ranks(rank=0, size=2), lockstep=False) == [[0]]
    assert own_passes(lengths, 4, Ranks(), lockstep=True) == [[0], [1], [2]]


# ---- the same numbers


def assert_close(one: list[dict[str, float]], two: list[dict[str, float]], rel: float = 1e-5) -> None:
    assert one[0]["policy/grad_norm"] > 0 and one[2]["policy/loss"] != one[0]["policy/loss"]
    for a, b in zip(one, two, strict=True):
        # A policy loss is a sum of terms of size 1 that nearly cancel: the error is one of the terms.
        assert a == pytest.approx(b, rel=rel, abs=rel / 10)


@pytest.mark.parametrize(
    ("kind", "lora", "engine", "ends"),
    [
        pytest.param(kind, lora, engine, ends, marks=() if (kind, lora, engine, ends) in FAST else pytest.mark.slow)
        for ends in (False, True)
        for engine in ENGINES
        for lora in (False, True)
        for kind in ("llama", "gpt2")
    ],
)
def test_three_updates_have_the_losses_of_one_process(
    pair: TwoRanks, kind: str, lora: bool, engine: str, ends: bool
) -> None:
    """ends: `target_kl` ends an update, whose last gradient is dropped: Llama's third makes a step after that."""
    changes = {"target_kl": 0.01 if lora else 0.1, "epochs": 3} if ends else {}
    one = on_one(pair, ppo_cells.three_updates, kind, lora, "single", changes)
    both = pair.call(ppo_cells.three_updates, kind, lora, engine, changes)
    assert both[0] == both[1]
    assert_close(one, both[0])
    if ends:
        assert one[0]["policy/steps"] < 6 > one[2]["policy/steps"]
        assert kind != "llama" or one[2]["policy/steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("lora", [False, True])
def test_bf16_has_the_losses_of_one_process_to_a_hundredth(pair: TwoRanks, lora: bool, engine: str) -> None:
    one = on_one(pair, ppo_cells.three_updates_in_bf16, "llama", lora, "single")
    both = pair.call(ppo_cells.three_updates_in_bf16, "llama", lora, engine)
    exact = on_one(pair, ppo_cells.three_updates, "llama", lora, "single", {})
    for name in ("policy/loss", "critic/loss", "policy/entropy"):
        for a, b, c in zip(one, both[0], exact, strict=True):
            assert b[name] == pytest.approx(a[name], rel=1e-2, abs=1e-2)
            assert b[name] == pytest.approx(c[name], rel=1e-2, abs=1e-2)
    assert both[0][0]["critic/loss"] != exact[0]["critic/loss"], "it was bf16"


def test_rollouts_are_the_same_bits_on_two_ranks(pair: TwoRanks, tiny_model: Path) -> None:
    one = on_one(pair, ppo_cells.rolled_out, tiny_model, 3)
    assert pair.call(ppo_cells.rolled_out, tiny_model, 3) == [one, one]
    assert len(one) == 10 and len({text for _, _, text in one}) > 5


# ---- ZeRO-3


@pytest.mark.slow
def test_a_rollout_costs_one_gather(tmp_path: Path, pair: TwoRanks, tiny_model: Path) -> None:
    """No module's weights are fetched before the rollout has ended."""
    assert pair.call(ppo_cells.gathers, tmp_path, tiny_model) == [[(1, 0), (1, 0)]] * 2


@pytest.mark.slow
def test_a_rank_holds_its_share(pair: TwoRanks) -> None:
    assert all(share <= 0.6 for share in pair.call(ppo_cells.share_held))


# ---- the stage


@pytest.fixture(scope="module", params=["ddp", "zero2", "zero3"])
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pair: TwoRanks
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "ppo"
    assert stage(pair, folder, tiny_model, request.param) == [("finished", 3)] * 2
    return request.param, folder


def stage(pair: TwoRanks, folder: Path, model: Path, engine: str, stop_after: int = 0, **changes: Any) -> Any:
    found = pair.call(ppo_cells.stage, folder, model, engine, {**BATCH, **changes}, stop_after)
    assert found[0]["metrics"].keys() == found[1]["metrics"].keys()
    return [(each["stop_reason"], each["updates"]) for each in found]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for file in ("model/model.safetensors", "samples.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


@pytest.mark.slow
def test_a_run_has_the_numbers_of_one_process(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, unbroken: tuple[str, Path]
) -> None:
    on_one(pair, ppo_cells.stage, tmp_path, tiny_model, "single", BATCH)
    for a, b in zip(metrics(tmp_path), metrics(unbroken[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, unbroken[1]))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, unbroken: tuple[str, Path]
) -> None:
    engine, whole = unbroken
    with pytest.raises(CallFailed) as failed:
        stage(pair, tmp_path, tiny_model, engine, stop_after=2)
    assert [problem[0] for problem in failed.value.problems] == ["Preempted"] * 2
    files = {file.name for file in (tmp_path / "checkpoints" / "step-2").iterdir()}
    assert files == {"policy.safetensors", "critic.safetensors", "optimizers.pt", "optimizers-1.pt", "state.json",
                     "digests.json"}  # fmt: skip
    assert stage(pair, tmp_path, tiny_model, engine) == [("finished", 3)] * 2
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_next_goes_on_bit_for_bit(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, unbroken: tuple[str, Path]
) -> None:
    engine, whole = unbroken
    with pytest.raises(CallFailed) as failed:
        pair.call(ppo_cells.killed_stage, tmp_path, tiny_model, engine, BATCH)
    assert failed.value.problems[1] == ("Died", "")
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-1", "step-2"]
    assert stage(pair, tmp_path, tiny_model, engine) == [("finished", 3)] * 2
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_another_engine_or_number_of_ranks_is_refused_by_name(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, unbroken: tuple[str, Path]
) -> None:
    engine, whole = unbroken
    (tmp_path / "checkpoints").symlink_to(whole / "checkpoints")
    assert read_json(whole / "checkpoints" / "step-3" / "state.json")["engine"] == {"kind": engine, "ranks": 2}
    with pytest.raises(CallFailed) as failed:
        on_one(pair, ppo_cells.stage, tmp_path, tiny_model, "single", BATCH)
    kind, text = failed.value.problems[0]
    assert kind == "ConfigError" and f"engine: {tmp_path}" in text
    assert f"made by engine={engine} on 2 ranks, and this is engine=single on 1" in text


@pytest.mark.slow
def test_what_one_rank_finds_ends_both_by_name(tmp_path: Path, pair: TwoRanks, tiny_model: Path) -> None:
    """A reward that is not a number, on the rank that has the row; a loss that is not."""
    for engine, function, text in (
        ("ddp", ppo_cells.bad_reward, "row help me 1: the score is nan"),
        ("ddp", ppo_cells.bad_loss, "policy loss is not finite in update 1, rows row 3:"),
        ("zero3", ppo_cells.bad_loss, "policy loss is not finite in update 1, rows row 3:"),
    ):
        with pytest.raises(CallFailed) as failed:
            pair.call(function, tmp_path, tiny_model, engine)
        for kind, message in failed.value.problems:
            assert kind == "TrainingError" and text in message


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_a_rank_with_nothing_to_do_holds_nobody_up(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, engine: str
) -> None:
    """One decode group, one episode a minibatch, and responses that are an end token alone."""
    lonely = {"batch": 2, "minibatch": 1, "decode_group": 64, "eval_prompts": 1, "max_new_tokens": 1}
    assert stage(pair, tmp_path / "lonely", tiny_model, engine, **lonely) == [("finished", 3)] * 2
    ended = pair.call(ppo_cells.only_ends, tmp_path / "ends", tiny_model, engine, BATCH)
    assert [each["metrics"]["rollout/length"] for each in ended] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_the_best_and_the_average_are_kept_on_two_ranks(
    tmp_path: Path, pair: TwoRanks, tiny_model: Path, engine: str
) -> None:
    kl = KlConfig(coef=0.0, budget=0.01, patience=1)
    changes = {"updates": 9, "eval_every": 1, "learning_rate": 0.05, "kl": kl}
    assert {reason for reason, _ in stage(pair, tmp_path / "best", tiny_model, engine, **changes)} == {"kl_budget"}
    best = load_file(checkpoints(tmp_path / "best" / "checkpoints")[-1] / "best.safetensors")
    stage(pair, tmp_path / "average", tiny_model, engine, ema=0.5)
    average = load_file(checkpoints(tmp_path / "average" / "checkpoints")[-1] / "average.safetensors")
    for name, kept in (("best", best), ("average", average)):
        saved = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(saved[key], tensor) for key, tensor in kept.items())
    with pytest.raises(CallFailed):
        stage(pair, tmp_path / "cut", tiny_model, engine, stop_after=2, ema=0.5)
    stage(pair, tmp_path / "cut", tiny_model, engine, ema=0.5)
    assert_same_run(tmp_path / "cut", tmp_path / "average")
