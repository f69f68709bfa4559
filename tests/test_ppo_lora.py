"""PPO with LoRA: each role computes on the one base as if it had a model of its own."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_toys import (
    CPU,
    LORA,
    REWARD,
    Parents,
    base_of,
    disturb,
    make_parents,
    reward_model,
    reward_of,
    roles_of,
    settings,
    stage,
)
from ppo_tiny import config, ppo_config
from safetensors.torch import load_file
from test_ppo_update import episodes_of
from test_rollout import PROMPTS, SEEDS, sampling

from reward_models.trained import TrainedReward
from rlhf.adapters import Scorer, SharedBase
from rlhf.config import CriticInit, LoraConfig, ModelConfig
from rlhf.errors import ConfigError
from rlhf.logprobs import collate, response_logits, sequence_logprobs, token_logprobs
from rlhf.lora import add_lora, open_adapter
from rlhf.models import load_policy, load_reward_model, save_model
from rlhf.ppo.checks import check_first_rollout
from rlhf.ppo.episodes import Episode, compare, read_values
from rlhf.ppo.roles import Critic, Roles, share
from rlhf.ppo.update import Learner
from rlhf.render import load_tokenizer
from rlhf.rollout import generate
from rlhf.scoring import score_ids
from stages import ppo


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Parents:
    return make_parents(tmp_path_factory.mktemp("parents"), tiny_model)


# ---- what a role computes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_start_up_checks_hold(kind: str, checkpointing: bool) -> None:
    roles = roles_of(kind, checkpointing=checkpointing)
    cfg = ppo_config()
    episodes = episodes_of(roles, cfg)
    assert all(torch.equal(e.values, torch.zeros_like(e.values)) for e in episodes)
    check_first_rollout(roles.policy, episodes, [episodes[:2], episodes[2:]], cfg)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_reference_is_the_base_alone_whatever_ran_before_it(kind: str) -> None:
    """GPT-2 decodes prompts of several lengths together only if the positions are passed through the view."""
    roles, plain = roles_of(kind), base_of(kind).model.eval()
    disturb(roles.policy, roles.critic, by=0.3)
    assert generate(roles.policy, PROMPTS, SEEDS, sampling()) != generate(plain, PROMPTS, SEEDS, sampling())
    assert generate(roles.reference, PROMPTS, SEEDS, sampling()) == generate(plain, PROMPTS, SEEDS, sampling())


def separate(roles: Any, kind: str) -> Any:
    """The same roles as models of their own, adapters put on by `get_peft_model`."""
    models = []
    for role in (roles.policy, roles.critic.body):
        model = add_lora(base_of(kind).model.eval(), LORA, seed=9).get_base_model()
        theirs = {key.replace(".default", ""): p for key, p in model.named_parameters() if "lora_" in key}
        assert theirs.keys() == dict(role.own.named_parameters()).keys()
        with torch.no_grad():
            for key, p in role.own.named_parameters():
                theirs[key].copy_(p)
        models.append(model)
    critic = Critic(models[1].base_model)
    critic.head.load_state_dict(roles.critic.head.state_dict())
    return Roles(policy=models[0], reference=base_of(kind).model.eval(), critic=critic)


def gradients(roles: Any) -> dict[str, torch.Tensor]:
    found = {}
    for role, model in (("policy", roles.policy), ("critic", roles.critic)):
        for key, p in model.named_parameters():
            if p.requires_grad:
                short = key.replace(".default", "").removeprefix("body.").removeprefix("own.")
                assert p.grad is not None
                found[f"{role}.{short.removeprefix('model.').removeprefix('transformer.')}"] = p.grad
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_gradients_are_those_of_models_of_their_own(kind: str, checkpointing: bool, joint: bool) -> None:
    """Also when both roles have computed before either goes backwards, which must recompute each as itself."""
    roles = roles_of(kind, checkpointing=checkpointing)
    cfg = ppo_config(temperature=0.8)
    episodes = episodes_of(roles, cfg)
    disturb(roles.policy, roles.critic)
    apart = separate(roles, kind)
    for each in (roles, apart):
        if joint:
            rows = collate([e.prompt_ids for e in episodes], [e.ids for e in episodes], CPU)
            values = each.critic(rows).square().sum()
            (values - token_logprobs(response_logits(each.policy, rows), rows.targets_N, 0.8).sum()).backward()
        else:
            for role in ("policy", "critic"):
                Learner(each, cfg, 0).accumulate(role, episodes, 1, defaultdict(float))
    shared, alone = gradients(roles), gradients(apart)
    assert shared.keys() == alone.keys() and len(shared) > 20
    assert all(gradient.abs().max() > 1e-6 for gradient in alone.values())
    for key, gradient in alone.items():
        torch.testing.assert_close(shared[key], gradient, rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in roles.reference.parameters())


@pytest.mark.parametrize("trained", ["policy", "critic"])
def test_a_step_of_one_role_moves_no_other(tmp_path: Path, parents: Parents, trained: str) -> None:
    other = "critic_learning_rate" if trained == "policy" else "learning_rate"
    given = stage(tmp_path, parents)
    loop = ppo.Loop(settings(**{other: 0.0}), given)
    rows = [{"messages": p.messages} for p in loop.prompts]
    ids = [given.renderer.prompt_ids(p.messages) for p in loop.prompts]
    disturb(loop.roles.critic.head)
    episodes = [
        Episode(prompt=p, prompt_ids=i, ids=[5, 6, 7], finished=True, text="", logp=torch.zeros(3))
        for p, i in zip(loop.prompts, ids, strict=True)
    ]

    def seen() -> dict[str, Any]:
        logp = [sequence_logprobs(m, ids, ids) for m in (loop.roles.policy, loop.roles.reference)]
        reward = reward_of(loop).score(["" for _ in rows], ["abc"] * len(rows), rows)
        values = read_values(loop.roles.critic, episodes, 64)
        return {"policy": torch.cat(logp[0]), "reference": torch.cat(logp[1]),
                "critic": torch.cat(values), "reward": torch.tensor(reward)}  # fmt: skip

    before = seen()
    loop._update(1)
    after = seen()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [trained]


# ---- the reward model and the critic on the base


def test_the_reward_on_the_base_scores_what_it_scores_alone(parents: Parents) -> None:
    base = SharedBase(load_policy(parents.sft, ModelConfig(), CPU), parents.sft)
    disturb(share(base, LORA, 0).policy, by=0.3)
    alone = TrainedReward(str(parents.rm), micro_tokens=64)
    shared = TrainedReward(str(parents.rm), micro_tokens=64, shared_base=base)
    assert isinstance(shared.model, Scorer) and not isinstance(alone.model, Scorer)
    assert len(shared.renderer.tokenizer) == base.model.get_input_embeddings().weight.shape[0] + 1
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("help", "why is it so?", "x")]
    texts = ["because.", "", "<|pad_|> a much longer response than the others"]
    wanted = alone.score([""] * 3, texts, rows)
    assert max(wanted) - min(wanted) > 0.05
    assert shared.score([""] * 3, texts, rows) == pytest.approx(wanted, abs=1e-6)
    assert not any(p.requires_grad for p in shared.model.parameters())
    second = TrainedReward(str(parents.rm), shared_base=base)  # another reward on the same base
    assert second.score([""] * 3, texts, rows) == pytest.approx(wanted, abs=1e-6)


def test_the_reward_models_adapter_opens_on_the_sft_model_that_lacks_its_pad_token(parents: Parents) -> None:
    start = load_reward_model(parents.sft, ModelConfig(), CPU, init_head=True)
    opened = open_adapter(start, parents.rm.parent / "adapter")
    rows = [[5, 6, 7], [8, 9]]
    merged = load_reward_model(parents.rm, ModelConfig(), CPU)
    assert score_ids(opened, rows, 64) == pytest.approx(score_ids(merged, rows, 64), abs=1e-6)


def test_a_holdout_and_the_parts_of_a_sum_share_the_base_too(tmp_path: Path, parents: Parents) -> None:
    other = reward_model(tmp_path / "other", parents.sft, LORA, by=0.3)
    cfg = settings(holdout=str(other))
    cfg.reward = {"_target_": "reward_models.weighted.WeightedSum", "parts": {"trained": {**REWARD, "weight": 2.0}}}
    loop = ppo.Loop(cfg, stage(tmp_path / "ppo", parents))
    assert loop.rewards.holdout is not None
    rows = [{"messages": loop.prompts[0].messages}]
    for shared, folder, weight in ((reward_of(loop), parents.rm, 2.0), (loop.rewards.holdout.reward, other, 1.0)):
        alone = TrainedReward(str(folder)).score([""], ["abc"], rows)[0]
        assert shared.score([""], ["abc"], rows) == pytest.approx([weight * alone], rel=2e-6)
    inner = [reward_of(loop).parts["trained"].reward.model, loop.rewards.holdout.reward.model]  # type: ignore[attr-defined]
    assert all(isinstance(each, Scorer) and each.body.base is loop.roles.policy.base for each in inner)


def test_half_precision_files_are_told_apart(tmp_path: Path, parents: Parents) -> None:
    """A reward model saved in bf16 is its base plus its adapter, rounded; with another adapter it is not."""
    fits = {}
    for name, by in (("a", 0.05), ("b", 0.052)):
        made = reward_model(tmp_path / name, parents.sft, LORA, by)
        half = load_reward_model(made, ModelConfig(), CPU).to(torch.bfloat16)
        save_model(half, load_tokenizer(made, ModelConfig()), made)
        fits[name] = SharedBase(load_policy(parents.sft, ModelConfig(), CPU), parents.sft).fitting(made)
    assert all(stored is not None for stored, _ in fits.values()), fits
    shutil.rmtree(tmp_path / "a" / "adapter")
    shutil.copytree(tmp_path / "b" / "adapter", tmp_path / "a" / "adapter")
    _, reason = SharedBase(load_policy(parents.sft, ModelConfig(), CPU), parents.sft).fitting(tmp_path / "a" / "model")
    assert "proj.weight differs" in reason


def test_the_critic_starts_as_a_copy_of_the_reward_models_adapter(tmp_path: Path, parents: Parents) -> None:
    loop = ppo.Loop(settings(lora=LoraConfig(enabled=True, r=3, alpha=3)), stage(tmp_path, parents))
    stored = load_file(parents.rm.parent / "adapter" / "adapter_model.safetensors")
    own = dict(loop.roles.critic.body.own.named_parameters())
    assert len(own) == 28  # two layers, seven linear maps, two factors each, of the reward model's rank
    assert all(torch.equal(stored[f"base_model.model.{key}"], p) for key, p in own.items())
    assert all(p.requires_grad for p in own.values())
    assert next(loop.roles.policy.parameters()).shape[0] == 3
    assert not any(p.any() for p in loop.roles.critic.head.parameters())


def test_fresh_adapters_differ_and_depend_on_the_seed_alone(tmp_path: Path, parents: Parents) -> None:
    made = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(made))
        cfg = settings(critic_init=CriticInit.policy)
        cfg.seed, cfg.reward = seed, config().reward
        roles = ppo.Loop(cfg, stage(tmp_path / folder, parents)).roles
        made.append([torch.cat([p.flatten() for p in m.parameters()]) for m in (roles.policy, roles.critic.body)])
    assert all(torch.equal(x, y) for x, y in zip(made[0], made[1], strict=True))
    assert not torch.equal(made[0][0], made[2][0]) and not torch.equal(made[0][0], made[0][1])
    base = base_of("llama")
    before = torch.get_rng_state()
    base.add("policy", LORA, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reward_model_of_another_kind_stays_a_model_of_its_own(tmp_path: Path, parents: Parents, capsys: Any) -> None:
    full = reward_model(tmp_path / "full", parents.sft, None)
    other = tmp_path / "other" / "model"
    model = load_policy(parents.sft, ModelConfig(), CPU)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    save_model(model, load_tokenizer(parents.sft, ModelConfig()), other)
    foreign = reward_model(tmp_path / "foreign", other, LORA, by=0.21)
    swapped = tmp_path / "swapped"
    shutil.copytree(parents.rm.parent, swapped)
    shutil.rmtree(swapped / "adapter")
    shutil.copytree(foreign.parent / "adapter", swapped / "adapter")
    for rm, reason in ((full, "no LoRA adapter beside it"), (foreign, r"up_proj.weight differs"),
                       (swapped / "model", "proj.weight differs")):  # fmt: skip
        loop = ppo.Loop(settings(), stage(tmp_path / "ppo", parents, rm))
        said = " ".join(capsys.readouterr().out.split())
        assert f"{reason}" in said and "is loaded beside the shared base" in said
        assert "the critic starts as a fresh adapter" in said
        assert not isinstance(reward_of(loop).model, Scorer)
        assert loop.roles.critic.body.base is loop.roles.policy.base


def test_what_cannot_be_is_refused(parents: Parents) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.lora\.dropout: must be 0"):
        ppo_config(lora=LoraConfig(enabled=True, dropout=0.1)).check("ppo")
    with pytest.raises(ConfigError, match=r"ppo\.lora\.target_modules"):
        share(base_of("llama"), LoraConfig(enabled=True, target_modules=["nothing"]), 0)


def test_roles_can_be_copied(parents: Parents) -> None:
    roles = roles_of("llama")
    twin = copy.deepcopy(roles)
    disturb(twin.policy, by=0.3)
    assert twin.policy.base is twin.critic.body.base is not roles.policy.base
    episodes = episodes_of(roles, ppo_config())
    compare(episodes, twin, ppo_config(), 1)
    ids = [e.prompt_ids for e in episodes], [e.ids for e in episodes]
    ours, theirs = (torch.cat(sequence_logprobs(each.policy, *ids)) for each in (roles, twin))
    assert not torch.allclose(ours, theirs)
