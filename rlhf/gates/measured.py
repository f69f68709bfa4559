"""What was measured of a model, as plain values: the only thing that checks see. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import Invalid
from rlhf.types import Messages, Prompt, Ranking


@dataclass(kw_only=True, slots=True)
class Sample:
    """One response of the candidate to a gate prompt."""

    prompt: Prompt
    index: int  # which of the prompt's k
    text: str
    tokens: int
    finished: bool  # ended by itself, not cut at max_new_tokens
    toxicity: float | None = None  # in [0, 1]
    kl: float | None = None  # log p_candidate - log p_sft of this response, nats, summed over its tokens
    reward: float | None = None
    parent_text: str | None = None  # the SFT parent's response to the same prompt with the same seed
    parent_reward: float | None = None
    gold: float | None = None  # by a reward model that PPO was not paid by
    parent_gold: float | None = None
    paid: float | None = None  # by what PPO was paid by
    parent_paid: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_id": self.prompt.id, "prompt": self.prompt.messages, "tags": self.prompt.tags, "sample": self.index,
            "response": self.text, "tokens": self.tokens, "finished": self.finished, "toxicity": self.toxicity,
            "kl": self.kl, "reward": self.reward, "parent_response": self.parent_text,
            "parent_reward": self.parent_reward, "gold": self.gold, "parent_gold": self.parent_gold,
        }  # fmt: skip


@dataclass(kw_only=True, slots=True)
class RankedRewards:
    """The reward model's opinion of the responses of one held-out ranking."""

    ranking: Ranking
    rewards: list[float]
    members: dict[str, list[float]] = field(default_factory=dict)  # of an ensemble, what each of them says


@dataclass(kw_only=True, slots=True)
class Loss:
    """Negative log-likelihood of one text under the candidate and under the base model, nats a token."""

    id: str
    cluster: str  # what its error is shared within: the document, the prompt
    candidate: float
    base: float


@dataclass(kw_only=True, slots=True)
class PairLogprobs:
    """The candidate's log-likelihood, nats, of two sentences that differ in who they are about."""

    id: str
    group: str
    more: float  # of the sentence that fits the stereotype
    less: float


@dataclass(kw_only=True, slots=True)
class Rows:
    """What was trained on and what is measured on, as (id, messages of the prompt)."""

    training: list[tuple[str, Messages]] = field(default_factory=list)
    evaluation: list[tuple[str, Messages]] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class TaskMetric:
    """One metric of a task of lm-evaluation-harness, document by document."""

    values: dict[str, Any]  # by document: a number, or what `aggregate` takes
    aggregate: Callable[[list[Any]], float] | None = None  # of all documents' values; None: their mean
    higher_is_better: bool = True


@dataclass(kw_only=True, slots=True)
class TaskScores:
    """What lm-evaluation-harness made of one model's answers to one task, tag or group."""

    name: str
    documents: str  # digest of the documents: which they are and what each asks
    metrics: dict[tuple[str, str], TaskMetric]  # by metric and filter


@dataclass(kw_only=True, slots=True)
class Measured:
    samples: list[Sample] = field(default_factory=list)
    others: dict[str, list[Sample]] = field(default_factory=dict)  # other models' answers, same prompts and seeds
    pairs: list[PairLogprobs] = field(default_factory=list)
    rows: Rows = field(default_factory=Rows)
    rankings: list[RankedRewards] = field(default_factory=list)
    reference: list[Loss] = field(default_factory=list)
    demonstrations: list[Loss] = field(default_factory=list)
    # By model, "" the candidate, and by task: its scores, or why there are none.
    tasks: dict[str, dict[str, TaskScores | Invalid]] = field(default_factory=dict)


def finite(value: float | None, what: str) -> float:
    """`value`, or Invalid naming `what`: nothing that is not a number is ever counted as harmless."""
    if value is None or not math.isfinite(value):
        raise Invalid(f"{what} is {value}, not a finite number")
    return value
