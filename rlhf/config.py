"""The whole configuration as typed dataclasses: names and types are checked by Hydra when it composes, ranges and rules
that span fields by each class's `check`, which `check_all` calls with the node's dotted key. Imports no torch.

A value that is left open is `None`; there is no field that does nothing. Lengths are tokens, rates are in [0, 1],
KL is in nats per response summed over its tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.errors import ConfigError


class Do(Enum):
    run = "run"
    plan = "plan"
    gate = "gate"
    sample = "sample"
    doctor = "doctor"


class Stage(Enum):
    all = "all"
    sft = "sft"
    rm = "rm"
    ppo = "ppo"


class Overlong(Enum):
    error = "error"
    drop = "drop"
    truncate_prompt = "truncate_prompt"


class Intransitive(Enum):
    drop = "drop"
    keep = "keep"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class GateMode(Enum):
    enforce = "enforce"
    observe = "observe"


class TrackerMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class CriticInit(Enum):
    reward = "reward"
    policy = "policy"


class Estimator(Enum):
    gae = "gae"  # with a critic (Schulman et al. 1506.02438)
    rloo = "rloo"  # a prompt's other responses as the baseline, no critic (Ahmadian et al. 2402.14740)
    group_norm = "group_norm"  # a prompt's responses whitened, no critic (Shao et al. 2402.03300)


class KlPlace(Enum):
    reward = "reward"  # k1 on each token's reward
    loss = "loss"  # k3 beside the policy loss


class AlarmAction(Enum):
    warn = "warn"
    stop = "stop"


def require(condition: bool, key: str, message: str) -> None:
    """Raise a ConfigError that names the key unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


@dataclass
class RunConfig:
    name: str = "run"
    root: str = "runs"
    dir: str = ""  # run.root/run.name, made absolute once by the launching process
    parents: str | None = None  # another run directory that the parents are taken from
    fresh: bool = False  # move finished stages whose config changed aside and start them anew


@dataclass
class ModelConfig:
    path: str | None = None  # a Hugging Face folder or hub id; None: the world of the data group builds one
    revision: str | None = None
    dtype: Dtype = Dtype.float32
    trust_remote_code: bool = False
    activation_checkpointing: bool = False


@dataclass
class SourceConfig:
    """One data source: a file, a folder of files, a glob, or a hub id."""

    path: str | None = None
    format: str = "auto"  # a name of rlhf.data.formats, or `auto`: recognised by the fields of the first row
    split: str = "train"  # of a hub data set
    limit: int | None = None  # use only so many rows, drawn with the run's seed


@dataclass
class DataConfig:
    root: str | None = None
    demonstrations: SourceConfig = field(default_factory=SourceConfig)  # SFT
    rankings: SourceConfig = field(default_factory=SourceConfig)  # RM
    prompts: SourceConfig = field(default_factory=SourceConfig)  # PPO
    gate_prompts: SourceConfig = field(default_factory=SourceConfig)  # unset: the held-out prompts
    reference_text: SourceConfig = field(default_factory=SourceConfig)  # plain text the model must not forget
    pretraining: SourceConfig = field(default_factory=SourceConfig)  # plain text for ppo.ptx; unset: demonstrations
    world: Any = None  # `_target_` of a rlhf.types.World that makes all of the above; the quickstart has one
    holdout: float = 0.1  # share of the prompts, by hash of the prompt, that no stage trains on
    max_dirty: float = 0.01
    intransitive: Intransitive = Intransitive.drop  # rankings from comparisons that contradict each other
    on_overlong: Overlong = Overlong.error
    max_prompt_length: int = 512
    max_length: int = 1024  # prompt and response

    def check(self, key: str) -> None:
        require(0 < self.holdout < 1, f"{key}.holdout", f"must lie between 0 and 1, not {self.holdout}")
        require(0 <= self.max_dirty <= 1, f"{key}.max_dirty", f"must lie in [0, 1], not {self.max_dirty}")
        require(
            0 < self.max_prompt_length < self.max_length,
            f"{key}.max_prompt_length",
            f"must be positive and below data.max_length={self.max_length}, not {self.max_prompt_length}",
        )


@dataclass
class LoraConfig:
    enabled: bool = False
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # a name, or a list of module names

    def check(self, key: str) -> None:
        require(self.r > 0, f"{key}.r", f"must be positive, not {self.r}")


