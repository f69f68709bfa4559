"""The optimiser's part of an update: epochs of shuffled minibatches, cut into micro-batches that cannot matter.

Each loss is a mean over the tokens of the whole minibatch, of which each rank learns from a part. Policy and critic
have an optimiser, a learning rate and a gradient clip of their own, so that the scale of one role's loss never moves
the other.

Shapes: N response tokens of a micro-batch laid end to end, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rlhf.config import KlPlace, PpoConfig, Schedule
from rlhf.engine.ppo import Placement, Replicas, Trainer
from rlhf.errors import TrainingError
from rlhf.logprobs import Rows, collate, logprob_and_entropy, response_logits, token_logprobs
from rlhf.losses import clipped_policy_loss, clipped_value_loss, explained_variance, kl_k3
from rlhf.ppo.episodes import Episode, estimate, read_values, require_finite_rows
from rlhf.ppo.finite import require_finite
from rlhf.ppo.ptx import Document, draw_documents
from rlhf.ppo.roles import Roles
from rlhf.ppo.sharing import here as on_this_rank
from rlhf.ppo.sharing import own_passes, shares
from rlhf.rollout import seed_of

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
    """Policy and critic (None for an estimator without one) with their optimisers.

    placement: where their weights lie; None: all on this process, which is alone.
    """

    def __init__(
        self, roles: Roles, cfg: PpoConfig, seed: int, documents: Sequence[Document] = (),
        placement: Placement | None = None,
    ) -> None:  # fmt: skip
        self.roles, self.cfg, self.seed, self.documents = roles, cfg, seed, documents
        self.device = next(roles.policy.parameters()).device
        self.kl_coef = cfg.kl.coef  # the loop sets it where it is adapted
        self.placement: Placement = placement or Replicas()
        self.ranks = self.placement.ranks
        make = self.placement.trainer
        self.trainers: dict[str, Trainer] = {"policy": make(roles.policy, cfg.learning_rate, cfg.max_grad_norm)}
        if roles.critic is not None:
            self.trainers["critic"] = make(roles.critic, cfg.critic_learning_rate, cfg.max_grad_norm)
        self._begun: Sums | None = None  # what was seen in the critic's first step while `appraise` waits for `learn`
        self._problem: TrainingError | None = None  # the first of this rank in the passes of a minibatch

    def learn(self, episodes: Sequence[Episode], update: int) -> dict[str, float]:
        """Epochs over one update's episodes; what happened, as means over tokens and optimiser steps."""
        cfg, wait = self.cfg, self.cfg.critic_warmup
        rate = cfg.learning_rate * rate_factor(cfg.schedule, cfg.warmup, update - 1 - wait, cfg.updates - wait)
        critic_rate = cfg.critic_learning_rate * rate_factor(cfg.schedule, cfg.warmup, update - 1, cfg.updates)
        sums: Sums = defaultdict(float)
        for role, trainer in self.trainers.items():
            trainer.set_rate(rate if role == "policy" else critic_rate)
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
        own = self._own(rest)
        critic, micro_tokens = self.roles.critic, self.cfg.micro_tokens
        with self.placement.whole(critic):
            found = on_this_rank(self.ranks, lambda: read_values(critic, own, micro_tokens))
        for episode, values in zip(own, found, strict=True):
            episode.values = values
        if self.ranks.size > 1:
            for part in self.ranks.gather([(e.place, e.values) for e in [*self._own(first), *own]]):
                for place, values in part:
                    episodes[place].values = values
        require_finite_rows(rest, "values", update)

    def _own(self, episodes: Sequence[Episode]) -> list[Episode]:
        """This rank's share, for passes that all ranks make at the same time."""
        return [episodes[i] for i in shares([e.tokens for e in episodes], self.ranks.size)[self.ranks.rank]]

    def checked(self, episodes: Sequence[Episode], update: int) -> list[list[Episode]]:
        """This rank's share of each minibatch, for the start-up checks."""
        parts = [self._own(minibatch) for minibatch in self.minibatches(episodes, update)]
        return [part for part in parts if part]

    def _step(self, minibatch: Sequence[Episode], update: int, step: int, sums: Sums) -> bool:
        """One optimiser step of each role, in turn, so that one role's gradients are in memory at a time. False if the
        policy has moved past `target_kl`; it then stays as it is, and so does a critic that had not begun."""
        here: Sums = defaultdict(float)
        if self._begun is not None:
            here, self._begun = self._begun, None
            self._move("critic", minibatch, update, here)
        went_on = update <= self.cfg.critic_warmup or self._policy_step(minibatch, update, step, here, sums)
        if went_on and self.roles.critic is not None and not here["critic/steps"]:
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
            self.trainers["policy"].discard()
            return False
        self._move("policy", minibatch, update, here)
        return True

    def _move(self, role: str, minibatch: Sequence[Episode], update: int, sums: Sums) -> None:
        """Clip the role's gradients, step, drop them and note their norm."""
        norm, bad = self.trainers[role].step()
        require_finite(not bad, f"{role} gradient {bad}", update, [e.name for e in minibatch])
        sums[f"{role}/grad_norm"] += norm
        sums[f"{role}/steps"] += 1

    def accumulate(self, role: str, minibatch: Sequence[Episode], update: int, sums: Sums) -> None:
        """Add the gradient of a role's loss over a minibatch to its parameters, and what was seen on all ranks to
        `sums`. A TrainingError of one rank is raised on all, after their last pass."""
        first_reading = sums is self._begun
        loss_of = self._policy_loss if role == "policy" else partial(self._critic_loss, update, first_reading)
        total = sum(len(e.ids) for e in minibatch)
        seen: Sums = defaultdict(float)
        for cut in self._passes([e.tokens for e in minibatch]):
            if not cut:
                self._pass_idly(role)
                continue
            chosen = [minibatch[i] for i in cut]
            rows = collate([e.prompt_ids for e in chosen], [e.ids for e in chosen], self.device)
            loss_N = loss_of(rows, chosen, seen)
            self._check_rows(loss_N, f"{role} loss", chosen, update)
            self.trainers[role].backward(loss_N.sum() / total)
        self._add_up(seen, sums)
        sums[f"{role}/tokens"] += total

    def _passes(self, lengths: Sequence[int]) -> list[list[int]]:
        return own_passes(lengths, self.cfg.micro_tokens, self.ranks, lockstep=self.placement.lockstep)

    def _pass_idly(self, role: str) -> None:
        """A pass without a gradient, for the collectives that it holds, while other ranks have rows left."""
        rows = collate([[0]], [[0]], self.device)
        model = self.trainers[role].model
        out = response_logits(model, rows) if role == "policy" else model(rows)
        self.trainers[role].backward(out.sum() * 0)

    def _add_up(self, seen: Sums, sums: Sums) -> None:
        """Add what all ranks have seen, unless one of them has met a problem."""
        problem, self._problem = self._problem, None
        found = self.ranks.gather((dict(seen), None if problem is None else str(problem)))
        message = next((text for _, text in found if text is not None), None)
        if message is not None:
            raise problem or TrainingError(message)
        for part, _ in found:
            for name, value in part.items():
                sums[name] = max(sums[name], value) if name in _LARGEST else sums[name] + value

    def _accumulate_ptx(self, update: int, step: int, sums: Sums) -> None:
        """Add the gradient of ptx.coef times the mean negative log-likelihood of the step's documents."""
        ptx = self.cfg.ptx
        if not ptx.coef:
            return
        documents = draw_documents(self.documents, self.seed, update, step, ptx.batch)
        total = sum(len(d.ids) for d in documents)
        trainer, seen = self.trainers["policy"], cast(Sums, defaultdict(float))
        for cut in self._passes([len(d.given) + len(d.ids) for d in documents]):
            if not cut:
                self._pass_idly("policy")
                continue
            rows = collate([documents[i].given for i in cut], [documents[i].ids for i in cut], self.device)
            nll = -token_logprobs(response_logits(trainer.model, rows), rows.targets_N, 1.0).sum() / total
            self._check(bool(torch.isfinite(nll)), "ptx loss", update, [documents[i].name for i in cut])
            trainer.backward(ptx.coef * nll)
            seen["policy/ptx_loss"] += float(nll.detach())
        self._add_up(seen, sums)

    def clear(self) -> None:
        """Drop the gradients."""
        for trainer in self.trainers.values():
            trainer.discard()

    def _policy_loss(self, rows: Rows, chosen: Sequence[Episode], sums: Sums) -> Tensor:
        cfg = self.cfg
        logits_NV = response_logits(self.trainers["policy"].model, rows)
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

    def _critic_loss(
        self, update: int, first_reading: bool, rows: Rows, chosen: Sequence[Episode], sums: Sums
    ) -> Tensor:
        values_N: Tensor = self.trainers["critic"].model(rows)
        if first_reading:  # the values are not known yet: these are they
            for episode, values in zip(chosen, torch.split(values_N.detach().cpu(), rows.counts), strict=True):
                episode.values = values.clone()
            self._check_rows(values_N, "rollout values", chosen, update)
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

    def _check_rows(self, loss_N: Tensor, what: str, chosen: Sequence[Episode], update: int) -> None:
        if not torch.isfinite(loss_N).all():
            parts = torch.split(loss_N.detach(), [len(e.ids) for e in chosen])
            bad = [e.name for e, part in zip(chosen, parts, strict=True) if not torch.isfinite(part).all()]
            self._check(False, what, update, bad)

    def _check(self, good: bool, what: str, update: int, rows: Sequence[str]) -> None:
        """Note the first problem. It is raised after the last pass: other ranks' passes may wait for this rank's."""
        try:
            require_finite(good, what, update, rows)
        except TrainingError as error:
            self._problem = self._problem or error


_LARGEST = {"policy/ratio_error_max"}
_BY_STEP = frozenset(("policy/grad_norm", "critic/grad_norm", "policy/ptx_loss"))
_NOT_MEANS = {
    "episodes", "policy/tokens", "critic/tokens", "policy/steps", "critic/steps", "policy/kl_old_new",
    "policy/ratio_error_max", "policy/first_ratio_error",
}  # fmt: skip
