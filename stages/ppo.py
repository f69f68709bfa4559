"""PPO: improve the SFT model on what the reward pays, staying close to where it started.

Our own loop (Ziegler et al. 1909.08593; Ouyang et al. 2203.02155, appendix C), with departures that matter: a response
cut at the length limit is penalised instead of scored as if it had ended; dropout is off in every role; advantages are
whitened, rewards normalised with statistics stored beside the reward model, not with the batch's.

    python -m rlhf stage=ppo
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from rlhf.artifacts import atomic_folder
from rlhf.config import Config, Dtype
from rlhf.console import progress as progress_bar
from rlhf.console import say
from rlhf.context import Context
from rlhf.errors import DataError, Preempted, TrainingError
from rlhf.models import save_model
from rlhf.ppo import checkpoint, watch
from rlhf.ppo.checks import check_first_rollout
from rlhf.ppo.episodes import Episode, compare, draw, estimate, rollout, score
from rlhf.ppo.evaluate import Evaluator
from rlhf.ppo.roles import load_roles
from rlhf.ppo.update import Learner
from rlhf.rewards import BuiltReward, build_reward
from rlhf.types import StageResult

RECIPE = 1


class Loop:
    """One PPO run: what is loaded, how far it is."""

    def __init__(self, cfg: Config, context: Context) -> None:
        self.cfg, self.ppo, self.context = cfg, cfg.ppo, context
        prompts = context.data.prompts
        if prompts is None or not prompts.train or not prompts.heldout:
            raise DataError("data.prompts: PPO needs prompts to train on and held-out ones to judge by")
        self.prompts = prompts.train
        # 1. The reward is checked and built first: it is the part that the user may have written.
        self.built = open_reward(cfg, context)
        # 2. Policy, frozen reference and critic, each optimiser with a rate of its own; then the state to go on from.
        self.roles = load_roles(cfg, context)
        self.learner = Learner(self.roles, cfg.ppo, cfg.seed)
        self.evaluator = Evaluator(prompts.heldout, context.renderer, self.built, cfg.ppo, cfg.seed)
        self.checkpoints = context.folder / "checkpoints"
        self.progress = checkpoint.resume(self.checkpoints, self.learner)

    def run(self) -> StageResult:
        state, planned = self.progress, self.ppo.updates
        if state.step:
            say(f"ppo: resumed after update {state.step} of {planned}")
        else:
            self._log(self._evaluated(0), 0)
        with progress_bar(planned, "ppo") as bar:
            bar.advance(state.step)
            while state.step < planned and not watch.must_stop(state, self.ppo.kl):
                metrics = self._update(state.step + 1)
                bar.advance(1, reward=metrics["reward/mean"], kl=metrics["kl/mean"], length=metrics["rollout/length"])
                self._keep()
        return self._finish()

    def _update(self, update: int) -> dict[str, float]:
        clock = Clock()
        # 3. Sample from the policy, score the text, compare with the reference and the critic.
        drawn = draw(self.prompts, self.cfg.seed, update, self.ppo.batch)
        episodes = rollout(self.roles, self.context.renderer, self.ppo, drawn)
        clock.lap("time/generate")
        score(episodes, self.built, self.context.renderer, self.ppo)
        clock.lap("time/score")
        compare(episodes, self.roles, self.ppo, update)
        clock.lap("time/compare")
        # 4. r_t = [t = T] score - coef * (log p - log p_ref); advantages by GAE, whitened over the batch.
        estimate(episodes, self.ppo)
        if update == 1:
            check_first_rollout(self.roles.policy, episodes, self.learner.minibatches(episodes, update), self.ppo)
        # 5. Clipped policy and value losses over epochs of minibatches.
        metrics = watch.rollout_metrics(episodes) | self.learner.learn(episodes, update)
        clock.lap("time/train")
        # 6. Watch: held-out prompts every so often, the KL budget always.
        self.progress.step = update
        watch.note_kl(self.progress, metrics["kl/mean"], self.ppo.kl)
        if update % self.ppo.eval_every == 0 or self._ends():
            metrics |= self._evaluated(update)
            clock.lap("time/evaluate")
        return self._log(metrics | clock.laps, update, episodes)

    def _ends(self) -> bool:
        return self.progress.step == self.ppo.updates or watch.must_stop(self.progress, self.ppo.kl)

    def _evaluated(self, update: int) -> dict[str, float]:
        metrics, rows = self.evaluator.run(self.roles)
        self.context.tracker.samples(rows, update)
        watch.note_evaluation(self.progress, metrics, update, self.roles, self.ppo.kl)
        return metrics

    def _log(self, metrics: dict[str, float], update: int, episodes: list[Episode] | None = None) -> dict[str, float]:
        self.context.tracker.log(watch.all_finite(metrics, update, episodes or []), update)
        self.progress.metrics = self.progress.metrics | metrics
        return metrics

    def _keep(self) -> None:
        """A checkpoint every so often, at the end, and when the process is asked to stop."""
        stopping = self.context.stopping()
        if stopping or self._ends() or self.progress.step % self.ppo.checkpoint_every == 0:
            checkpoint.save(self.checkpoints, self.learner, self.progress, self.ppo.keep_checkpoints)
        if stopping and not self._ends():
            raise Preempted(f"ppo: stopped after update {self.progress.step}, checkpoint written; run the same again")

    def _finish(self) -> StageResult:
        # 7. Over the budget at the end: the best evaluation under it is what counts.
        state, budget = self.progress, self.ppo.kl.budget
        reason = "finished"
        extra: dict[str, Any] = {}
        if budget is not None and (watch.must_stop(state, self.ppo.kl) or state.metrics["eval/kl"] > budget):
            if state.best is None:
                raise TrainingError(f"ppo: KL passed ppo.kl.budget={budget} and no evaluation was under it")
            checkpoint.put_weights(self.roles.policy, state.best, "best evaluation")
            reason, extra = "kl_budget", {"best_step": state.best_step, "best_reward": state.best_reward}
            say(f"ppo: KL passed the budget of {budget} nats: the policy of update {state.best_step} is kept")
        elif state.step != self.ppo.updates:
            raise TrainingError(f"ppo: ended after {state.step} of {self.ppo.updates} updates without a reason")
        with atomic_folder(self.context.folder / "model") as part:
            save_model(self.roles.policy, self.context.renderer.tokenizer, part)
        return StageResult(
            metrics=state.metrics, stop_reason=reason, updates=state.step, planned_updates=self.ppo.updates, extra=extra
        )


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.start = now - self.start, now


def open_reward(cfg: Config, context: Context) -> BuiltReward:
    """The configured reward, and a line about what its scores are divided by."""
    stored: Mapping[str, Any] = context.parent_extra.get("rm", {})
    built = build_reward(cfg.reward, context.parents.get("rm"), stored)
    if cfg.ppo.normalize_reward and built.std is None:
        say(f"ppo: {type(built.reward).__name__} stores no mean and std: its rewards are used as they are")
    return built


def run(cfg: Config, context: Context) -> StageResult:
    """Train, or go on training; leaves `model/`, checkpoints and metrics in the stage's folder."""
    loop = Loop(cfg, context)
    mixed = cfg.model.dtype is Dtype.bfloat16
    # Without the cache: it would hold the bf16 copies of the first weights for the whole run.
    with torch.autocast(context.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
        return loop.run()
