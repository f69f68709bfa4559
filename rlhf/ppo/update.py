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

from rlhf.config import KlPlace, PpoConfig, Schedule
from rlhf.losses import clipped_policy_loss, clipped_value_loss, explained_variance, kl_k3
from rlhf.models import micro_batches
from rlhf.ppo.episodes import Episode
from rlhf.ppo.finite import require_finite
from rlhf.ppo.ptx import Document, draw_documents
from rlhf.ppo.roles import Critic, Roles
from rlhf.rollout import (
    Rows,
    collate,
    logprob_and_entropy,
    response_logits,
    seed_of,
    token_logprobs,
)

Sums = defaultdict[str, float]


def rate_factor(schedule: Schedule, warmup: float, done: int, planned: int) -> float:
    """Share of the peak learning rate in the update after `done` of `planned`: rises over the share `warmup` of them,
    then falls as `schedule` says. 0 before the first (a policy that waits for its critic).

    A function of the update alone, so a resumed run needs no scheduler state.
    """
    if done < 0:
        return 0.0
    warm = round(warmup * planned)
    if done < warm:
        return (done + 1) / (warm + 1)
    left = 1 - (done - warm) / (planned - warm)
    match schedule:
        case Schedule.constant:
            return 1.0
        case Schedule.linear:
            return left
        case Schedule.cosine:
            return 0.5 * (1 - math.cos(math.pi * left))


