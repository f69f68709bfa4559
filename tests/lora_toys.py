"""What the tests of PPO with LoRA share: small roles, parents as the stages leave them, a configuration."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ppo_tiny import config, context
from test_rollout import make
from transformers import AutoTokenizer

from rlhf.adapters import SharedBase
from rlhf.config import CriticInit, LoraConfig, ModelConfig
from rlhf.lora import add_lora, merge_lora, save_adapter
from rlhf.models import ensure_pad, load_reward_model, save_model
from rlhf.ppo.roles import add_critic, share
from rlhf.render import load_tokenizer
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


def make_parents(folder: Path, tiny_model: Path) -> Parents:
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
