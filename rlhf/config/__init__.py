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

from rlhf.config.data import DataConfig, Intransitive, Overlong, SourceConfig
from rlhf.config.gate import (
    GRADES,
    CheckConfig,
    GateConfig,
    GateMode,
    NoninferiorityConfig,
    ScorerConfig,
    TaskConfig,
)
from rlhf.config.parts import EngineKind, LoraConfig, OptimConfig, Schedule, divides, require, shared_batch
from rlhf.config.ppo import AlarmAction, AlarmConfig, CriticInit, Estimator, KlConfig, KlPlace, PpoConfig, PtxConfig

__all__ = [
    "GRADES",
    "STAGES",
    "AlarmAction",
    "AlarmConfig",
    "ChatConfig",
    "CheckConfig",
    "Config",
    "CriticInit",
    "DataConfig",
    "Do",
    "Dtype",
    "EngineConfig",
    "EngineKind",
    "Estimator",
    "GateConfig",
    "GateMode",
    "Intransitive",
    "KlConfig",
    "KlPlace",
    "LaunchConfig",
    "LoraConfig",
    "ModelConfig",
    "NoninferiorityConfig",
    "OptimConfig",
    "Overlong",
    "PpoConfig",
    "PtxConfig",
    "ReportConfig",
    "RmConfig",
    "RmLoss",
    "RunConfig",
    "SampleConfig",
    "Schedule",
    "ScorerConfig",
    "SftConfig",
    "SourceConfig",
    "Stage",
    "TaskConfig",
    "Ties",
    "TrackerConfig",
    "TrackerMode",
    "check_all",
    "divides",
    "require",
    "shared_batch",
    "stage_config",
]


class Do(Enum):
    run = "run"
    plan = "plan"
    gate = "gate"
    sample = "sample"
    report = "report"
    chat = "chat"
    doctor = "doctor"


class Stage(Enum):
    all = "all"
    sft = "sft"
    rm = "rm"
    ppo = "ppo"


class TrackerMode(Enum):
    disabled = "disabled"
    offline = "offline"
    online = "online"


class RmLoss(Enum):
    pairs = "pairs"
    plackett_luce = "plackett_luce"


class Ties(Enum):
    davidson = "davidson"
    half = "half"
    drop = "drop"


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class RunConfig:
    name: str = "run"  # of the run directory
    root: str = "runs"  # the folder that holds the run directories
    dir: str = ""  # run.root/run.name, made absolute once by the launching process
    parents: str | None = None  # another run directory that the parents are taken from
    anchor: str | None = None  # a file outside run.dir for the ledger's head: read first, written last
    fresh: bool = False  # move finished stages whose config changed aside and start them anew


@dataclass
class ModelConfig:
    path: str | None = None  # a Hugging Face folder or hub id; None: the world of the data group builds one
    revision: str | None = None  # a commit, branch or tag of the hub
    dtype: Dtype = Dtype.float32  # of the saved weights and the arithmetic; what is trained is held in float32
    trust_remote_code: bool = False  # run code that the model's folder or hub page holds
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time


@dataclass
class SftConfig:
    artifact: str | None = None  # use this model instead of training one
    optim: OptimConfig = field(default_factory=OptimConfig)
    packing: bool = False  # several demonstrations in a row of data.max_length; none sees another
    lora: LoraConfig = field(default_factory=LoraConfig)  # as `lora`, for this stage


@dataclass
class RmConfig:
    artifact: str | None = None  # use this model instead of training one
    base: str | None = None  # a folder or hub id to start from in place of the SFT model, an encoder for one
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(batch=16, micro_batch=4))
    loss: RmLoss = RmLoss.pairs  # Bradley-Terry over all pairs of a ranking, or Plackett-Luce over its choices
    ties: Ties = Ties.davidson  # a likelihood with a learnt parameter, a cross-entropy at one half, or not read
    label_smoothing: float = 0.0  # probability that a strict verdict is the wrong way round
    margin: float = 0.0  # the better response has to lead by this times the difference of the scores
    center_coef: float = 0.0  # pulls the mean reward of a prompt's responses to zero
    members: int = 1  # reward models that PPO is paid by together, each with a seed and a selection of folds of its own
    holdout: bool = False  # one more, trained on a fold of prompts that no member reads: PPO is judged by it
    folds: int | None = None  # that the training prompts are cut into; None: 4, or more if there are more models
    lora: LoraConfig = field(default_factory=LoraConfig)  # as `lora`, for this stage

    @property
    def models(self) -> int:
        """How many are trained."""
        return self.members + self.holdout

    @property
    def fold_count(self) -> int:
        return 1 if self.models == 1 else self.folds or max(4, self.models)

    def check(self, key: str) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, f"{key}.label_smoothing", f"must be in [0, 0.5), not {smoothing}")
        require(self.margin >= 0, f"{key}.margin", f"must not be negative, not {self.margin}")
        if self.loss is RmLoss.plackett_luce:
            require(
                self.ties is Ties.drop, f"{key}.ties",
                f"must be drop with {key}.loss=plackett_luce: it has no likelihood for a tie. Responses that tie are "
                "each compared with the worse ones",
            )  # fmt: skip
            for name, value in (("label_smoothing", smoothing), ("margin", self.margin)):
                require(value == 0, f"{key}.{name}", f"is of pairs, and {key}.loss is plackett_luce")
        given = f"is what a reward model starts from, and {key}.artifact is a finished one: give one of them"
        require(not (self.base and self.artifact), f"{key}.base", given)
        self._check_members(key)

    def _check_members(self, key: str) -> None:
        require(self.members >= 1, f"{key}.members", f"must be at least 1, not {self.members}")
        require(
            self.models == 1 or not self.artifact, f"{key}.artifact",
            f"is one model: {key}.members and {key}.holdout are for reward models that are trained",
        )  # fmt: skip
        if self.folds is not None:
            require(self.models > 1, f"{key}.folds", f"is for {key}.members > 1 or {key}.holdout=true")
            alike = self.folds == 1 and not self.holdout
            require(
                alike or self.folds >= self.models, f"{key}.folds",
                f"must be at least {self.models}, one for each model, or 1 without a holdout: all read all",
            )  # fmt: skip


