"""What is done with PPO on one rank and on two, to be compared: functions of the ranks, called in tests/two_ranks.py.

`alone` stands for one process: the same function on rank 0 by itself.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_toys
import torch
from ppo_tiny import config, context, ppo_config, prompts
from test_rollout import make
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import rollout as rollout_module
from rlhf.config import EngineConfig, EngineKind
from rlhf.engine.ppo import place
from rlhf.engine.ranks import Ranks
from rlhf.ppo import evaluate
from rlhf.ppo.engines import HfRollout
from rlhf.ppo.episodes import Episode, compare, dealt, draw, estimate, rollout, together
from rlhf.ppo.roles import Roles, assemble
from rlhf.ppo.update import Learner
from rlhf.rollout import Sampling, generate
from rlhf.types import Prompt
from stages import ppo

PROMPTS = [[2 + (i * 7 + j * j) % 9 for j in range(1 + i % 5)] for i in range(8)]


def alone(ranks: Ranks, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` gives on rank 0 as the only one."""
    return function(Ranks(), *arguments) if ranks.is_main else None


def roles_of(kind: str, lora: bool) -> Roles:
    """In fp32."""
    if lora:
        roles = lora_toys.roles_of(kind)
        roles.policy.base.model.float()
        roles.critic.float()
        return roles  # type: ignore[no-any-return]
    policy = make(kind).float()
    with torch.no_grad():
        for p in policy.parameters():
            p.div_(2)
    return assemble(policy, copy.deepcopy(policy.base_model))


def given_episodes(roles: Roles) -> list[Episode]:
    """The same on every rank."""
    cfg = ppo_config(temperature=0.8)
    sampled = generate(roles.policy, PROMPTS, list(range(8)), Sampling(0.8, 7, 1))
    episodes = [
        Episode(
            prompt=Prompt(messages=[], id=f"row {i}"), prompt_ids=PROMPTS[i], ids=r.ids, finished=r.finished, text="",
            logp=torch.tensor(r.logprobs), score=[1.0, -1.0, 0.5, 2.0][i % 4], place=i,
        )
        for i, r in enumerate(sampled)
    ]  # fmt: skip
    compare(episodes, roles, cfg, 1)
    return episodes


