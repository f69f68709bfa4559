"""Judging the policy on held-out prompts, always the same ones with the same noise, so that evaluations compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config import PpoConfig
from rlhf.engine.ppo import Placement, Replicas
from rlhf.logprobs import collate, evaluating, response_logits, sequence_logprobs, widen
from rlhf.losses import kl_k3
from rlhf.ppo.engines import RolloutEngine
from rlhf.ppo.episodes import Episode, dealt, rollout, score
from rlhf.ppo.roles import Roles
from rlhf.ppo.sharing import each, here
from rlhf.render import Renderer
from rlhf.rewards import BuiltReward
from rlhf.rollout import seed_of
from rlhf.scoring import micro_batches
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


@dataclass(kw_only=True, slots=True)
class _Look:
    """One rank's part: `holdout` by the place of an episode, `entropy` summed over its tokens."""

    episodes: list[Episode]
    holdout: list[tuple[int, float]]
    entropy: float


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

    def run(self, roles: Roles, start: Sequence[float] | None, placement: Placement | None = None) -> Evaluation:
        """Metrics `eval/...` and the first few samples as rows. `start` are the judged rewards of the policy that the
        run started from, on the same prompts; None at the start itself."""
        placement = placement or Replicas()
        looks = self._looks(roles, placement)
        episodes = sorted((e for look in looks for e in look.episodes), key=lambda e: e.place)
        responses, rewards = [e.ids for e in episodes], [e.raw for e in episodes]
        judged = dict(pair for look in looks for pair in look.holdout)
        holdout = [judged[e.place] for e in episodes] if self.holdout is not None else None
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
            "eval/entropy": sum(look.entropy for look in looks) / sum(len(ids) for ids in responses),
        }
        found = Evaluation(metrics=metrics, rows=self._shown(episodes), rewards=rewards, holdout=holdout)
        if holdout is not None:
            metrics["eval/holdout"] = sum(holdout) / n
        if start is not None:
            metrics["eval/win_rate"] = win_rate(found.judged, start)
        return placement.ranks.broadcast(found)  # what is decided by it is decided alike

    def _looks(self, roles: Roles, placement: Placement) -> list[_Look]:
        """What each rank found about its share of the prompts."""
        cfg, ranks, whole = self.cfg, placement.ranks, placement.whole
        with whole(roles.policy):
            episodes = dealt(ranks, lambda: rollout(self.engine, roles.policy, self.renderer, cfg, self.drawn, ranks))
            entropy = here(ranks, lambda: summed_entropy(roles.policy, episodes, cfg))
        with whole(self.built.reward):
            here(ranks, lambda: score(episodes, self.built, self.renderer, cfg))
        holdout: list[tuple[int, float]] = []
        if self.holdout is not None:
            with whole(self.holdout.reward):
                holdout = here(ranks, lambda: self._holdout_scores(episodes))
        prompts, responses = [e.prompt_ids for e in episodes], [e.ids for e in episodes]
        with whole(roles.reference):
            reference = here(
                ranks, lambda: sequence_logprobs(roles.reference, prompts, responses, cfg.temperature, cfg.micro_tokens)
            )  # fmt: skip
        for episode, logp in zip(episodes, reference, strict=True):
            episode.reference = logp
        return each(ranks, lambda: _Look(episodes=episodes, holdout=holdout, entropy=entropy))

    def _holdout_scores(self, episodes: list[Episode]) -> list[tuple[int, float]]:
        """By the place of an episode, in standard deviations where the holdout stores them; the episodes stay as they
        are."""
        assert self.holdout is not None
        copies = [dataclasses.replace(e) for e in episodes]
        score(copies, self.holdout, self.renderer, self.cfg)
        mean, std = self.holdout.mean or 0.0, self.holdout.std or 1.0
        return [(e.place, (e.raw - mean) / std) for e in copies]

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


def summed_entropy(policy: Any, episodes: Sequence[Episode], cfg: PpoConfig) -> float:
    """Sum over the response tokens of the policy's entropy there, in nats, at the sampling temperature."""
    device = next(policy.parameters()).device
    total = 0.0
    with torch.inference_mode(), evaluating(policy):
        for cut in micro_batches([e.tokens for e in episodes], cfg.micro_tokens):
            rows = collate([episodes[i].prompt_ids for i in cut], [episodes[i].ids for i in cut], device)
            logp_NV = (widen(response_logits(policy, rows)) / cfg.temperature).log_softmax(-1)
            total += float(-(logp_NV.exp() * logp_NV.clamp(min=-1e4)).sum())
    return total