class Learner:
    """Policy and critic (None for an estimator without one) with their optimisers."""

    def __init__(self, roles: Roles, cfg: PpoConfig, seed: int, documents: Sequence[Document] = ()) -> None:
        self.roles, self.cfg, self.seed, self.documents = roles, cfg, seed, documents
        self.device = next(roles.policy.parameters()).device
        self.kl_coef = cfg.kl.coef  # the loop sets it where it is adapted
        self.policy_optimizer = _adam(roles.policy, cfg.learning_rate)
        self.critic_optimizer = None if roles.critic is None else _adam(roles.critic, cfg.critic_learning_rate)

    def learn(self, episodes: Sequence[Episode], update: int) -> dict[str, float]:
        """Epochs over one update's episodes; what happened, as means over tokens and optimiser steps."""
        cfg, wait = self.cfg, self.cfg.critic_warmup
        rate = cfg.learning_rate * rate_factor(cfg.schedule, cfg.warmup, update - 1 - wait, cfg.updates - wait)
        critic_rate = cfg.critic_learning_rate * rate_factor(cfg.schedule, cfg.warmup, update - 1, cfg.updates)
        _set_rate(self.policy_optimizer, rate)
        sums: Sums = defaultdict(float)
        if self.critic_optimizer is not None:
            _set_rate(self.critic_optimizer, critic_rate)
        for step, minibatch in enumerate(self.minibatches(episodes, update)):
            if not self._step(minibatch, update, step, sums):
                break
        return self._summary(episodes, sums) | {
            "policy/learning_rate": rate, **({"critic/learning_rate": critic_rate} if self.roles.critic else {}),
        }  # fmt: skip

    def _summary(self, episodes: Sequence[Episode], sums: Sums) -> dict[str, float]:
        means = {name: value / sums["tokens"] for name, value in sums.items() if name not in _NOT_MEANS}
        steps = max(1.0, sums["steps"])
        found = means | {name: sums[name] / steps for name in sorted(_BY_STEP & sums.keys())}
        if self.roles.critic is not None:
            returns, values = torch.cat([e.returns for e in episodes]), torch.cat([e.values for e in episodes])
            found["critic/explained_variance"] = explained_variance(values, returns)
        if sums["episodes"]:  # the policy was read, not only the critic
            found |= {name: sums[name] for name in ("policy/ratio_error_max", "policy/first_ratio_error")}
            found["policy/kl_old_new"] = sums["policy/kl_old_new"] / sums["episodes"]
        return found | {"policy/steps": sums["policy/steps"]}

    def minibatches(self, episodes: Sequence[Episode], update: int) -> list[list[Episode]]:
        """The minibatches of all epochs of an update, in order."""
        out = []
        for epoch in range(self.cfg.epochs):
            generator = torch.Generator().manual_seed(seed_of(self.seed, "minibatches", update, epoch))
            order = torch.randperm(len(episodes), generator=generator).tolist()
            for start in range(0, len(order), self.cfg.minibatch):
                out.append([episodes[i] for i in order[start : start + self.cfg.minibatch]])
        return out

    def _step(self, minibatch: Sequence[Episode], update: int, step: int, sums: Sums) -> bool:
        """One optimiser step; False if the policy has moved past `target_kl`, with nothing changed."""
        here: Sums = defaultdict(float)
        waiting = update <= self.cfg.critic_warmup
        self.accumulate(minibatch, update, here, policy=not waiting)
        if not waiting:
            self._accumulate_ptx(update, step, here)
        moved = here["policy/kl_old_new"] / len(minibatch)  # nats a response
        go_on = self.cfg.target_kl is None or moved <= self.cfg.target_kl
        largest = max(sums["policy/ratio_error_max"], here["policy/ratio_error_max"])
        if not sums["episodes"]:
            sums["policy/first_ratio_error"] = here["policy/ratio_error_max"]
        if go_on:
            if not waiting:
                here["policy/grad_norm"] = self._move("policy", self.policy_optimizer, minibatch, update)
                here["policy/steps"] = 1
            if self.critic_optimizer is not None:
                here["critic/grad_norm"] = self._move("critic", self.critic_optimizer, minibatch, update)
            here["steps"] = 1
        self.clear()
        for name, value in here.items():
            sums[name] += value
        sums["policy/ratio_error_max"] = largest
        return go_on

    def _move(self, role: str, optimizer: torch.optim.Optimizer, minibatch: Sequence[Episode], update: int) -> float:
        """Clip the role's gradients, step, and return their norm."""
        model = getattr(self.roles, role)
        moved = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in moved])
        bad = "" if torch.isfinite(norm) else _first_bad_gradient(model)  # clipping would spread the NaN to every one
        require_finite(not bad, f"{role} gradient {bad}", update, [e.name for e in minibatch])
        torch.nn.utils.clip_grads_with_norm_(moved, self.cfg.max_grad_norm or math.inf, norm)  # 0: none
        optimizer.step()
        return float(norm)

    def accumulate(self, minibatch: Sequence[Episode], update: int, sums: Sums, *, policy: bool = True) -> None:
        """Add the gradients of the losses of a minibatch to the parameters, and what was seen to `sums`."""
        total = sum(len(e.ids) for e in minibatch)
        for cut in micro_batches([e.tokens for e in minibatch], self.cfg.micro_tokens):
            chosen = [minibatch[i] for i in cut]
            rows = collate([e.prompt_ids for e in chosen], [e.ids for e in chosen], self.device)
            if policy:
                policy_N = self._policy_loss(rows, chosen, sums)
                self._require_rows_finite(policy_N, "policy loss", chosen, update)
                (policy_N.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            if self.roles.critic is not None:
                critic_N = self._critic_loss(self.roles.critic, rows, chosen, sums)
                self._require_rows_finite(critic_N, "critic loss", chosen, update)
                (critic_N.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        sums["tokens"] += total
        sums["episodes"] += len(minibatch) if policy else 0

    def _accumulate_ptx(self, update: int, step: int, sums: Sums) -> None:
        """Add the gradient of ptx.coef times the mean negative log-likelihood of the step's documents."""
        ptx = self.cfg.ptx
        if not ptx.coef:
            return
        documents = draw_documents(self.documents, self.seed, update, step, ptx.batch)
        total = sum(len(d.ids) for d in documents)
        for cut in micro_batches([len(d.given) + len(d.ids) for d in documents], self.cfg.micro_tokens):
            rows = collate([documents[i].given for i in cut], [documents[i].ids for i in cut], self.device)
            nll = -token_logprobs(response_logits(self.roles.policy, rows), rows.targets_N, 1.0).sum() / total
            require_finite(bool(torch.isfinite(nll)), "ptx loss", update, [documents[i].name for i in cut])
            (ptx.coef * nll).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            sums["policy/ptx_loss"] += float(nll.detach())

    def clear(self) -> None:
        """Drop the gradients."""
        for optimizer in (self.policy_optimizer, self.critic_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    def _policy_loss(self, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        cfg = self.cfg
        logits_NV = response_logits(self.roles.policy, rows)
        logp_N, entropy_N = logprob_and_entropy(logits_NV, rows.targets_N, cfg.temperature)
        del logits_NV  # the backward pass does not need it
        old_N, advantages_N = self._together([e.logp for e in chosen]), self._together([e.advantages for e in chosen])
        loss_N = clipped_policy_loss(logp_N, old_N, advantages_N, cfg.clip, cfg.dual_clip)
        if cfg.kl.place is KlPlace.loss:
            loss_N = loss_N + self.kl_coef * kl_k3(logp_N, self._together([e.reference for e in chosen]))
        with torch.no_grad():
            ratio_N = (logp_N - old_N).exp()
            error_N = (ratio_N - 1).abs()
            sums["policy/loss"] += float(loss_N.sum())
            sums["policy/entropy"] += float(entropy_N.sum())
            sums["policy/clip_fraction"] += float((error_N > cfg.clip).sum())
            # Sampled from the old policy, so k3 of (old, new) estimates KL(old || new).
            sums["policy/kl_old_new"] += float(kl_k3(old_N, logp_N).sum())
            sums["policy/ratio_error_max"] = max(sums["policy/ratio_error_max"], float(error_N.max()))
        return loss_N

    def _critic_loss(self, critic: Critic, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        values_N: Tensor = critic(rows)
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


_BY_STEP = frozenset(("policy/grad_norm", "critic/grad_norm", "policy/ptx_loss"))
_NOT_MEANS = _BY_STEP | {
    "tokens", "steps", "episodes", "policy/steps", "policy/kl_old_new", "policy/ratio_error_max",
    "policy/first_ratio_error",
}  # fmt: skip


def _adam(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _first_bad_gradient(model: Any) -> str:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "norm")