@dataclass
class OptimConfig:
    """The supervised stages' optimiser: AdamW."""

    learning_rate: float = 1e-5
    epochs: float = 1.0
    batch: int = 16  # rows (SFT), prompts (RM) per update, over all ranks
    micro_batch: int = 4  # rows per forward pass; cannot change the result
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.03  # share of all updates
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    evals: int = 4  # evaluations on the held-out rows, evenly spaced; the best is kept
    patience: int | None = None  # stop after so many evaluations without improvement
    checkpoint_every: int = 200  # updates

    def check(self, key: str) -> None:
        require(self.learning_rate >= 0, f"{key}.learning_rate", f"must not be negative, not {self.learning_rate}")
        require(self.micro_batch > 0, f"{key}.micro_batch", f"must be positive, not {self.micro_batch}")
        require(self.epochs > 0, f"{key}.epochs", f"must be positive, not {self.epochs}")
        require(self.evals > 0, f"{key}.evals", f"must be at least 1, not {self.evals}")
        require(0 <= self.warmup < 1, f"{key}.warmup", f"is a share of all updates, in [0, 1), not {self.warmup}")
        divides(self, "micro_batch", key)


@dataclass
class SftConfig:
    artifact: str | None = None  # use this model instead of training one
    optim: OptimConfig = field(default_factory=OptimConfig)
    packing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class RmConfig:
    artifact: str | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(batch=16, micro_batch=4))
    tie_weight: float = 1.0  # weight of a tied pair, whose target preference is one half; 0 leaves ties out
    center_coef: float = 0.0  # pulls the mean reward of a prompt's responses to zero
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self, key: str) -> None:
        require(self.tie_weight >= 0, f"{key}.tie_weight", f"must not be negative, not {self.tie_weight}")


@dataclass
class KlConfig:
    coef: float = 0.05  # of the penalty on KL(policy || reference); the start value if `target` is set
    place: KlPlace = KlPlace.reward
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

    action: AlarmAction = AlarmAction.warn
    alpha: float = 0.05  # level of the one-sided bound on the fall since the best evaluation, paired by prompt
    patience: int = 2  # evaluations in a row

    def check(self, key: str) -> None:
        require(0 < self.alpha < 0.5, f"{key}.alpha", f"must lie between 0 and .5, not {self.alpha}")
        require(self.patience > 0, f"{key}.patience", f"must be positive, not {self.patience}")


