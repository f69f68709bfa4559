"""One process of the comparison: this project's PPO stage, update by update, on a frozen workload."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # part of the floor, as it is of the other system's
from frozen import Replay, Workload
from process import BATCH, EPOCHS, LORA_ALPHA, LORA_RANK, Channel, Settings

import reward_models.trained  # noqa: F401  # loaded by name: part of the floor
import rlhf.rollout
import stages.ppo
from rlhf.config import Config, KlConfig, LoraConfig, ModelConfig, PpoConfig, Schedule
from rlhf.context import Context, StageData
from rlhf.data import DataReport, Loaded
from rlhf.heap import keep_freed_memory
from rlhf.render import Renderer, load_tokenizer
from rlhf.rollout import seed_of
from rlhf.tracking import JsonlTracker
from rlhf.types import Prompt


def configure(work: Workload, settings: Settings) -> Config:
    lora = LoraConfig(enabled=True, r=LORA_RANK, alpha=LORA_ALPHA) if settings.lora else LoraConfig()
    ppo = PpoConfig(
        updates=10_000, batch=BATCH, minibatch=BATCH, epochs=EPOCHS, micro_tokens=settings.micro_tokens,
        decode_group=BATCH, learning_rate=settings.learning_rate, critic_learning_rate=settings.learning_rate,
        schedule=Schedule.constant, max_new_tokens=work.cap, no_eos_penalty=0.0, normalize_reward=False,
        max_grad_norm=0.0, eval_prompts=1, eval_every=10_000, kl=KlConfig(coef=0.05), lora=lora,
    )  # fmt: skip
    return Config(
        model=ModelConfig(path=work.policy), ppo=ppo,
        reward={"_target_": "reward_models.trained.TrainedReward", "micro_tokens": settings.micro_tokens},
    )  # fmt: skip


def make_context(work: Workload, folder: Path) -> Context:
    prompts = [Prompt(messages=messages, id=str(i)) for i, messages in enumerate(work.messages)]
    loaded = Loaded(train=prompts, heldout=prompts[:1], report=DataReport(key="data.prompts"))
    return Context(
        stage="ppo", folder=folder, parents={"sft": Path(work.policy), "rm": Path(work.reward)}, parent_extra={},
        data=StageData(prompts=loaded), renderer=Renderer(load_tokenizer(work.policy, ModelConfig(path=work.policy))),
        device=torch.device("cpu"), tracker=JsonlTracker(folder), stopping=lambda: False,
    )  # fmt: skip


def replay(work: Workload, eos_id: int) -> None:
    """Draw the prompts in their order, and put the recorded tokens in the place of those that were sampled."""
    recorded, choose = Replay(work, eos_id), rlhf.rollout._Decoder._choose

    def draw(prompts: list[Prompt], seed: int, update: int, batch: int, group: int) -> list[tuple[Prompt, int]]:
        places = [place % len(prompts) for place in range((update - 1) * batch, update * batch)]
        return [(prompts[place], seed_of(seed, "rollout", update, place)) for place in places]

    def replayed(decoder: Any, step: int, logp_BV: torch.Tensor) -> torch.Tensor:
        sampled = choose(decoder, step, logp_BV)  # its cost stays
        tokens = [recorded.token(tuple(decoder.prompts[row]), step) for row in decoder.rows]
        return torch.tensor(tokens, device=sampled.device)

    stages.ppo.draw = draw
    rlhf.rollout._Decoder._choose = replayed  # type: ignore[method-assign]


class PaidAsTold:
    """A reward for the check: the scores that the other system computed, by prompt."""

    def __init__(self, path: str) -> None:
        self.scores = torch.load(path, weights_only=True)["scores"]

    def score(self, prompts: Any, responses: Any, rows: Any) -> list[float]:
        return [float(s) for s in self.scores]


def capture(loop: Any, path: str) -> None:
    """One update, and what it computed, into `path`."""
    kept: list[Any] = []
    learn = loop.learner.learn

    def keep(episodes: Any, *args: Any, **named: Any) -> Any:
        kept.extend(episodes)
        return learn(episodes, *args, **named)

    loop.learner.learn = keep
    metrics = loop._update(1)
    names = ("logp", "reference", "values", "advantages", "returns")
    torch.save(
        {name: [getattr(e, name) for e in kept] for name in names}
        | {"raw": torch.tensor([e.raw for e in kept]), "losses": (metrics["policy/loss"], metrics["critic/loss"])},
        path,
    )


def main() -> None:
    keep_freed_memory()  # as rlhf.worker does
    channel = Channel()
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    if settings.lora:
        import peft  # noqa: F401
    work = Workload.load(Path(settings.workload))
    channel.imported()
    with tempfile.TemporaryDirectory() as folder:
        context = make_context(work, Path(folder))
        replay(work, context.renderer.eos_id)
        if work.fixed:
            context.renderer.eos_id = -1  # nothing ends
        loop = stages.ppo.Loop(configure(work, settings), context)
        if settings.check:
            if settings.scores:
                paid = replace(loop.rewards.paid, reward=PaidAsTold(settings.scores))
                loop.rewards = replace(loop.rewards, paid=paid)
            capture(loop, settings.check)
            return
        update = 0
        while channel.wait():
            update += 1
            clock = stages.ppo.Clock()
            metrics = loop._update(update)
            clock.lap("seconds")
            score = metrics["time/score"] + metrics["time/compare"]
            channel.report(
                clock.laps | {"generate": metrics["time/generate"], "score": score, "train": metrics["time/train"]}
            )


if __name__ == "__main__":
    main()
