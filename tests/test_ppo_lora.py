"""PPO with LoRA: one base in memory under all four roles, each of which computes as if it had a model of its own."""

from __future__ import annotations

import copy
import gc
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ppo_tiny import config, context, metrics, ppo_config
from runs import STAGES, TINY, read_json, rlhf, words, write_data
from safetensors.torch import load_file
from test_ppo_update import episodes_of
from test_rollout import PROMPTS, SEEDS, make, sampling
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_models.trained import TrainedReward
from rlhf.adapters import RoleModel, Scorer, SharedBase
from rlhf.artifacts import checkpoints
from rlhf.config import CriticInit, KlConfig, LoraConfig, ModelConfig
from rlhf.errors import ConfigError, Preempted
from rlhf.lora import add_lora, merge_lora, save_adapter
from rlhf.models import ensure_pad, load_policy, load_reward_model, save_model
from rlhf.ppo.checks import check_first_rollout
from rlhf.ppo.episodes import Episode, compare, read_values
from rlhf.ppo.roles import Critic, Roles, add_critic, share
from rlhf.ppo.update import Learner
from rlhf.render import load_tokenizer
from rlhf.rollout import collate, generate, response_logits, sequence_logprobs, token_logprobs
from stages import ppo

CPU = torch.device("cpu")
LORA = LoraConfig(enabled=True, r=2, alpha=6)
REWARD = {"_target_": "reward_models.trained.TrainedReward"}


def base_of(kind: str) -> SharedBase:
    model = make(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(2)
    return SharedBase(model, kind)


def roles_of(kind: str, *, checkpointing: bool = False) -> Any:
    roles = share(base_of(kind), LORA, 0, activation_checkpointing=checkpointing)
    add_critic(roles, LORA, 0)
    return roles


def disturb(*models: torch.nn.Module, by: float = 0.03) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


@dataclass
class Parents:
    sft: Path
    rm: Path  # trained with LoRA on sft; its tokenizer has one token more


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Parents:
    folder = tmp_path_factory.mktemp("parents")
    sft = folder / "sft" / "model"
    shutil.copytree(tiny_model, sft)
    tokenizer = AutoTokenizer.from_pretrained(sft)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(sft)
    return Parents(sft=sft, rm=reward_model(folder / "rm", sft, LORA))


def reward_model(folder: Path, sft: Path, lora: LoraConfig | None, by: float = 0.2) -> Path:
    """A reward model as stage=rm leaves it, with random changes for training."""
    tokenizer = load_tokenizer(sft, ModelConfig())
    model = load_reward_model(sft, ModelConfig(), CPU, init_head=True)
    ensure_pad(model, tokenizer)
    if lora is not None:
        model = add_lora(model, lora, seed=3)
    disturb(model, by=by)
    if lora is not None:
        save_adapter(model, folder / "adapter")
        model = merge_lora(model)
    save_model(model, tokenizer, folder / "model")
    return folder / "model"


def stage(folder: Path, parents: Parents, rm: Path | None = None, **more: Any) -> Any:
    given = context(folder, parents.sft, **more)
    given.parents["rm"] = rm or parents.rm
    return given


def reward_of(loop: ppo.Loop) -> Any:
    return loop.rewards.paid.reward


def settings(**changes: Any) -> Any:
    made = config(**{"lora": LORA, "critic_init": CriticInit.reward, **changes})
    made.reward = REWARD
    return made


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
            Learner(each, cfg, 0).accumulate(episodes, 1, defaultdict(float))
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
                       (swapped / "model", "weight differs")):  # fmt: skip
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
