"""The PPO stage with LoRA: memory, checkpoints, what it leaves behind."""

from __future__ import annotations

import gc
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_toys import (
    Parents,
    disturb,
    make_parents,
    reward_of,
    settings,
    stage,
)
from peft import PeftModel
from ppo_tiny import metrics
from runs import STAGES, TINY, read_json, rlhf, words, write_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.adapters import RoleModel
from rlhf.artifacts import checkpoints
from rlhf.config import Estimator, KlConfig, LoraConfig
from rlhf.errors import Preempted
from rlhf.logprobs import sequence_logprobs
from rlhf.plan_memory import role_sizes
from stages import ppo


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Parents:
    return make_parents(tmp_path_factory.mktemp("parents"), tiny_model)


# ---- memory


def storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_the_base_is_in_memory_once(tmp_path: Path, parents: Parents) -> None:
    loop = ppo.Loop(settings(), stage(tmp_path, parents))
    roles, scorer = loop.roles, reward_of(loop).model
    plain = dict(AutoModelForCausalLM.from_pretrained(parents.sft).named_parameters())
    views = {"policy": roles.policy, "reference": roles.reference, "critic": roles.critic.body, "reward": scorer.body}
    pointers: dict[str, set[int]] = defaultdict(set)
    for name, view in views.items():
        assert isinstance(view, RoleModel)
        for key, p in view.inner.named_parameters():
            if "lora_" not in key:
                full = key if name in ("policy", "reference") else f"model.{key}"
                pointers[full.replace(".base_layer", "")].add(p.data_ptr())
    assert pointers.keys() == plain.keys() and all(len(found) == 1 for found in pointers.values())
    everything = [*loop.roles.reference.parameters(), *scorer.score.parameters(), *roles.critic.head.parameters()]
    everything += [t for view in views.values() for t in [*view.inner.parameters(), *view.inner.buffers()]]
    adapters = sum(p.nbytes for n in ("policy", "critic", "reward0") for _, p in roles.policy.base.own_parameters(n))
    assert sum(storages(everything).values()) <= 1.15 * sum(p.nbytes for p in plain.values()) + adapters


def test_the_plan_counts_the_base_once(tiny_model: Path) -> None:
    """An adapter of rank r on a map from n to m numbers has r (n + m) weights. A layer maps 8 to 8 twice (q, o), 8 to 4
    twice (k, v), 8 to 16 twice and back once: 128 r, and there are two layers."""
    cfg = settings()
    run: Any = SimpleNamespace(
        cfg=cfg, base=lambda: tiny_model, world=None, parents_of=lambda stage: ("sft", "rm"),
        folder=lambda stage: tiny_model.parent / stage, own_base=lambda: None,
    )  # fmt: skip
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    supervised = [("sft model", base, base), ("rm model", base, base)]
    ours = [("ppo shared base", base, 0), ("ppo policy", 512, 512)]
    assert role_sizes(run) == [
        *supervised, *ours, ("ppo critic", 512, 512), ("ppo reference", 0, 0), ("ppo reward", base, 0)
    ]  # fmt: skip
    cfg.rm.lora = LoraConfig(enabled=True, r=3)
    adapted = [supervised[0], ("rm model", base + 768, 768), *ours]
    assert role_sizes(run) == [
        *adapted, ("ppo critic", 768, 768), ("ppo reference", 0, 0), ("ppo reward", 768, 0)
    ]  # fmt: skip
    cfg.rm.members, cfg.rm.holdout = 2, True
    assert role_sizes(run)[-1] == ("ppo reward × 3", 3 * 768, 0)
    cfg.rm.members, cfg.rm.holdout = 1, False
    cfg.ppo.lora = LoraConfig()
    full = [(f"ppo {role}", base, base) for role in ("policy", "critic")]
    assert role_sizes(run)[2:] == [*full, ("ppo reference", base, 0), ("ppo reward", base, 0)]


def live_bytes() -> int:
    gc.collect()
    return sum(storages(t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)).values())


@pytest.mark.parametrize("updates", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_nothing_is_kept_from_update_to_update(tmp_path: Path, parents: Parents, updates: int) -> None:
    loop = ppo.Loop(settings(updates=updates, batch=4, eval_every=5), stage(tmp_path, parents))
    loop._update(1)
    loop._update(2)
    before = live_bytes()
    for update in range(3, updates + 1):
        loop._update(update)
    assert live_bytes() == before


# ---- the stage as a whole


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, parents: Parents) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "ppo"
    ppo.run(settings(keep_checkpoints=9), stage(folder, parents))
    return folder


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


@pytest.mark.parametrize("step", [1, 3])
def test_resume_equals_the_unbroken_run_bit_for_bit(
    tmp_path: Path, unbroken: Path, parents: Parents, step: int
) -> None:
    folder = tmp_path / "ppo"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "model")
    for path in checkpoints(folder / "checkpoints"):
        if int(path.name.split("-")[1]) > step:
            (path / "digests.json").unlink()
    torch.manual_seed(99)
    ppo.run(settings(keep_checkpoints=9), stage(folder, parents))
    assert_same_run(folder, unbroken)


