"""PPO: improve the SFT model on what the reward pays, staying close to where it started.

Our own loop (Ziegler et al. 1909.08593; Ouyang et al. 2203.02155, appendix C), with departures that matter: a response
cut at the length limit is penalised instead of scored as if it had ended; dropout is off in every role; advantages are
whitened, rewards normalised with statistics stored beside the reward model, not with the batch's.

    python -m rlhf stage=ppo
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlhf.adapters import SharedBase
from rlhf.advantages import adapted_coef
from rlhf.artifacts import holdout_of, members_of
from rlhf.config import Config, Dtype
from rlhf.console import progress as progress_bar
from rlhf.console import say
from rlhf.context import Context
from rlhf.engine.ppo import place
from rlhf.errors import DataError, Preempted, TrainingError
from rlhf.ppo import checkpoint, watch
from rlhf.ppo.checks import check_first_rollout
from rlhf.ppo.engines import build_engine
from rlhf.ppo.episodes import Episode, compare, dealt, draw, estimate, rollout, score, together
from rlhf.ppo.evaluate import Evaluator, Rewards
from rlhf.ppo.ptx import ptx_documents
from rlhf.ppo.roles import load_roles, open_base, save_policy
from rlhf.ppo.sharing import here
from rlhf.ppo.update import Learner
from rlhf.rewards import build_reward, fill_members, holdout_node
from rlhf.types import StageResult

RECIPE = 1
STOPPED = {
    "kl_budget": "KL passed ppo.kl.budget",
    "over_optimisation": "the reward rose while the holdout reward fell",
}


class Loop:
    """One PPO run: what is loaded, how far it is."""

    def __init__(self, cfg: Config, context: Context) -> None:
        self.cfg, self.ppo, self.context = cfg, cfg.ppo, context
        prompts = context.data.prompts
        if prompts is None or not prompts.train or not prompts.heldout:
            raise DataError("data.prompts: PPO needs prompts to train on and held-out ones to judge by")
        self.prompts = prompts.train
        # 1. The rewards are checked and built first: they are the part that the user may have written.
        base = open_base(cfg, context)
        self.rewards, self.engine = open_rewards(cfg, context, base), build_engine(cfg.rollout)
        documents = ptx_documents(context.data, context.renderer, cfg.data.max_length) if cfg.ppo.ptx.coef else []
        # 2. Policy, frozen reference and critic, each optimiser with a rate of its own, spread over the ranks as the
        # engine says; then the state to go on from.
        self.roles = load_roles(cfg, context, base)
        self.ranks = context.ranks
        self.placement = place(cfg.engine, self.ranks, mixed=cfg.model.dtype is Dtype.bfloat16)
        self.placement.freeze(self.roles.reference)
        self.learner = Learner(self.roles, cfg.ppo, cfg.seed, documents, self.placement)
        self.evaluator = Evaluator(
            prompts.heldout, context.renderer, self.rewards, self.engine, cfg.ppo, cfg.seed
        )  # fmt: skip
        self.tracked = 0.0  # seconds in the tracker since the last update's line
        self.checkpoints = context.folder / "checkpoints"
        self.progress = checkpoint.resume(self.checkpoints, self.learner)
        if not self.progress.step:
            self.progress.kl_coef = cfg.ppo.kl.coef
            self.progress.average = self.placement.weights(self.roles.policy) if cfg.ppo.ema else None

    def run(self) -> StageResult:
        state, planned = self.progress, self.ppo.updates
        if state.step:
            say(f"ppo: resumed after update {state.step} of {planned}")
        else:
            self._log(self._evaluated(0), 0)
        with progress_bar(planned, "ppo") as bar:
            bar.advance(state.step)
            while not self._ends():
                metrics = self._update(state.step + 1)
                bar.advance(1, reward=metrics["reward/mean"], kl=metrics["kl/mean"], length=metrics["rollout/length"])
                self._keep()
        return self._finish()

    def _update(self, update: int) -> dict[str, float]:
        clock = Clock()
        # 3. Sample from the policy, each rank its decode groups; score the text, compare with the reference, each rank
        # its share of the tokens.
        cfg, state, ranks, whole = self.ppo, self.progress, self.ranks, self.placement.whole
        drawn = draw(self.prompts, self.cfg.seed, update, cfg.batch, cfg.group)
        roles, renderer, paid = self.roles, self.context.renderer, self.rewards.paid
        with whole(roles.policy):
            own = dealt(ranks, lambda: rollout(self.engine, roles.policy, renderer, cfg, drawn, ranks))
        clock.lap("time/generate")
        with whole(paid.reward):
            here(ranks, lambda: score(own, paid, renderer, cfg))
        clock.lap("time/score")
        with whole(roles.reference):
            here(ranks, lambda: compare(own, roles, cfg, update))
        episodes = together(ranks, own)
        clock.lap("time/compare")
        # 4. The critic's values; r_t = [t = T] score - coef * (log p - log p_ref); advantages by GAE, or against the
        # group.
        self.learner.kl_coef = state.kl_coef
        self.learner.appraise(episodes, update)
        estimate(episodes, cfg, state.kl_coef)
        if update == 1:
            parts = self.learner.checked(episodes, update)
            with whole(roles.policy):
                here(ranks, lambda: check_first_rollout(roles.policy, episodes, parts, cfg))
        # 5. Clipped policy and value losses over epochs of minibatches.
        metrics = ranks.broadcast(watch.rollout_metrics(episodes)) | self.learner.learn(episodes, update)
        metrics["kl/coef"] = state.kl_coef
        if state.average is not None and cfg.ema:
            checkpoint.follow(state.average, self.placement.weights(roles.policy), cfg.ema)
        clock.lap("time/train")
        # 6. Watch: held-out prompts every so often, the KL budget always.
        state.step = update
        watch.note_kl(state, metrics["kl/mean"], cfg.kl)
        if cfg.kl.target is not None:
            state.kl_coef = adapted_coef(state.kl_coef, metrics["kl/mean"], cfg.kl.target, cfg.batch, cfg.kl.horizon)
        if update % cfg.eval_every == 0 or self._ends():
            metrics |= self._evaluated(update)
            clock.lap("time/evaluate")
        took = {"time/update": clock.total, "time/tracker": self.tracked}  # of this one's line the next line tells
        self.tracked = 0.0
        return self._log(metrics | clock.laps | took, update, episodes)

    def _ends(self) -> bool:
        return self.progress.step == self.ppo.updates or watch.must_stop(self.progress, self.ppo) is not None

    def _evaluated(self, update: int) -> dict[str, float]:
        state, policy = self.progress, self.roles.policy
        with checkpoint.averaged(self.placement, policy, state.average):
            found = self.evaluator.run(self.roles, state.start, self.placement)
            watch.note_evaluation(state, found, update, lambda: self.placement.weights(policy), self.ppo)
        if self.ranks.is_main:
            self._track(lambda: self.context.tracker.samples(found.rows, update))
        if state.alarms >= self.ppo.alarm.patience:
            say(f"ppo: update {update}: the reward rises while the holdout reward falls (over-optimisation)")
        return found.metrics

    def _log(self, metrics: dict[str, float], update: int, episodes: list[Episode] | None = None) -> dict[str, float]:
        watch.all_finite(metrics, update, episodes or [])
        if self.ranks.is_main:
            self._track(lambda: self.context.tracker.log(metrics, update))
        self.progress.metrics = self.progress.metrics | metrics
        return metrics

    def _track(self, write: Callable[[], None]) -> None:
        began = time.perf_counter()
        write()
        self.tracked += time.perf_counter() - began

    def _keep(self) -> None:
        """A checkpoint every so often, at the end, and when the process is asked to stop."""
        stopping = self.context.stopping()
        if stopping or self._ends() or self.progress.step % self.ppo.checkpoint_every == 0:
            checkpoint.save(self.checkpoints, self.learner, self.progress, self.ppo.keep_checkpoints)
        if stopping and not self._ends():
            raise Preempted(f"ppo: stopped after update {self.progress.step}, checkpoint written; run the same again")

    def _finish(self) -> StageResult:
        # 7. Stopped, or over the budget at the end: the best evaluation under the budget is what counts.
        state, budget, policy = self.progress, self.ppo.kl.budget, self.roles.policy
        reason = watch.must_stop(state, self.ppo)
        if reason is None and budget is not None and state.metrics["eval/kl"] > budget:
            reason = "kl_budget"
        extra: dict[str, Any] = {}
        if reason is not None:
            if state.best is None:
                raise TrainingError(f"ppo: KL passed ppo.kl.budget={budget} and no evaluation was under it")
            self.placement.put(policy, state.best, "best evaluation")
            extra = {"best_step": state.best_step, "best_reward": state.best_reward}
            say(f"ppo: {STOPPED[reason]}: the policy of update {state.best_step} is kept")
        elif state.step != self.ppo.updates:
            raise TrainingError(f"ppo: ended after {state.step} of {self.ppo.updates} updates without a reason")
        elif state.average is not None:
            self.placement.put(policy, state.average, "average")
        with self.placement.whole(policy):
            here(self.ranks, lambda: save_policy(policy, self.cfg, self.context) if self.ranks.is_main else None)
        return StageResult(
            metrics=state.metrics, stop_reason=reason or "finished", updates=state.step,
            planned_updates=self.ppo.updates, extra=extra,
        )  # fmt: skip


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.began = self.start = time.perf_counter()
        self.laps: dict[str, float] = {}

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.start = now - self.start, now


def open_rewards(cfg: Config, context: Context, base: SharedBase | None) -> Rewards:
    """The configured reward and the holdout, and a line about what their scores are divided by."""
    stored: Mapping[str, Any] = context.parent_extra.get("rm", {})
    trust = cfg.model.trust_remote_code
    paid = build_reward(
        cfg.reward, context.parents.get("rm"), stored, shared_base=base, trust_remote_code=trust
    )  # fmt: skip
    if fill_members(cfg.reward, context.parents.get("rm"), stored) != cfg.reward:
        say(f"ppo: paid by the run's {1 + len(members_of(stored))} reward models together")
    if cfg.ppo.normalize_reward and paid.std is None:
        say(
            f"ppo: {type(paid.reward).__name__} stores no mean and std: its rewards are used as they are "
            "(reward.mean and reward.std give them)"
        )
    own = holdout_of(context.parents.get("rm"), stored)
    spec = holdout_node(str(own) if own is not None and cfg.ppo.holdout is None else cfg.ppo.holdout)
    holdout = None
    if spec is not None:
        holdout = build_reward(spec, key="ppo.holdout", shared_base=base, trust_remote_code=trust)
    return Rewards(paid=paid, holdout=holdout)


def run(cfg: Config, context: Context) -> StageResult:
    """Train, or go on training; leaves `model/`, checkpoints and metrics in the stage's folder."""
    loop = Loop(cfg, context)
    mixed = cfg.model.dtype is Dtype.bfloat16
    # Without the cache: it would hold the bf16 copies of the first weights for the whole run.
    with torch.autocast(context.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
        return loop.run()