@dataclass
class EngineConfig:
    """How a stage is trained on its ranks. It cannot change the result, so it is no part of a fingerprint."""

    kind: EngineKind = EngineKind.single  # how the ranks share the work: docs/scaling.md


@dataclass
class LaunchConfig:
    threads: int | None = None  # CPU threads; None: OMP_NUM_THREADS, or the physical cores
    device: str = "auto"  # auto, cpu, cuda
    gpus: int = 1  # ranks to start on this machine, each with a GPU of its own, or on CPUs a process
    hostfile: str | None = None  # many machines, by DeepSpeed's launcher: lines "host slots=8"
    node_rank: int | None = None  # which line of the host file this machine is; None: this one starts all over ssh
    master_addr: str | None = None  # where rank 0 of a host file listens; None: on its first host
    master_port: int = 29500  # of the same
    grace_seconds: float = 600.0  # that ranks have to checkpoint after a stop signal
    hang_seconds: float | None = 3600.0  # ranks that wait longer for one another in a stage end the run; None: never

    def check(self, key: str) -> None:
        require(self.threads is None or self.threads > 0, f"{key}.threads", f"must be positive, not {self.threads}")
        hang = self.hang_seconds
        require(hang is None or hang > 0, f"{key}.hang_seconds", f"must be positive or null, not {hang}")
        require(self.grace_seconds >= 0, f"{key}.grace_seconds", f"must not be negative, not {self.grace_seconds}")
        require(self.gpus >= 1, f"{key}.gpus", f"must be at least 1, not {self.gpus}")
        hosts = self.hostfile is not None
        require(not hosts or self.gpus == 1, f"{key}.gpus", f"is for one machine: {key}.hostfile says slots=N a host")
        require(hosts or self.node_rank is None, f"{key}.node_rank", f"is a line of {key}.hostfile, which is not set")
        require(hosts or self.master_addr is None, f"{key}.master_addr", f"is for {key}.hostfile, which is not set")


@dataclass
class TrackerConfig:
    mode: TrackerMode = TrackerMode.offline  # of W&B; metrics.jsonl is written whatever this says
    project: str = "rlhf"  # the project in W&B
    upload_models: bool = False  # the weights too, in the model's artifact; else its manifest alone


@dataclass
class SampleConfig:
    k: int = 4  # responses a prompt
    prompts: int | None = None  # how many of data.prompts, drawn with the seed; None: all
    temperature: float = 1.0  # 0 takes the likeliest token
    out: str | None = None  # None: samples-<stage>.jsonl in the run directory

    def check(self, key: str) -> None:
        require(self.k >= 1, f"{key}.k", f"must be at least 1, not {self.k}")
        require(self.temperature >= 0, f"{key}.temperature", f"must not be negative, not {self.temperature}")


@dataclass
class ReportConfig:
    runs: list[str] | None = None  # run directories, or names below run.root, on one page; None: this run
    out: str | None = None  # None: report.html in the run directory, or in run.root for several

    def check(self, key: str) -> None:
        require(self.runs is None or len(self.runs) > 0, f"{key}.runs", "names no run")


@dataclass
class ChatConfig:
    beside: str | None = None  # a second model that answers every line too: sft, ppo, base, or a model's folder
    temperature: float = 1.0  # 0 takes the likeliest token
    max_new_tokens: int | None = None  # of an answer; None: ppo.max_new_tokens

    def check(self, key: str) -> None:
        require(self.beside != "rm", f"{key}.beside", "rm is a reward model, which says nothing: sft, ppo or base")
        require(self.temperature >= 0, f"{key}.temperature", f"must not be negative, not {self.temperature}")
        most = self.max_new_tokens
        require(most is None or most >= 1, f"{key}.max_new_tokens", f"must be at least 1, not {most}")


@dataclass
class Config:
    """The root. `stage` says on what, `do` what to do with it."""

    do: Do = Do.run  # what to do
    stage: Stage = Stage.all  # on which stage
    seed: int = 0  # everything that is drawn follows from it
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rm: RmConfig = field(default_factory=RmConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # of each stage without its own: lora=r16 lora.r=64
    reward: Any = None  # what PPO is paid by: `_target_` and its arguments (custom-reward.md)
    rollout: Any = field(default_factory=lambda: {"_target_": "rlhf.ppo.engines.HfRollout"})  # samples the responses
    gate: GateConfig = field(default_factory=GateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self, key: str) -> None:
        require(self.seed >= 0, f"{key}seed", f"must not be negative, not {self.seed}")
        mute = self.do is Do.chat and self.stage is Stage.rm
        require(not mute, "stage", "rm is a reward model, which says nothing: do=chat stage=sft or stage=ppo")
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
            not self.rm.base or not self.ppo.has_critic or self.ppo.critic_init is CriticInit.policy, "rm.base",
            "is another model than the policy's, so the critic cannot start from it: add ppo.critic_init=policy",
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
