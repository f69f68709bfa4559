"""The optimiser's part of an update: epochs of shuffled minibatches, cut into micro-batches that cannot matter.

Each loss is a mean over the tokens of the whole minibatch. Policy and critic have an optimiser, a learning rate and a
gradient clip of their own, so that the scale of one role's loss never moves the other.

Shapes: N response tokens of a micro-batch laid end to end, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.config import PpoConfig, Schedule
from rlhf.losses import clipped_policy_loss, clipped_value_loss, explained_variance, kl_k3
from rlhf.ppo.episodes import Episode
from rlhf.ppo.finite import require_finite
from rlhf.ppo.roles import Roles
from rlhf.rollout import Rows, collate, micro_batches, response_logits, seed_of, widen

Sums = defaultdict[str, float]


def rate_factor(cfg: PpoConfig, update: int) -> float:
    """Share of the peak learning rate in an update (from 1): rises over the warm-up, then falls as `schedule` says.

    A function of the update alone, so a resumed run needs no scheduler state.
    """
    done, warm = update - 1, round(cfg.warmup * cfg.updates)
    if done < warm:
        return (done + 1) / (warm + 1)
    left = 1 - (done - warm) / (cfg.updates - warm)
    match cfg.schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return left
        case Schedule.cosine:
            return 0.5 * (1 - math.cos(math.pi * left))


class Learner:
    """Policy and critic with their optimisers."""

    def __init__(self, roles: Roles, cfg: PpoConfig, seed: int) -> None:
        self.roles, self.cfg, self.seed = roles, cfg, seed
        self.device = next(roles.policy.parameters()).device
        self.policy_optimizer = _adam(roles.policy, cfg.learning_rate)
        self.critic_optimizer = _adam(roles.critic, cfg.critic_learning_rate)

    def learn(self, episodes: Sequence[Episode], update: int) -> dict[str, float]:
        """Epochs over one update's episodes; what happened, as means over tokens and optimiser steps."""
        factor = rate_factor(self.cfg, update)
        _set_rate(self.policy_optimizer, self.cfg.learning_rate * factor)
        _set_rate(self.critic_optimizer, self.cfg.critic_learning_rate * factor)
        sums: Sums = defaultdict(float)
        for minibatch in self.minibatches(episodes, update):
            if not self._step(minibatch, update, sums):
                break
        means = {name: value / sums["tokens"] for name, value in sums.items() if name not in _NOT_MEANS}
        steps = max(1.0, sums["steps"])
        returns, values = torch.cat([e.returns for e in episodes]), torch.cat([e.values for e in episodes])
        return means | {
            "policy/grad_norm": sums["policy/grad_norm"] / steps, "critic/grad_norm": sums["critic/grad_norm"] / steps,
            "policy/ratio_error_max": sums["policy/ratio_error_max"],
            "policy/first_ratio_error": sums["policy/first_ratio_error"],
            "policy/learning_rate": self.cfg.learning_rate * factor,
            "critic/learning_rate": self.cfg.critic_learning_rate * factor,
            "policy/steps": sums["steps"],
            "policy/kl_old_new": sums["policy/kl_old_new"] / sums["episodes"],
            "critic/explained_variance": explained_variance(values, returns),
        }  # fmt: skip

    def minibatches(self, episodes: Sequence[Episode], update: int) -> list[list[Episode]]:
        """The minibatches of all epochs of an update, in order."""
        out = []
        for epoch in range(self.cfg.epochs):
            generator = torch.Generator().manual_seed(seed_of(self.seed, "minibatches", update, epoch))
            order = torch.randperm(len(episodes), generator=generator).tolist()
            for start in range(0, len(order), self.cfg.minibatch):
                out.append([episodes[i] for i in order[start : start + self.cfg.minibatch]])
        return out

    def _step(self, minibatch: Sequence[Episode], update: int, sums: Sums) -> bool:
        """One optimiser step; False if the policy has moved past `target_kl`, with nothing changed."""
        here: Sums = defaultdict(float)
        self.accumulate(minibatch, update, here)
        moved = here["policy/kl_old_new"] / len(minibatch)  # nats a response
        go_on = self.cfg.target_kl is None or moved <= self.cfg.target_kl
        largest = max(sums["policy/ratio_error_max"], here["policy/ratio_error_max"])
        if not sums["tokens"]:
            sums["policy/first_ratio_error"] = here["policy/ratio_error_max"]
        if go_on:
            for role, model, optimizer in (
                ("policy", self.roles.policy, self.policy_optimizer),
                ("critic", self.roles.critic, self.critic_optimizer),
            ):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.cfg.max_grad_norm or math.inf)  # 0: none
                bad = "" if torch.isfinite(norm) else _first_bad_gradient(model)
                require_finite(not bad, f"{role} gradient {bad}", update, [e.name for e in minibatch])
                here[f"{role}/grad_norm"] = float(norm)
                optimizer.step()
            here["steps"] = 1
        self.clear()
        for name, value in here.items():
            sums[name] += value
        sums["policy/ratio_error_max"] = largest
        return go_on

    def accumulate(self, minibatch: Sequence[Episode], update: int, sums: Sums) -> None:
        """Add the gradients of both losses of a minibatch to the parameters, and what was seen to `sums`."""
        total = sum(len(e.ids) for e in minibatch)
        for cut in micro_batches([e.tokens for e in minibatch], self.cfg.micro_tokens):
            chosen = [minibatch[i] for i in cut]
            rows = collate([e.prompt_ids for e in chosen], [e.ids for e in chosen], self.device)
            policy_N = self._policy_loss(rows, chosen, sums)
            self._require_rows_finite(policy_N, "policy loss", chosen, update)
            (policy_N.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            critic_N = self._critic_loss(rows, chosen, sums)
            self._require_rows_finite(critic_N, "critic loss", chosen, update)
            (critic_N.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        sums["tokens"] += total
        sums["episodes"] += len(minibatch)

    def clear(self) -> None:
        """Drop the gradients."""
        self.policy_optimizer.zero_grad(set_to_none=True)
        self.critic_optimizer.zero_grad(set_to_none=True)

    def _policy_loss(self, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        all_logp_NV = (widen(response_logits(self.roles.policy, rows)) / self.cfg.temperature).log_softmax(-1)
        logp_N = all_logp_NV.gather(1, rows.targets_N.unsqueeze(1)).squeeze(1)
        old_N = self._together([e.logp for e in chosen])
        loss_N = clipped_policy_loss(logp_N, old_N, self._together([e.advantages for e in chosen]), self.cfg.clip)
        with torch.no_grad():
            ratio_N = (logp_N - old_N).exp()
            error_N = (ratio_N - 1).abs()
            sums["policy/loss"] += float(loss_N.sum())
            sums["policy/entropy"] += float(-(all_logp_NV.exp() * all_logp_NV.clamp(min=-1e4)).sum())
            sums["policy/clip_fraction"] += float((error_N > self.cfg.clip).sum())
            # Sampled from the old policy, so k3 of (old, new) estimates KL(old || new).
            sums["policy/kl_old_new"] += float(kl_k3(old_N, logp_N).sum())
            sums["policy/ratio_error_max"] = max(sums["policy/ratio_error_max"], float(error_N.max()))
        return loss_N

    def _critic_loss(self, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        values_N: Tensor = self.roles.critic(rows)
        old_N, returns_N = self._together([e.values for e in chosen]), self._together([e.returns for e in chosen])
        loss_N = clipped_value_loss(values_N, old_N, returns_N, self.cfg.value_clip)
        with torch.no_grad():
            sums["critic/loss"] += float(loss_N.sum())
            sums["critic/value"] += float(values_N.sum())
            if self.cfg.value_clip is not None:
                sums["critic/clip_fraction"] += float(((values_N - old_N).abs() > self.cfg.value_clip).sum())
        return loss_N

    def _together(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(self.device)

    def _require_rows_finite(self, loss_N: Tensor, what: str, chosen: Sequence[Episode], update: int) -> None:
        if not torch.isfinite(loss_N).all():
            parts = torch.split(loss_N.detach(), [len(e.ids) for e in chosen])
            bad = [e.name for e, part in zip(chosen, parts, strict=True) if not torch.isfinite(part).all()]
            require_finite(False, what, update, bad)


_NOT_MEANS = frozenset(
    ("tokens", "steps", "episodes", "policy/kl_old_new", "policy/grad_norm", "critic/grad_norm",
     "policy/ratio_error_max", "policy/first_ratio_error")
)  # fmt: skip


def _adam(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _first_bad_gradient(model: Any) -> str:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "norm")
