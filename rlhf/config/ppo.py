"""The PPO stage's part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.parts import LoraConfig, Schedule, divides, require


class CriticInit(Enum):
    reward = "reward"
    policy = "policy"


class Estimator(Enum):
    gae = "gae"  # with a critic (Schulman et al. 1506.02438)
    rloo = "rloo"  # a prompt's other responses as the baseline, no critic (Ahmadian et al. 2402.14740)
    group_norm = "group_norm"  # a prompt's responses whitened, no critic (Shao et al. 2402.03300)


class KlPlace(Enum):
    reward = "reward"  # k1, on each token's reward
    loss = "loss"  # k3, beside the policy loss


class AlarmAction(Enum):
    warn = "warn"
    stop = "stop"


@dataclass
class KlConfig:
    coef: float = 0.05  # of the penalty on KL(policy || reference); the start value if `target` is set
    place: KlPlace = KlPlace.reward  # where the penalty acts
    target: float | None = None  # nats a response: `coef` is adapted towards it; None: fixed
    horizon: int = 10_000  # episodes over which an adapted coefficient follows (Ziegler et al. 1909.08593)
    budget: float | None = None  # mean KL(policy || reference), nats a response
    patience: int = 3  # updates over the budget before the run stops at the best checkpoint under it

    def check(self, key: str) -> None:
        require(self.coef >= 0, f"{key}.coef", f"must not be negative, not {self.coef}")
        require(self.horizon > 0, f"{key}.horizon", f"must be positive, not {self.horizon}")
        require(self.patience > 0, f"{key}.patience", f"must be positive, not {self.patience}")
        require(self.budget is None or self.budget > 0, f"{key}.budget", f"must be positive, not {self.budget}")
        if self.target is not None:
            require(self.target > 0, f"{key}.target", f"must be positive, not {self.target}")
            require(
                self.coef > 0, f"{key}.coef", "must be positive: an adapted coefficient is multiplied, and 0 stays 0"
            )


@dataclass
class PtxConfig:
    """Language modelling beside PPO, against forgetting (Ouyang et al. 2203.02155: coefficient 27.8)."""

    coef: float = 0.0  # loss += coef * mean negative log-likelihood of a token
    batch: int = 64  # rows an optimiser step, over all ranks

    def check(self, key: str) -> None:
        require(self.coef >= 0, f"{key}.coef", f"must not be negative, not {self.coef}")
        require(self.batch > 0, f"{key}.batch", f"must be positive, not {self.batch}")


@dataclass
class AlarmConfig:
    """Over-optimisation (Gao et al. 2210.10760): the reward rises while the holdout reward falls."""

    action: AlarmAction = AlarmAction.warn  # what an alarm does
    alpha: float = 0.05  # level of the one-sided bound on the fall since the best evaluation, paired by prompt
    patience: int = 2  # evaluations in a row

    def check(self, key: str) -> None:
        require(0 < self.alpha < 0.5, f"{key}.alpha", f"must lie between 0 and .5, not {self.alpha}")
        require(self.patience > 0, f"{key}.patience", f"must be positive, not {self.patience}")


@dataclass
class PpoConfig:
    artifact: str | None = None  # for do=gate, do=sample and do=chat: take this model
    updates: int = 100  # rounds of sampling, scoring and training
    batch: int = 128  # episodes an update, over all ranks
    minibatch: int = 64  # episodes an optimiser step
    group: int = 1  # responses to one prompt among the episodes
    micro_tokens: int = 4096  # tokens a forward pass; cannot change the result
    decode_group: int = 64  # sequences decoded together
    epochs: int = 2  # passes over an update's episodes
    learning_rate: float = 1e-6  # of the policy, the highest
    critic_learning_rate: float = 5e-6  # of the critic, the highest
    critic_warmup: int = 0  # updates that train the critic alone
    schedule: Schedule = Schedule.linear  # of both learning rates after the warm-up
    warmup: float = 0.0  # share of all updates
    max_grad_norm: float = 1.0  # of the policy and of the critic, each by itself; 0: none
    estimator: Estimator = Estimator.gae  # of the advantages
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # of generalised advantage estimation
    clip: float = 0.2  # the ratio is clipped to [1 - clip, 1 + clip]
    dual_clip: float | None = None  # bound on ratio * |advantage| where the advantage is negative (1912.09729)
    value_clip: float | None = 0.2  # bound on how far a value may move from the old one; None: none
    whiten_advantages: bool = True  # over the batch
    temperature: float = 1.0  # of the samples that PPO trains on, and of their log-probabilities
    max_new_tokens: int = 128  # where a response is cut
    no_eos_penalty: float = 1.0  # subtracted from the score of a response cut at max_new_tokens
    normalize_reward: bool = True  # by the mean and std that the reward model's artifact stores
    reward_clip: float | None = None  # bound on the normalised score's size; None: none
    target_kl: float | None = None  # leave an update's remaining minibatches when KL(old || new) passes this
    kl: KlConfig = field(default_factory=KlConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    ema: float | None = None  # decay an update; what is evaluated and kept is then the average of the weights
    holdout: Any = None  # a reward that PPO is not paid by: a reward model's folder, or a node like `reward`
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    critic_init: CriticInit = CriticInit.reward  # the model that the critic's body starts from
    eval_prompts: int = 64  # held-out prompts sampled at each evaluation
    eval_every: int = 10  # updates
    checkpoint_every: int = 10  # updates
    keep_checkpoints: int = 2  # the newest so many
    lora: LoraConfig = field(default_factory=LoraConfig)  # as `lora`, for this stage

    @property
    def has_critic(self) -> bool:
        return self.estimator is Estimator.gae

    def check(self, key: str) -> None:
        for name in ("updates", "batch", "minibatch", "micro_tokens", "decode_group", "epochs", "max_new_tokens",
                    "eval_every", "checkpoint_every", "keep_checkpoints", "eval_prompts", "group"):  # fmt: skip
            require(getattr(self, name) > 0, f"{key}.{name}", f"must be positive, not {getattr(self, name)}")
        require(self.temperature > 0, f"{key}.temperature", f"must be positive, not {self.temperature}")
        for name in ("learning_rate", "critic_learning_rate", "max_grad_norm", "clip", "critic_warmup"):
            require(getattr(self, name) >= 0, f"{key}.{name}", f"must not be negative, not {getattr(self, name)}")
        for name in ("gamma", "lam", "warmup"):
            require(0 <= getattr(self, name) <= 1, f"{key}.{name}", f"must lie in [0, 1], not {getattr(self, name)}")
        divides(self, "minibatch", key)
        divides(self, "group", key)
        require(self.ema is None or 0 < self.ema < 1, f"{key}.ema", f"must lie between 0 and 1, not {self.ema}")
        require(
            self.dual_clip is None or self.dual_clip > 1 + self.clip, f"{key}.dual_clip",
            f"must exceed 1 + {key}.clip, or it would cut what the clip leaves, not {self.dual_clip}",
        )  # fmt: skip
        if not self.has_critic:
            self._check_no_critic(key)
        elif self.critic_warmup:
            require(
                self.critic_warmup < self.updates, f"{key}.critic_warmup",
                f"must leave an update to the policy: below {key}.updates={self.updates}, not {self.critic_warmup}",
            )  # fmt: skip
        require(self.lora.dropout == 0, f"{key}.lora.dropout", "must be 0: PPO has dropout off in every role")

    def _check_no_critic(self, key: str) -> None:
        chosen = f"{key}.estimator={self.estimator.value}"
        require(self.group > 1, f"{key}.group", f"must be at least 2 with {chosen}: the group is its baseline")
        require(self.gamma == 1, f"{key}.gamma", f"must be 1 with {chosen}: a response counts as one action")
        require(self.critic_warmup == 0, f"{key}.critic_warmup", f"needs a critic, and {chosen} has none")
