"""A PPO stage small enough for tests: the random model of conftest, a few prompts, rewards in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Config, CriticInit, KlConfig, ModelConfig, PpoConfig, Schedule
from rlhf.context import Context, StageData
from rlhf.data import DataReport, Loaded
from rlhf.render import Renderer, load_tokenizer
from rlhf.tracking import JsonlTracker, read_lines
from rlhf.types import Prompt


def early_letters(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Pays for the letters a to m."""
    return sum(letter in "abcdefghijklm" for letter in response) / 4


def ppo_config(**changes: Any) -> PpoConfig:
    small = {
        "updates": 3, "batch": 8, "minibatch": 4, "micro_tokens": 64, "decode_group": 4, "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2, "max_new_tokens": 6, "eval_prompts": 3, "eval_every": 2, "checkpoint_every": 1,
        "critic_init": CriticInit.policy, "schedule": Schedule.linear, "kl": KlConfig(coef=0.05),
    }  # fmt: skip
    return PpoConfig(**{**small, **changes})


def config(**changes: Any) -> Config:
    return Config(
        model=ModelConfig(path="tiny"), ppo=ppo_config(**changes),
        reward={"_target_": "reward_models.function.FunctionReward", "function": "ppo_tiny.early_letters"},
    )  # fmt: skip


def prompts(n: int, first: int = 0) -> list[Prompt]:
    words = ["ab", "help me", "why is it so?", "x"]
    texts = [f"{words[i % 4]} {i}" for i in range(first, first + n)]
    return [Prompt(messages=[{"role": "user", "content": text}], id=text, tags={"n": 1}) for text in texts]


def context(folder: Path, model: Path, stopping: Callable[[], bool] = lambda: False) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        stage="ppo", folder=folder, parents={"sft": model}, parent_extra={},
        data=StageData(prompts=Loaded(train=prompts(5), heldout=prompts(4, 5), report=DataReport(key="data.prompts"))),
        renderer=Renderer(load_tokenizer(model, ModelConfig(path="tiny"))), device=torch.device("cpu"),
        tracker=JsonlTracker(folder), stopping=stopping,
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The recorded lines without what a clock said."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
