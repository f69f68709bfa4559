"""The optimiser's part of an update: epochs of shuffled minibatches, cut into micro-batches that cannot matter.

Each loss is a mean over the tokens of the whole minibatch. Policy and critic have an optimiser, a learning rate and a
gradient clip of their own, so that the scale of one role's loss never moves the other.

Shapes: N response tokens of a micro-batch laid end to end, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.config import KlPlace, PpoConfig, Schedule
from rlhf.losses import clipped_policy_loss, clipped_value_loss, explained_variance, kl_k3
from rlhf.models import micro_batches
from rlhf.ppo.episodes import Episode, estimate, read_values, require_finite_rows
from rlhf.ppo.finite import require_finite
from rlhf.ppo.ptx import Document, draw_documents
from rlhf.ppo.roles import Roles
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
        self._begun: Sums | None = None  # what was seen in the critic's first step while `appraise` waits for `learn`

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
        found = {}
        for name, value in sums.items():
            per = "steps" if name in _BY_STEP else "tokens"
            if name not in _NOT_MEANS:
                found[name] = value / max(1.0, sums[f"{name.split('/')[0]}/{per}"])
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

    def appraise(self, episodes: Sequence[Episode], update: int) -> None:
        """Fill `values` with what the critic says, if there is one.

        For the first minibatch this is also the forward pass of the critic's first step, which `learn` then takes with
        the gradients that are left here: an episode's returns need no values but its own.
        """
        if self.roles.critic is None:
            return
        self._begun = defaultdict(float)
        first = self.minibatches(episodes, update)[0]
        self.accumulate("critic", first, update, self._begun)
        known = {id(e) for e in first}
        rest = [e for e in episodes if id(e) not in known]
        for episode, values in zip(rest, read_values(self.roles.critic, rest, self.cfg.micro_tokens), strict=True):
            episode.values = values
        require_finite_rows(rest, "values", update)

    def _step(self, minibatch: Sequence[Episode], update: int, step: int, sums: Sums) -> bool:
        """One optimiser step of each role, in turn, so that one role's gradients are in memory at a time. False if the
        policy has moved past `target_kl`; it then stays as it is, and so does a critic that had not begun."""
        here: Sums = defaultdict(float)
        if self._begun is not None:
            here, self._begun = self._begun, None
            self._move("critic", minibatch, update, here)
        went_on = update <= self.cfg.critic_warmup or self._policy_step(minibatch, update, step, here, sums)
        if went_on and self.critic_optimizer is not None and not here["critic/steps"]:
            self.accumulate("critic", minibatch, update, here)
            self._move("critic", minibatch, update, here)
        for name, value in here.items():
            sums[name] += value
        return went_on

    def _policy_step(self, minibatch: Sequence[Episode], update: int, step: int, here: Sums, sums: Sums) -> bool:
        seen: Sums = defaultdict(float)
        self.accumulate("policy", minibatch, update, seen)
        self._accumulate_ptx(update, step, seen)
        moved = seen["policy/kl_old_new"] / len(minibatch)  # nats a response
        if not sums["episodes"]:
            sums["policy/first_ratio_error"] = seen["policy/ratio_error_max"]
        sums["policy/ratio_error_max"] = max(sums["policy/ratio_error_max"], seen.pop("policy/ratio_error_max"))
        here.update(seen)
        here["episodes"] += len(minibatch)
        if self.cfg.target_kl is not None and moved > self.cfg.target_kl:
            self.policy_optimizer.zero_grad(set_to_none=True)
            return False
        self._move("policy", minibatch, update, here)
        return True

    def _move(self, role: str, minibatch: Sequence[Episode], update: int, sums: Sums) -> None:
        """Clip the role's gradients, step, drop them and note their norm."""
        model, optimizer = getattr(self.roles, role), getattr(self, f"{role}_optimizer")
        moved = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in moved])
        bad = "" if torch.isfinite(norm) else _first_bad_gradient(model)  # clipping would spread the NaN to every one
        require_finite(not bad, f"{role} gradient {bad}", update, [e.name for e in minibatch])
        torch.nn.utils.clip_grads_with_norm_(moved, self.cfg.max_grad_norm or math.inf, norm)  # 0: none
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums[f"{role}/grad_norm"] += float(norm)
        sums[f"{role}/steps"] += 1

    def accumulate(self, role: str, minibatch: Sequence[Episode], update: int, sums: Sums) -> None:
        """Add the gradient of a role's loss over a minibatch to its parameters, and what was seen to `sums`."""
        loss_of = self._policy_loss if role == "policy" else partial(self._critic_loss, update)
        total = sum(len(e.ids) for e in minibatch)
        for cut in micro_batches([e.tokens for e in minibatch], self.cfg.micro_tokens):
            chosen = [minibatch[i] for i in cut]
            rows = collate([e.prompt_ids for e in chosen], [e.ids for e in chosen], self.device)
            loss_N = loss_of(rows, chosen, sums)
            self._require_rows_finite(loss_N, f"{role} loss", chosen, update)
            (loss_N.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        sums[f"{role}/tokens"] += total

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

    def _critic_loss(self, update: int, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        assert self.roles.critic is not None
        values_N: Tensor = self.roles.critic(rows)
        if sums is self._begun:  # the values are not known yet: these are they
            for episode, values in zip(chosen, torch.split(values_N.detach().cpu(), rows.counts), strict=True):
                episode.values = values.clone()
            require_finite_rows(chosen, "values", update)
            estimate(chosen, self.cfg, self.kl_coef)
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
_NOT_MEANS = {
    "episodes", "policy/tokens", "critic/tokens", "policy/steps", "critic/steps", "policy/kl_old_new",
    "policy/ratio_error_max", "policy/first_ratio_error",
}  # fmt: skip


def _adam(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _first_bad_gradient(model: Any) -> str:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, grad in named if not torch.isfinite(grad).all()), "norm")