def test_preemption_writes_a_checkpoint_and_the_next_call_goes_on(
    tmp_path: Path, unbroken: Path, parents: Parents
) -> None:
    with pytest.raises(Preempted, match="after update 1"):
        ppo.run(settings(), stage(tmp_path, parents, stopping=lambda: True))
    ppo.run(settings(), stage(tmp_path, parents))
    assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_holds_only_what_is_trained(unbroken: Path) -> None:
    step = unbroken / "checkpoints" / "step-3"
    policy, critic = (load_file(step / f"{role}.safetensors") for role in ("policy", "critic"))
    assert len(policy) == 28 and all(".lora_" in key for key in policy)
    assert sorted(key for key in critic if ".lora_" not in key) == ["head.bias", "head.weight"] and len(critic) == 30
    state = torch.load(step / "optimizers.pt", weights_only=True)
    assert (len(state["policy"]["state"]), len(state["critic"]["state"])) == (28, 30)


def test_metrics_start_where_the_policy_is_its_reference_and_move(unbroken: Path) -> None:
    lines = metrics(unbroken)
    assert abs(lines[0]["eval/kl"]) < 1e-4 and lines[1]["policy/first_ratio_error"] < 1e-4
    assert abs(lines[3]["kl/mean"]) > 1e-3 and lines[2]["critic/grad_norm"] > 0


def test_activation_checkpointing_changes_no_sampled_token(tmp_path: Path, unbroken: Path, parents: Parents) -> None:
    cfg = settings(keep_checkpoints=9)
    cfg.model.activation_checkpointing = True
    ppo.run(cfg, stage(tmp_path, parents))
    for a, b in zip(metrics(tmp_path), metrics(unbroken), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_what_is_saved_is_the_live_policy_merged_and_as_an_adapter(tmp_path: Path, parents: Parents) -> None:
    given = stage(tmp_path, parents)
    loop = ppo.Loop(settings(), given)
    disturb(loop.roles.policy, by=0.2)
    kept = [p.clone() for p in loop.roles.reference.parameters()]
    ids = [given.renderer.prompt_ids(p.messages) for p in loop.prompts]
    live = torch.cat(sequence_logprobs(loop.roles.policy, ids, ids))
    ppo.save_policy(loop.roles.policy, loop.cfg, given)
    base = AutoModelForCausalLM.from_pretrained(parents.sft)
    start = torch.cat(sequence_logprobs(base, ids, ids))
    assert float((live - start).abs().max()) > 0.01
    for saved in (AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
                  PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()):  # fmt: skip
        torch.testing.assert_close(torch.cat(sequence_logprobs(saved, ids, ids)), live, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, loop.roles.reference.parameters(), strict=True))
    torch.testing.assert_close(torch.cat(sequence_logprobs(loop.roles.policy, ids, ids)), live, rtol=0, atol=0)


def test_the_kl_budget_keeps_the_best_adapter(tmp_path: Path, parents: Parents) -> None:
    kl = KlConfig(coef=0.0, budget=0.01, patience=1)
    cfg = settings(updates=9, batch=4, eval_every=1, learning_rate=0.05, kl=kl)
    result = ppo.run(cfg, stage(tmp_path, parents))
    assert result.stop_reason == "kl_budget"
    best = load_file(checkpoints(tmp_path / "checkpoints")[-1] / "best.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.replace("own.", "base_model.model.") for key in best} == saved.keys()
    assert all(torch.equal(saved[key.replace("own.", "base_model.model.")], tensor) for key, tensor in best.items())


def test_an_average_is_kept_and_a_critic_is_not_needed(tmp_path: Path, parents: Parents) -> None:
    cfg = settings(estimator=Estimator.rloo, group=2, ema=0.5)
    ppo.run(cfg, stage(tmp_path, parents))
    step = checkpoints(tmp_path / "checkpoints")[-1]
    assert not (step / "critic.safetensors").exists()
    policy, average = (load_file(step / f"{name}.safetensors") for name in ("policy", "average"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key.replace("own.", "base_model.model.")], kept) for key, kept in average.items())
    assert policy.keys() == average.keys() and any(not torch.equal(policy[key], average[key]) for key in policy)


@pytest.mark.slow
def test_three_stages_with_lora_through_the_command_line(tmp_path: Path, tiny_model: Path) -> None:
    arguments = [*TINY, f"model.path={tiny_model}", *write_data(tmp_path), f"run.root={tmp_path}/runs", "lora=r16"]
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode in (10, 11, 12) and "Traceback" not in done.stderr, done.stderr
    assert "is an adapter on the policy's base" in words(done.stdout), done.stdout
    assert "fresh adapter" not in words(done.stdout)
    run = tmp_path / "runs" / "own"
    for stage_name in STAGES:
        manifest = read_json(run / stage_name / "manifest.json")
        assert (manifest["stop_reason"], manifest["tuning"]) == ("finished", "lora")
        assert (run / stage_name / "adapter" / "adapter_config.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
    adapted = PeftModel.from_pretrained(base, run / "ppo" / "adapter").get_base_model()
    merged = AutoModelForCausalLM.from_pretrained(run / "ppo" / "model")
    ids = torch.arange(4, 40).unsqueeze(0)
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
    planned = rlhf(*arguments, "do=plan", cwd=tmp_path)
    assert planned.returncode == 0 and planned.stdout.count("skipped") == 3, planned.stdout
