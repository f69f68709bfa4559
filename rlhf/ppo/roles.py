"""The models of PPO: the policy that is trained, the frozen reference it started from, the critic.

In full fine-tuning each is a model of its own. With LoRA they are one model in memory: policy and critic are adapters
on the frozen SFT model, which is the reference by itself.

Shapes: N response tokens of a micro-batch laid end to end, H hidden units.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf.adapters import RoleModel, SharedBase, StoredAdapter
from rlhf.artifacts import atomic_folder
from rlhf.config import Config, CriticInit, LoraConfig
from rlhf.console import say
from rlhf.errors import ConfigError
from rlhf.last_layer import last_layer_at
from rlhf.logprobs import Rows, widen
from rlhf.lora import merge_lora, open_adapter
from rlhf.models import enable_activation_checkpointing, load_policy, load_reward_model, save_model, training_config
from rlhf.render import load_tokenizer
from rlhf.rollout import seed_of

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.context import Context

DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


class Critic(nn.Module):
    """A transformer body of its own and a scalar head in fp32 that starts at zero: every value is 0 at first."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        at = next(body.parameters())
        with torch.no_grad():  # some bodies project their output, so the configuration's width may not be it
            width = body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=at.device)).last_hidden_state.shape[-1]
        dtype = torch.float64 if at.dtype == torch.float64 else torch.float32
        self.head = nn.Linear(width, 1, device=at.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Rows) -> Tensor:
        """values_N of the states in which the response tokens are chosen."""
        with last_layer_at(self.body, rows.take_N):
            hidden_BTH = self.body(input_ids=rows.ids_BT, use_cache=False).last_hidden_state
        with torch.autocast(hidden_BTH.device.type, enabled=False):  # a value in bf16 would have two digits
            values: Tensor = self.head(widen(hidden_BTH.flatten(0, 1)[rows.take_N])).squeeze(-1)
        return values


@dataclass(kw_only=True, slots=True)
class Roles:
    policy: Any
    reference: Any
    critic: Critic | None  # None: the estimator needs none


def open_base(cfg: Config, context: Context) -> SharedBase | None:
    """The SFT model for all roles to share, in fp32, if PPO runs with LoRA."""
    if not cfg.ppo.lora.enabled:
        return None
    start = context.parents["sft"]
    return SharedBase(load_policy(start, training_config(cfg.model), context.device), start)


def load_roles(cfg: Config, context: Context, base: SharedBase | None = None) -> Roles:
    """Policy and reference from the SFT parent; the critic, if the estimator has one, from the reward model or from the
    policy. All are fp32.

    base: what `open_base` gave. With one, policy and critic are adapters on it and the reference is the base alone.
    """
    if base is not None:
        roles = share(base, cfg.ppo.lora, cfg.seed, activation_checkpointing=cfg.model.activation_checkpointing)
        if cfg.ppo.has_critic:
            add_critic(roles, cfg.ppo.lora, cfg.seed, _critic_adapter(cfg, context, base))
        return roles
    policy = load_policy(context.parents["sft"], training_config(cfg.model), context.device)
    body = _critic_body(cfg, context, policy) if cfg.ppo.has_critic else None
    return assemble(policy, body, activation_checkpointing=cfg.model.activation_checkpointing)


def assemble(policy: Any, body: Any, *, activation_checkpointing: bool = False) -> Roles:
    """Roles around a loaded policy and a critic body (None: no critic): dropout off, the reference frozen."""
    critic = None if body is None else Critic(body)
    roles = Roles(policy=policy, reference=copy.deepcopy(policy), critic=critic)
    for model in filter(None, (roles.policy, roles.reference, critic)):
        model.eval()
    roles.reference.requires_grad_(False)
    if activation_checkpointing:
        # The library recomputes only in train mode, which therefore must hold no dropout.
        for model in filter(None, (roles.policy, body)):
            remove_dropout(model)
            enable_activation_checkpointing(model)
            model.train()
    return roles


def share(base: SharedBase, lora: LoraConfig, seed: int, *, activation_checkpointing: bool = False) -> Roles:
    """Policy and reference on one base, without a critic yet."""
    remove_dropout(base.model)  # the roles share the modules, and one that trains may be in train mode
    base.add("policy", lora, seed_of(seed, "lora", "policy"))
    roles = Roles(policy=base.role("policy"), reference=base.role(None), critic=None)
    if activation_checkpointing:
        enable_activation_checkpointing(base.model, context_fn=base.recomputing)
        roles.policy.train()
    return roles


def add_critic(roles: Roles, lora: LoraConfig, seed: int, stored: StoredAdapter | None = None) -> None:
    """A critic on the policy's base: a copy of the adapter `stored`, or a fresh one."""
    base = roles.policy.base
    if stored is None:
        base.add("critic", lora, seed_of(seed, "lora", "critic"))
    else:
        base.put("critic", stored, trainable=True)
    roles.critic = Critic(base.role("critic", body=True))
    roles.critic.train(roles.policy.training)


def save_policy(policy: Any, cfg: Config, context: Context) -> None:
    """Write `model/`, a plain causal LM; with LoRA also `adapter/`, which is opened again on the SFT model as a user
    would, and merged into that: the shared base stays as it is."""
    if isinstance(policy, RoleModel):
        with atomic_folder(context.folder / "adapter") as part:
            policy.base.save_adapter("policy", part)
        start = load_policy(context.parents["sft"], training_config(cfg.model), torch.device("cpu"))
        policy = merge_lora(open_adapter(start, context.folder / "adapter"))
    with atomic_folder(context.folder / "model") as part:
        save_model(policy, context.renderer.tokenizer, part, trust_remote_code=cfg.model.trust_remote_code)


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the modules to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _critic_body(cfg: Config, context: Context, policy: Any) -> Any:
    path = _critic_source(cfg, context)
    if path is not None:
        body = load_reward_model(path, training_config(cfg.model), context.device).base_model
    else:
        body = copy.deepcopy(policy.base_model)
    return body.requires_grad_(True)


def _critic_adapter(cfg: Config, context: Context, base: SharedBase) -> StoredAdapter | None:
    path = _critic_source(cfg, context)
    if path is None:
        return None
    stored, reason = base.fitting(path)
    if stored is None:
        say(f"the critic starts as a fresh adapter, not as the reward model {path}: {reason}")
    return stored


def _critic_source(cfg: Config, context: Context) -> Path | None:
    """The reward model that the critic is to start from; None: from the policy."""
    if cfg.ppo.critic_init is not CriticInit.reward:
        return None
    if "rm" not in context.parents:
        say("this run has no reward model of its own: the critic starts from the policy")
        return None
    path = context.parents["rm"]
    theirs = load_tokenizer(path, cfg.model).get_vocab()  # may hold one token more: a pad that is not the end
    if any(theirs.get(token) != i for token, i in context.renderer.tokenizer.get_vocab().items()):
        raise ConfigError(
            f"ppo.critic_init=reward: the reward model in {path} has another vocabulary than the policy, "
            "so it cannot read the policy's tokens: use ppo.critic_init=policy"
        )
    return path
