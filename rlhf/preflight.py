"""What is read and compared before a run loads any weight: every file, and every pair of settings that must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.artifacts import HOLDOUT, MEMBERS, members_of
from rlhf.config import STAGES, shared_batch, stage_config
from rlhf.encoders import check_scorer
from rlhf.errors import ConfigError
from rlhf.gates.policy import check_models, checks_of, kind_of
from rlhf.inputs import SOURCES
from rlhf.manifest import read_manifest
from rlhf.members import fold_numbers
from rlhf.models import check_positions
from rlhf.ppo.engines import check_engine
from rlhf.recorded import switched_off
from rlhf.rewards import check_ensemble, check_reward, holdout_node
from rlhf.rundir import RunDir

if TYPE_CHECKING:
    from rlhf.pipeline import Run


def check_batches(run: Run, stages: tuple[str, ...]) -> None:
    """ConfigError if an update's rows do not divide among the ranks."""
    for stage in ("sft", "rm"):
        if stage in stages and not stage_config(run.cfg, stage).artifact:
            optim = getattr(run.cfg, stage).optim
            shared_batch(optim.batch, optim.micro_batch, run.crew.ranks.size, f"{stage}.optim")


def validate(run: Run, stages: tuple[str, ...]) -> None:
    """Read every file that the stages will need, before any weight is loaded."""
    switched_off()  # of recorded decoding: that it is said as it can be read
    _check_parents_outside(run, stages)
    trained = [s for s in stages if not stage_config(run.cfg, s).artifact]
    if trained:
        check_positions(run.base(), run.cfg.model, run.cfg.data.max_length)
    own = run.own_base() if "rm" in trained else None
    if own is not None:
        check_positions(own, run.cfg.model, run.cfg.data.max_length, key="rm.base")
        check_scorer(own, run.cfg.model)
    judged = [stage for stage in ("rm", "ppo") if stage in trained]
    members, held_back = reward_models(run, to_train="rm" in trained)
    check_models(run.cfg.gate, judged, members, held_back or run.cfg.ppo.holdout is not None)
    if "ppo" in trained:
        check_reward(run.cfg.reward, run.dir / "rm" / "model")
        check_ensemble(run.cfg.reward, members)
        _check_gate_has_rewards(run)
        check_engine(run.cfg.rollout)
        if run.cfg.ppo.holdout is not None:
            check_reward(holdout_node(run.cfg.ppo.holdout), key="ppo.holdout")
    if run.world and not run.own_rankings and "rm" in trained:
        trained.remove("rm")  # its rankings are yet to be sampled
    # What they train on first: prompts may be taken from the rankings, whose faults are better named as rankings'.
    for stage in trained:
        getattr(run.inputs(stage), SOURCES[stage])
    for stage in trained:
        run.inputs(stage).for_stage(stage)
    if "rm" in trained:
        fold_numbers(run.inputs("rm").rankings.train, run.cfg.rm.fold_count)


def _check_parents_outside(run: Run, stages: tuple[str, ...]) -> None:
    """Raise LineageError if a parent that the command does not make was altered: before its tokenizer is read."""
    above = {name for stage in stages for name in run.parents_of(stage)} - set(stages)
    for parent in (stage for stage in STAGES if stage in above):
        manifest = None if stage_config(run.cfg, parent).artifact else read_manifest(run.folder(parent))
        if manifest is not None:
            run.check_intact(parent, manifest)


def reward_models(run: RunDir, *, to_train: bool) -> tuple[int, bool]:
    """How many PPO has to be paid by, and whether there is a holdout: as rm will be trained, or as it is there."""
    rm, manifest = run.cfg.rm, read_manifest(run.folder("rm"))
    if to_train or manifest is None or rm.artifact:
        return rm.members, rm.holdout
    return 1 + len(members_of(manifest["extra"])), HOLDOUT in manifest["extra"].get(MEMBERS, {})


def _check_gate_has_rewards(run: Run) -> None:
    """ConfigError if a check that decides about PPO compares by the run's reward model and there is none."""
    if "rm" in run.parents_of("ppo"):
        return
    deciding = {name: check for name, check in checks_of(run.cfg.gate, "ppo").items() if not check.record_only}
    lost = {f"gate.ppo.{n}": check for n, check in deciding.items() if "rewards" in kind_of(n, check).needs}
    if lost:
        sides = {key: "max" if check.min is None else "min" for key, check in lost.items()}
        record = " ".join(f"{key}.record_only=true {key}.{side}=null" for key, side in sides.items())
        raise ConfigError(
            f"{', '.join(lost)}: compares responses by the run's reward model, but `reward` takes none: leave it "
            f"undecided with {record}, or make or give a model to judge by: stage=rm, rm.artifact=..."
        )
