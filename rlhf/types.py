"""The values that cross module boundaries, and the protocols that users implement. No torch.

`Messages` is a list of {"role": "system" | "user" | "assistant", "content": text}; a prompt ends with a user message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf.errors import TrainingError

Messages = list[dict[str, str]]


@dataclass(kw_only=True, slots=True)
class Prompt:
    messages: Messages
    id: str = ""  # stable: the hash of the messages unless the row gives one
    tags: dict[str, Any] = field(default_factory=dict)  # the row's further fields, e.g. {"safe": True, "group": "luna"}
    where: str = ""  # file:line, for messages


@dataclass(kw_only=True, slots=True)
class Demonstration:
    prompt: Prompt
    response: str


@dataclass(kw_only=True, slots=True)
class Ranking:
    """K >= 2 responses to one prompt. `ranks[i]` is the place of `responses[i]`: 1 is best, equal numbers tie, None is
    unranked. `scores`, if there are any, do not contradict the ranks; an unranked response has none."""

    prompt: Prompt
    responses: list[str]
    ranks: list[int | None]
    annotator: str | None = None
    subset: str | None = None
    scores: list[float | None] | None = None
    weight: float = 1.0  # of this annotator's ranking in the loss, beside that of others


class Reward(Protocol):
    """What PPO is paid by. Text in, numbers out; its own tokenizer, template and device.

    prompts: the text of each prompt (the user's message; a transcript if there are several turns).
    responses: the text of each response, without the end token.
    rows: for each, {"messages": the prompt as messages, **tags}.
    returns: one float for each response, or one list of floats (one for each token of the policy's response).

    May also have `mean` and `std`, by which PPO normalises its scores, and `details`: after `score`, a mapping of
    names to one number a response, whose means are logged as `reward/parts/<name>`. A class method
    `check_node(arguments, key)` may raise a ConfigError for a wrong node, before any stage trains.
    """

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[float] | Sequence[Sequence[float]]: ...


class Tracker(Protocol):
    """Where metrics go. `step` is the update and only grows."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None: ...
    def finish(self) -> None: ...


class World(Protocol):
    """A source that makes its own base model, data and simulated annotators: the quickstart, or a user's simulator."""

    def build(self, folder: Path) -> None:
        """Write `base/` (a Hugging Face folder) and the JSONL files that data.* names into `folder`."""

    def rank(self, samples: Path, out: Path) -> None:
        """Read `{"prompt", "responses", ...}` lines (do=sample), write ranking lines (`ranks`, `annotator` added)."""

    def audit(self, models: Mapping[str, Path]) -> str:
        """A closing table on the model folders "base", "sft" and "ppo", for people only: nothing here reads it."""


@dataclass(kw_only=True, slots=True)
class StageResult:
    """What a stage hands to the pipeline, which writes the manifest."""

    metrics: dict[str, float]
    stop_reason: str  # "finished", "early_stop", "kl_budget"
    updates: int
    planned_updates: int
    extra: dict[str, Any] = field(default_factory=dict)  # rm: {"reward_mean", "reward_std"}

    def check_complete(self, name: str) -> None:
        """TrainingError if it ended before its last update without saying why."""
        if self.updates < self.planned_updates and self.stop_reason == "finished":
            raise TrainingError(
                f"{name}: ended after {self.updates} of {self.planned_updates} updates without a reason"
            )