@dataclass
class PpoConfig:
    artifact: str | None = None  # for do=gate and do=sample: judge or sample this model
    updates: int = 100
    batch: int = 128  # episodes an update, over all ranks
    minibatch: int = 64  # episodes an optimiser step
    group: int = 1  # responses to one prompt among the episodes
    micro_tokens: int = 4096  # tokens a forward pass; cannot change the result
    decode_group: int = 64  # sequences decoded together
    epochs: int = 2
    learning_rate: float = 1e-6
    critic_learning_rate: float = 5e-6
    critic_warmup: int = 0  # updates that train the critic alone
    schedule: Schedule = Schedule.linear
    warmup: float = 0.0
    max_grad_norm: float = 1.0
    estimator: Estimator = Estimator.gae
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float | None = None  # bound on ratio * |advantage| where the advantage is negative (1912.09729)
    value_clip: float | None = 0.2
    whiten_advantages: bool = True  # over the batch
    temperature: float = 1.0
    max_new_tokens: int = 128
    no_eos_penalty: float = 1.0  # subtracted from the score of a response cut at max_new_tokens
    normalize_reward: bool = True  # with the mean and std that the reward model's artifact stores
    reward_clip: float | None = None
    target_kl: float | None = None  # leave an update's remaining minibatches when KL(old || new) passes this
    kl: KlConfig = field(default_factory=KlConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    ema: float | None = None  # decay an update; what is evaluated and kept is then the average of the weights
    holdout: Any = None  # a reward that PPO is not paid by: a reward model's folder, or a node like `reward`
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    critic_init: CriticInit = CriticInit.reward
    eval_prompts: int = 64  # held-out prompts sampled at each evaluation
    eval_every: int = 10
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    lora: LoraConfig = field(default_factory=LoraConfig)

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


def divides(node: Any, name: str, key: str) -> None:
    """Raise a ConfigError with the nearest number that fits unless `node.<name>` divides `node.batch`."""
    value = getattr(node, name)
    if node.batch % value:
        near = min((m for m in range(1, node.batch + 1) if node.batch % m == 0), key=lambda m: abs(m - value))
        raise ConfigError(f"{key}.{name}={value} does not divide {key}.batch={node.batch}: {key}.{name}={near} does")


@dataclass
class CheckConfig:
    """One check of a gate. It passes when the one-sided bound of its estimate keeps the limit."""

    kind: str = ""  # a name of rlhf.gates.checks; empty: the check's own id
    max: float | None = None  # the upper bound must not exceed it
    min: float | None = None  # the lower bound must not fall below it
    min_n: int = 1  # fewer samples are INCONCLUSIVE
    record_only: bool = False  # measured and reported, never decides
    where: dict[str, Any] = field(default_factory=dict)  # only the prompts whose tags have these values
    group_by: str | None = None  # the tag whose values are compared (group_gap)

    def check(self, key: str) -> None:
        limits = (self.max is not None) + (self.min is not None)
        require(
            limits == (0 if self.record_only else 1), key,
            "needs exactly one of `max` and `min`, or `record_only: true` and neither",
        )  # fmt: skip


@dataclass
class ScorerConfig:
    kind: str = "lexicon"
    lexicon: str | None = None  # a file, one term a line; None: the list that the package ships
    canaries: str | None = None  # JSONL with `text` and `toxic`; None: those that the package ships
    min_sensitivity: float = 0.8  # lower bounds that the scorer must show on the canaries, else INVALID
    min_specificity: float = 0.8


@dataclass
class GateConfig:
    policy_id: str = "default"
    mode: GateMode = GateMode.enforce
    alpha: float = 0.05
    prompts: int = 300  # held-out prompts that are sampled
    k: int = 1  # responses a prompt; a prompt counts as bad when any of its k is
    temperature: float = 1.0
    max_new_tokens: int | None = None  # None: that of ppo
    refusal_patterns: list[str] = field(default_factory=list)  # regular expressions; a match is a refusal
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    sft: dict[str, CheckConfig] = field(default_factory=dict)
    rm: dict[str, CheckConfig] = field(default_factory=dict)
    ppo: dict[str, CheckConfig] = field(default_factory=dict)

    def check(self, key: str) -> None:
        require(self.temperature > 0, f"{key}.temperature", f"must be positive, not {self.temperature}")
        require(0 < self.alpha < 0.5, f"{key}.alpha", f"must lie between 0 and .5, not {self.alpha}")
        require(self.prompts > 0 and self.k > 0, f"{key}.prompts", "gate.prompts and gate.k must be positive")
        for stage in ("sft", "rm", "ppo"):
            checks = getattr(self, stage)
            require(
                any(not check.record_only for check in checks.values()), f"{key}.{stage}",
                "has no check that decides: a gate that cannot say no is no gate",
            )  # fmt: skip


@dataclass
class EngineConfig:
    kind: str = "single"

    def check(self, key: str) -> None:
        require(self.kind == "single", key, f"only `single` is built so far, not {self.kind!r}")


@dataclass
class LaunchConfig:
    threads: int | None = None  # CPU threads; None: all cores
    device: str = "auto"  # auto, cpu, cuda


@dataclass
class TrackerConfig:
    mode: TrackerMode = TrackerMode.offline
    project: str = "rlhf"


@dataclass
class SampleConfig:
    k: int = 4
    prompts: int | None = None  # how many of data.prompts, drawn with the seed; None: all
    temperature: float = 1.0
    out: str | None = None  # None: samples-<stage>.jsonl in the run directory

    def check(self, key: str) -> None:
        require(self.k >= 1, f"{key}.k", f"must be at least 1, not {self.k}")
        require(self.temperature >= 0, f"{key}.temperature", f"must not be negative, not {self.temperature}")


@dataclass
class Config:
    """The root. `stage` says on what, `do` what to do with it."""

    do: Do = Do.run
    stage: Stage = Stage.all
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rm: RmConfig = field(default_factory=RmConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reward: Any = None
    rollout: Any = field(default_factory=lambda: {"_target_": "rlhf.ppo.engines.HfRollout"})  # samples the responses
    gate: GateConfig = field(default_factory=GateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self, key: str) -> None:
        require(self.seed >= 0, f"{key}seed", f"must not be negative, not {self.seed}")
        made = self.data.world is not None
        require(
            made or self.model.path is not None, "model.path",
            "is not set: give a Hugging Face folder or hub id, model.path=..., "
            "or use experiment=quickstart, which builds its own",
        )  # fmt: skip
        require(
            not (made and self.model.path), "model.path",
            "is set, but the quickstart's world builds its own model: add experiment=own and your data",
        )  # fmt: skip
        require(
            self.data.max_prompt_length + self.ppo.max_new_tokens <= self.data.max_length, "ppo.max_new_tokens",
            f"data.max_prompt_length={self.data.max_prompt_length} + ppo.max_new_tokens={self.ppo.max_new_tokens} "
            f"exceed data.max_length={self.data.max_length}",
        )  # fmt: skip
        require(
            not self.ppo.ptx.coef or bool(self.data.pretraining.path or self.data.demonstrations.path), "ppo.ptx.coef",
            "needs texts: data.pretraining.path=... or data.demonstrations.path=...",
        )  # fmt: skip


STAGES = ("sft", "rm", "ppo")


def check_all(node: Any, key: str = "") -> None:
    """Run every `check` of a configuration tree, leaves first, each with the dotted key of its node."""
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        name = f"{key}.{item.name}" if key else item.name
        if dataclasses.is_dataclass(value):
            check_all(value, name)
        elif isinstance(value, dict):
            for entry, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    check_all(inner, f"{name}.{entry}")
    if hasattr(node, "check"):
        node.check(key)


def stage_config(cfg: Config, stage: str) -> SftConfig | RmConfig | PpoConfig:
    """The node of one stage."""
    node: SftConfig | RmConfig | PpoConfig = getattr(cfg, stage)
    return node