def three_updates_in_bf16(ranks: Ranks, kind: str, lora: bool, engine: str) -> list[dict[str, float]]:
    """As the stage makes them with model.dtype=bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return three_updates(ranks, kind, lora, engine, {}, mixed=True)


def three_updates(
    ranks: Ranks, kind: str, lora: bool, engine: str, changes: dict[str, Any], mixed: bool = False
) -> list[dict[str, float]]:
    """The metrics of three updates on given rollouts, the values read by the critic each time."""
    torch.manual_seed(0)
    roles = roles_of(kind, lora)
    episodes = given_episodes(roles)
    placement = place(EngineConfig(kind=EngineKind[engine]), ranks, mixed=mixed)
    placement.freeze(roles.reference)
    fast = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "micro_tokens": 20, "temperature": 0.8}
    learner = Learner(roles, ppo_config(**{**fast, **changes}), 0, (), placement)
    found = []
    for update in (1, 2, 3):
        learner.appraise(episodes, update)
        estimate(episodes, learner.cfg, learner.cfg.kl.coef)
        found.append(learner.learn(episodes, update))
    return found


def rolled_out(ranks: Ranks, model: Path, group: int) -> list[tuple[list[int], list[float], str]]:
    """Responses to ten prompts, of all ranks."""
    given = context(model.parent / f"rollout-{ranks.rank}", model)
    policy = load(model)
    drawn = draw(prompts(5), 0, 1, 10, 2)
    own = rollout(HfRollout(), policy, given.renderer, ppo_config(decode_group=group), drawn, ranks)
    return [(e.ids, e.logp.tolist(), e.text) for e in together(ranks, own)]


def dealt_places(ranks: Ranks, lengths: list[int]) -> list[int]:
    """What each rank gets of episodes of so many tokens that rank 0 alone has sampled."""
    sampled = [
        Episode(
            prompt=Prompt(messages=[], id=str(place)), prompt_ids=[3], ids=[2] * (length - 1), finished=True, text="",
            place=place, logp=torch.zeros(length - 1),
        )
        for place, length in enumerate(lengths)
    ]  # fmt: skip
    return [e.place for e in dealt(ranks, lambda: sampled if ranks.is_main else [])]


def scored_rows(ranks: Ranks, folder: Path, model: Path) -> list[int]:
    """How many episodes this rank scores in an update and in an evaluation, where one decode group holds them all."""
    given = context(folder, model)
    given.ranks = ranks
    cfg = config(batch=12, minibatch=6, decode_group=64)
    cfg.engine = EngineConfig(kind=EngineKind.ddp if ranks.size > 1 else EngineKind.single)
    loop, counted, score = ppo.Loop(cfg, given), list[int](), ppo.score

    def counting(episodes: Any, *arguments: Any) -> None:
        counted.append(len(episodes))
        score(episodes, *arguments)

    ppo.score = evaluate.score = counting
    try:
        loop._evaluated(0)
        loop._update(1)
    finally:
        ppo.score = evaluate.score = score
    return counted


def load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model).eval()


def stage(ranks: Ranks, folder: Path, model: Path, engine: str, changes: dict[str, Any], stop_after: int = 0) -> Any:
    """The whole stage; with `stop_after` it is asked to stop once so many updates are done."""
    torch.manual_seed(0)
    random.seed(0)
    cfg = config(**changes)
    cfg.engine = EngineConfig(kind=EngineKind[engine])
    asked = iter([False] * (stop_after - 1) + [True] * 99 if stop_after else [False] * 999)
    given = context(folder, model, stopping=lambda: next(asked))
    given.ranks = ranks
    result = ppo.run(cfg, given)
    return {"stop_reason": result.stop_reason, "updates": result.updates, "metrics": result.metrics}


def killed_stage(ranks: Ranks, folder: Path, model: Path, engine: str, changes: dict[str, Any]) -> Any:
    """Rank 1 is killed in the middle of the third update."""
    if ranks.rank == 1:
        learn = Learner.learn

        def deadly(self: Learner, episodes: Any, update: int) -> dict[str, float]:
            if update == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return learn(self, episodes, update)

        Learner.learn = deadly  # type: ignore[method-assign]
    return stage(ranks, folder, model, engine, changes)


def nan_for_one(prompt: str, response: str, row: dict[str, Any]) -> float:
    return float("nan") if row["messages"][0]["content"] == "help me 1" else 0.0


def bad_reward(ranks: Ranks, folder: Path, model: Path, engine: str) -> Any:
    cfg = config(batch=12, minibatch=6, decode_group=3)
    cfg.engine, cfg.reward["function"] = EngineConfig(kind=EngineKind[engine]), "ppo_cells.nan_for_one"
    given = context(folder, model)
    given.ranks = ranks
    ppo.Loop(cfg, given)._update(1)


def bad_loss(ranks: Ranks, folder: Path, model: Path, engine: str) -> Any:
    roles = roles_of("llama", False)
    episodes = given_episodes(roles)
    learner = Learner(
        roles, ppo_config(minibatch=8, micro_tokens=10), 0, (), place(EngineConfig(kind=EngineKind[engine]), ranks)
    )
    learner.appraise(episodes, 1)
    estimate(episodes, learner.cfg, 0.1)
    episodes[3].advantages[0] = float("nan")
    learner.learn(episodes, 1)


def only_ends(ranks: Ranks, folder: Path, model: Path, engine: str, changes: dict[str, Any]) -> Any:
    """Every response is the end token, which the policy of this run always gives."""
    choose = rollout_module._Decoder._choose

    def end(self: Any, step: int, logp_BV: torch.Tensor) -> torch.Tensor:
        return torch.full_like(choose(self, step, logp_BV), self.sampling.eos_id)

    rollout_module._Decoder._choose = end  # type: ignore[method-assign]
    try:
        return stage(ranks, folder, model, engine, changes)
    finally:
        rollout_module._Decoder._choose = choose  # type: ignore[method-assign]


def gathers(ranks: Ranks, folder: Path, model: Path) -> list[tuple[int, int]]:
    """(Whole models gathered, single modules fetched) from the start of an update to the start of its rollout, and in
    the rollout, under ZeRO-3."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    cfg = config(batch=12, minibatch=6, decode_group=3)
    cfg.engine = EngineConfig(kind=EngineKind.zero3)
    given = context(folder, model)
    given.ranks = ranks
    loop = ppo.Loop(cfg, given)
    counts, found = [0, 0], []
    enter, fetch, roll = GatheredParameters.__enter__, Coordinator.fetch_sub_module, ppo.rollout

    def entered(self: Any) -> Any:
        counts[0] += 1
        return enter(self)

    def fetched(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[1] += 1
        return fetch(self, *args, **kwargs)

    def rolled(*args: Any) -> Any:
        found.append(tuple(counts))
        out = roll(*args)
        found.append(tuple(counts))
        return out

    GatheredParameters.__enter__, Coordinator.fetch_sub_module, ppo.rollout = entered, fetched, rolled
    try:
        loop._update(1)
    finally:
        GatheredParameters.__enter__, Coordinator.fetch_sub_module, ppo.rollout = enter, fetch, roll
    assert counts[1] > 0  # training fetches
    return found


def share_held(ranks: Ranks) -> float:
    """Bytes of all float tensors of a rank under ZeRO-3 after an update, over what one rank alone holds: 16 bytes a
    trained weight in fp32 (weight, gradient, two moments), 4 a frozen one."""
    from rlhf.engine import deepspeed as module

    module.BUCKET = 1000  # else the buffers for what is sent are most of it
    before = _storages()
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    policy = LlamaForCausalLM(llama).eval()
    roles = assemble(policy, copy.deepcopy(policy.base_model))
    episodes = given_episodes(roles)
    alone = sum(size * p.numel() for model, size in ((roles.policy, 16), (roles.critic, 16), (roles.reference, 4))
                for p in model.parameters())  # fmt: skip
    placement = place(EngineConfig(kind=EngineKind.zero3), ranks)
    placement.freeze(roles.reference)
    learner = Learner(roles, ppo_config(micro_tokens=20), 0, (), placement)
    del policy
    learner.appraise(episodes, 1)
    estimate(episodes, learner.cfg, 0.1)
    learner.learn(episodes, 1)
    return sum(nbytes for place_, nbytes in _storages().items() if place_ not in before) / alone


def _storages() -> dict[int, int]:
    gc.collect()
    floats = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_floating_point())
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in floats}
