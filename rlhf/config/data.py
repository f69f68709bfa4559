"""Where a run's rows come from, and what happens to those that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlhf.config.parts import require


class Overlong(Enum):
    error = "error"
    drop = "drop"
    truncate_prompt = "truncate_prompt"


class Intransitive(Enum):
    drop = "drop"
    keep = "keep"


@dataclass
class SourceConfig:
    """One data source: a file, a folder of files, a glob, or a hub id."""

    path: str | None = None  # a file, a folder, a glob or a hub id
    format: str = "auto"  # a name of rlhf.data.formats, or `auto`: recognised by the fields of the first row
    split: str = "train"  # of a hub data set
    limit: int | None = None  # use only so many rows, drawn with the run's seed
    license: str | None = None  # for the model card; None: what a card or licence file beside the data says


@dataclass
class DataConfig:
    root: str | None = None  # relative paths of the sources start here; None: where the command was started
    demonstrations: SourceConfig = field(default_factory=SourceConfig)  # SFT
    rankings: SourceConfig = field(default_factory=SourceConfig)  # RM
    prompts: SourceConfig = field(default_factory=SourceConfig)  # PPO
    gate_prompts: SourceConfig = field(default_factory=SourceConfig)  # unset: the held-out prompts
    reference_text: SourceConfig = field(default_factory=SourceConfig)  # plain text the model must not forget
    pretraining: SourceConfig = field(default_factory=SourceConfig)  # plain text for ppo.ptx; unset: demonstrations
    world: Any = None  # `_target_` of a rlhf.types.World that makes all of the above; the quickstart has one
    holdout: float = 0.1  # share of the prompts, by hash of the prompt, that no stage trains on
    max_dirty: float = 0.01  # share of a source's rows that may be dropped as dirty before the run refuses to start
    intransitive: Intransitive = Intransitive.drop  # rankings from comparisons that contradict each other
    on_overlong: Overlong = Overlong.error  # what happens to rows above max_prompt_length or max_length
    max_prompt_length: int = 512  # tokens of a prompt of PPO and of the gates
    max_length: int = 1024  # tokens of prompt and response together

    def check(self, key: str) -> None:
        require(0 < self.holdout < 1, f"{key}.holdout", f"must lie between 0 and 1, not {self.holdout}")
        require(0 <= self.max_dirty <= 1, f"{key}.max_dirty", f"must lie in [0, 1], not {self.max_dirty}")
        require(
            0 < self.max_prompt_length < self.max_length,
            f"{key}.max_prompt_length",
            f"must be positive and below data.max_length={self.max_length}, not {self.max_prompt_length}",
        )
