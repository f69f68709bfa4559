"""The numbers of one update, the best evaluation so far, and the KL budget that stops a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlhf.config import KlConfig
from rlhf.losses import kl_k3
from rlhf.ppo.checkpoint import Progress, weights_of
from rlhf.ppo.episodes import Episode
from rlhf.ppo.finite import require_finite
from rlhf.ppo.roles import Roles


def rollout_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over the episodes of an update. KL is in nats a response, of the policy that sampled them."""
    n = len(episodes)
    raw = torch.tensor([e.raw for e in episodes], dtype=torch.float64)
    scores = [sum(e.score) if isinstance(e.score, list) else e.score for e in episodes]
    tokens = sum(len(e.ids) for e in episodes)
    return {
        "kl/mean": sum(float(e.kl.sum()) for e in episodes) / n,
        "kl/k3": sum(float(kl_k3(e.logp, e.reference).sum()) for e in episodes) / n,
        "reward/mean": float(raw.mean()),
        "reward/std": float(raw.std(correction=0)),
        "reward/score": sum(scores) / n,
        "reward/with_kl": sum(float(e.rewards.sum()) for e in episodes) / n,
        "rollout/length": tokens / n,
        "rollout/tokens": float(tokens),
        "rollout/eos_rate": sum(e.finished for e in episodes) / n,
        "critic/returns": sum(float(e.returns.sum()) for e in episodes) / tokens,
    }


def note_evaluation(progress: Progress, metrics: dict[str, float], step: int, roles: Roles, kl: KlConfig) -> None:
    """Keep the weights if this evaluation is the best under the budget. Without a budget none are kept."""
    if kl.budget is None or metrics["eval/kl"] > kl.budget:
        return
    if progress.best_step is None or metrics["eval/reward"] > progress.best_reward:
        progress.best_step, progress.best_reward = step, metrics["eval/reward"]
        progress.best = weights_of(roles.policy)


def note_kl(progress: Progress, mean_kl: float, kl: KlConfig) -> None:
    """Count the updates in a row whose KL is over the budget."""
    over = kl.budget is not None and mean_kl > kl.budget
    progress.over_budget = progress.over_budget + 1 if over else 0


def must_stop(progress: Progress, kl: KlConfig) -> bool:
    return kl.budget is not None and progress.over_budget >= kl.patience


def all_finite(metrics: dict[str, float], step: int, episodes: Sequence[Episode]) -> dict[str, float]:
    """`metrics`, or a TrainingError that names the one that is not finite."""
    bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
    require_finite(bad is None, f"metric {bad}", step, [e.name for e in episodes])
    return metrics
