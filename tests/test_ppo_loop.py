"""The PPO stage as a whole: what it leaves behind, how it goes on after a stop, when it ends."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_tiny import config, context, metrics, ppo_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.artifacts import checkpoints
from rlhf.config import CriticInit, KlConfig, ModelConfig
from rlhf.errors import Preempted, TrainingError
from rlhf.models import load_reward_model, save_model
from rlhf.ppo.checkpoint import Progress
from rlhf.ppo.watch import must_stop, note_kl
from rlhf.render import load_tokenizer
from rlhf.tracking import JsonlTracker, read_lines
from stages import ppo


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run of three updates; passes over five prompts end inside updates."""
    folder = tmp_path_factory.mktemp("unbroken") / "ppo"
    result = ppo.run(config(keep_checkpoints=9), context(folder, tiny_model))
    assert (result.stop_reason, result.updates, result.planned_updates) == ("finished", 3, 3)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_the_policy_changes_and_loads_anywhere(unbroken: Path, tiny_model: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(unbroken / "model").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_metrics_start_where_the_policy_is_its_reference(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert abs(lines[0]["eval/kl"]) < 1e-4 and abs(lines[1]["kl/mean"]) < 1e-4 < abs(lines[3]["kl/mean"])
    assert lines[1]["policy/first_ratio_error"] < 1e-4 < lines[1]["policy/ratio_error_max"]
    assert [step for step, line in enumerate(lines) if "eval/reward" in line] == [0, 2, 3]
    assert [line["policy/learning_rate"] for line in lines[1:]] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    sections = {"policy", "critic", "kl", "reward", "rollout", "eval", "step"}
    assert {key.split("/")[0] for line in lines for key in line} == sections


class Slow(JsonlTracker):
    """Takes 3 seconds of `clock` for a line and 5 for samples."""

    clock = 0.0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        super().log(metrics, step)
        Slow.clock += 3

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        super().samples(rows, step)
        Slow.clock += 5


def test_the_seconds_in_the_tracker_stand_beside_those_of_the_update(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else takes time here. A line tells of the one before; the last evaluation is inside its update."""
    monkeypatch.setattr(ppo.time, "perf_counter", lambda: Slow.clock)
    given = context(tmp_path / "ppo", tiny_model)
    given.tracker = Slow(given.folder)
    ppo.run(config(updates=2, eval_every=9), given)
    lines = read_lines(given.folder / "metrics.jsonl")[1:]
    assert [(line["time/tracker"], line["time/update"]) for line in lines] == [(8, 0), (8, 5)]
    assert lines[1]["time/evaluate"] == 5


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_equals_the_unbroken_run_bit_for_bit(
    tmp_path: Path, unbroken: Path, tiny_model: Path, step: int
) -> None:
    """As a kill leaves it: checkpoints up to `step`, lines beyond it, a torn checkpoint, a half-written line."""
    folder = tmp_path / "ppo"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "model")
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name.split("-")[1]) > step:
            (path / "digests.json").unlink()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "kl/me')
    torch.manual_seed(99)  # a new process has another state
    result = ppo.run(config(keep_checkpoints=9), context(folder, tiny_model))
    assert (result.stop_reason, result.updates) == ("finished", 3)
    if step == 3:  # nothing was left to log; the torn line is left out by whoever reads
        assert len(metrics(folder)) == 4
    assert_same_run(folder, unbroken)


def test_an_altered_checkpoint_is_passed_over(tmp_path: Path, unbroken: Path, tiny_model: Path, capsys: Any) -> None:
    folder = tmp_path / "ppo"
    shutil.copytree(unbroken, folder)
    spoiled = folder / "checkpoints" / "step-3" / "policy.safetensors"
    data = bytearray(spoiled.read_bytes())
    data[-1] ^= 1
    spoiled.write_bytes(bytes(data))
    ppo.run(config(keep_checkpoints=9), context(folder, tiny_model))
    assert "step-3 is torn or altered" in capsys.readouterr().out
    assert_same_run(folder, unbroken)


def test_preemption_writes_a_checkpoint_and_the_next_call_goes_on(
    tmp_path: Path, unbroken: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "ppo"
    with pytest.raises(Preempted, match="after update 1"):
        ppo.run(config(checkpoint_every=50), context(folder, tiny_model, stopping=lambda: True))
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-1"]
    ppo.run(config(checkpoint_every=50), context(folder, tiny_model))
    assert_same_run(folder, unbroken)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, tiny_model: Path) -> None:
    ppo.run(config(keep_checkpoints=2), context(tmp_path, tiny_model))
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-2", "step-3"]


def test_the_decode_group_and_the_micro_batch_change_no_sampled_token(
    tmp_path: Path, unbroken: Path, tiny_model: Path
) -> None:
    ppo.run(config(decode_group=3, micro_tokens=4096), context(tmp_path, tiny_model))
    for a, b in zip(metrics(tmp_path), metrics(unbroken), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_learning_rate_of_zero_leaves_the_ratio_at_one(tmp_path: Path, tiny_model: Path) -> None:
    ppo.run(config(learning_rate=0.0), context(tmp_path, tiny_model))
    for line in metrics(tmp_path)[1:]:
        assert line["policy/ratio_error_max"] < 1e-4 and abs(line["kl/mean"]) < 1e-4
        assert line["critic/grad_norm"] > 0


def test_the_kl_budget_stops_the_run_at_the_best_policy_under_it(tmp_path: Path, tiny_model: Path) -> None:
    kl = KlConfig(coef=0.0, budget=0.01, patience=2)
    result = ppo.run(config(updates=9, eval_every=1, learning_rate=0.05, kl=kl), context(tmp_path, tiny_model))
    assert result.stop_reason == "kl_budget"
    assert result.updates < result.planned_updates
    lines = metrics(tmp_path)
    under = [line for line in lines if line["eval/kl"] <= 0.01]
    assert result.extra["best_step"] == max(under, key=lambda line: line["eval/reward"])["step"]
    assert [line["kl/mean"] > 0.01 for line in lines[-2:]] == [True, True]
    if result.extra["best_step"] == 0:  # the policy that is kept is the one it started from
        start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
        assert all(torch.equal(start[name], tensor) for name, tensor in weights(tmp_path).items())
    # A kill after the last checkpoint: the same end again, without another update.
    shutil.rmtree(tmp_path / "model")
    again = ppo.run(config(updates=9, eval_every=1, learning_rate=0.05, kl=kl), context(tmp_path, tiny_model))
    assert (again.stop_reason, again.updates, again.extra) == (result.stop_reason, result.updates, result.extra)


def test_the_critic_starts_from_the_reward_model_with_a_head_of_zeros(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, ModelConfig())
    rm = load_reward_model(tiny_model, ModelConfig(), torch.device("cpu"), init_head=True)
    save_model(rm, tokenizer, tmp_path / "rm")
    given = context(tmp_path / "ppo", tiny_model)
    given.parents["rm"] = tmp_path / "rm"
    loop = ppo.Loop(config(critic_init=CriticInit.reward), given)
    own = dict(rm.base_model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in loop.roles.critic.body.named_parameters())
    assert not any(p.any() for p in loop.roles.critic.head.parameters())


def test_a_reward_that_fails_stops_before_anything_is_learned(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_tiny.early_letters", lambda prompt, response, row: float("nan") if "6" in prompt else 0.0)
    with pytest.raises(TrainingError, match=r"FunctionReward, row .*: the score is nan"):
        ppo.run(config(eval_prompts=4), context(tmp_path, tiny_model))
    assert not (tmp_path / "model").exists()


def test_a_nan_in_the_weights_names_tensor_update_and_rows(tmp_path: Path, tiny_model: Path) -> None:
    given = context(tmp_path, tiny_model)
    loop = ppo.Loop(config(), given)
    loop.progress.step = 1
    with torch.no_grad():
        loop.roles.critic.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"rollout values is not finite in update 2, rows .*\w"):
        loop.run()
    assert not checkpoints(tmp_path / "checkpoints")


def test_a_reward_that_draws_random_numbers_resumes_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_tiny.early_letters", lambda *_: random.random() + float(torch.rand(())))
    random.seed(5)
    torch.manual_seed(5)
    ppo.run(config(), context(tmp_path / "a", tiny_model))
    random.seed(5)
    torch.manual_seed(5)
    with pytest.raises(Preempted):
        ppo.run(config(), context(tmp_path / "b", tiny_model, stopping=lambda: True))
    random.seed(6)
    torch.manual_seed(6)
    ppo.run(config(), context(tmp_path / "b", tiny_model))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_patience_counts_updates_in_a_row() -> None:
    progress, cfg = Progress(), ppo_config(kl=KlConfig(budget=1.0, patience=2))
    stops = []
    for mean in (2.0, 0.5, 2.0, 1.0, 2.0, 2.0):
        note_kl(progress, mean, cfg.kl)
        stops.append(must_stop(progress, cfg))
    assert stops == [None] * 5 + ["kl_budget"]


def test_state_is_readable_json(unbroken: Path) -> None:
    state = json.loads((unbroken / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["step"] == 2 and state["machine"]["threads"] >= 1
