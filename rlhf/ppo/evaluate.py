"""Judging the policy on held-out prompts, always the same ones with the same noise, so that evaluations compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config import PpoConfig
from rlhf.losses import kl_k3
from rlhf.models import micro_batches
from rlhf.ppo.engines import RolloutEngine
from rlhf.ppo.episodes import Episode, rollout, score
from rlhf.ppo.roles import Roles
from rlhf.render import Renderer
from rlhf.rewards import BuiltReward
from rlhf.rollout import collate, evaluating, response_logits, seed_of, sequence_logprobs, widen
from rlhf.types import Prompt

SHOWN = 8  # samples that are recorded at each evaluation
NGRAM = 4


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """One look at the held-out prompts; `rewards` and `holdout` have one number a prompt, in a fixed order."""

    metrics: dict[str, float]
    rows: list[Mapping[str, Any]]
    rewards: list[float]
    holdout: list[float] | None = None

    @property
    def judged(self) -> list[float]:
        """What the best policy is chosen by: the reward that PPO is not paid by, if there is one."""
        return self.rewards if self.holdout is None else self.holdout


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """The reward that PPO is paid by, and one that it is not."""

    paid: BuiltReward
    holdout: BuiltReward | None = None


class Evaluator:
    """Held-out prompts, chosen and seeded once for the whole run."""

    def __init__(
        self, prompts: Sequence[Prompt], renderer: Renderer, rewards: Rewards, engine: RolloutEngine, cfg: PpoConfig,
        seed: int,
    ) -> None:  # fmt: skip
        self.renderer, self.engine, self.cfg = renderer, engine, cfg
        self.built, self.holdout = rewards.paid, rewards.holdout
        keyed = sorted((seed_of(seed, "eval", i, p.id), i) for i, p in enumerate(prompts))[: cfg.eval_prompts]
        self.drawn = [(prompts[i], key) for key, i in keyed]

    def run(self, roles: Roles, start: Sequence[float] | None) -> Evaluation:
        """Metrics `eval/...` and the first few samples as rows. `start` are the judged rewards of the policy that the
        run started from, on the same prompts; None at the start itself."""
        episodes = rollout(self.engine, roles.policy, self.renderer, self.cfg, self.drawn)
        rewards, holdout = self._scores(episodes)
        prompts, responses = [e.prompt_ids for e in episodes], [e.ids for e in episodes]
        temperature, micro_tokens = self.cfg.temperature, self.cfg.micro_tokens
        reference = sequence_logprobs(roles.reference, prompts, responses, temperature, micro_tokens)
        for episode, logp in zip(episodes, reference, strict=True):
            episode.reference = logp
        n = len(episodes)
        metrics = {
            "eval/reward": sum(rewards) / n,
            "eval/kl": sum(float(e.kl.sum()) for e in episodes) / n,
            "eval/kl_k3": sum(float(kl_k3(e.logp, e.reference).sum()) for e in episodes) / n,
            "eval/length": sum(len(ids) for ids in responses) / n,
            "eval/eos_rate": sum(e.finished for e in episodes) / n,
            "eval/distinct_1": distinct(responses, 1),
            "eval/distinct_2": distinct(responses, 2),
            "eval/repeated_4grams": sum(repeated(ids, NGRAM) for ids in responses) / n,
            "eval/entropy": mean_entropy(roles.policy, episodes, self.cfg),
        }
        found = Evaluation(metrics=metrics, rows=self._shown(episodes), rewards=rewards, holdout=holdout)
        if holdout is not None:
            metrics["eval/holdout"] = sum(holdout) / n
        if start is not None:
            metrics["eval/win_rate"] = win_rate(found.judged, start)
        return found

    def _scores(self, episodes: list[Episode]) -> tuple[list[float], list[float] | None]:
        """The rewards as PPO reports them; those of the holdout in standard deviations, where it stores them."""
        score(episodes, self.built, self.renderer, self.cfg)
        rewards = [e.raw for e in episodes]
        if self.holdout is None:
            return rewards, None
        score(episodes, self.holdout, self.renderer, self.cfg)
        mean, std = self.holdout.mean or 0.0, self.holdout.std or 1.0
        holdout = [(e.raw - mean) / std for e in episodes]
        for episode, raw in zip(episodes, rewards, strict=True):
            episode.raw = raw
        return rewards, holdout

    def _shown(self, episodes: Sequence[Episode]) -> list[Mapping[str, Any]]:
        return [
            {
                "prompt": self.renderer.prompt_text(e.prompt.messages), "response": e.text, "reward": e.raw,
                "kl": float(e.kl.sum()), "finished": e.finished,
            }
            for e in episodes[:SHOWN]
        ]  # fmt: skip


def win_rate(rewards: Sequence[float], start: Sequence[float]) -> float:
    """Share of prompts whose reward is above the start's; an equal one counts half."""
    return sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, start, strict=True)) / len(start)


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of tokens over all n-grams, of all responses together (Li et al. 1510.03055)."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of one response that stood in it before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_entropy(policy: Any, episodes: Sequence[Episode], cfg: PpoConfig) -> float:
    """Mean entropy of the policy at the response tokens, nats a token, at the sampling temperature."""
    device = next(policy.parameters()).device
    total = 0.0
    with torch.inference_mode(), evaluating(policy):
        for cut in micro_batches([e.tokens for e in episodes], cfg.micro_tokens):
            rows = collate([episodes[i].prompt_ids for i in cut], [episodes[i].ids for i in cut], device)
            logp_NV = (widen(response_logits(policy, rows)) / cfg.temperature).log_softmax(-1)
            total += float(-(logp_NV.exp() * logp_NV.clamp(min=-1e4)).sum())
    return total / sum(len(e.ids) for e in episodes)
