"""do=plan: the graph with what would happen at each stage, batch arithmetic, and bytes by role. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.artifacts import latest_checkpoint, read_json
from rlhf.config import Config, CriticInit, GateMode, LoraConfig, Stage, stage_config
from rlhf.encoders import scorer_skeleton
from rlhf.errors import ConfigError, LineageError, RLHFError
from rlhf.lora import add_lora
from rlhf.manifest import STARTED, VERDICT, differences, read_manifest, recipe_of
from rlhf.pipeline import UNUSED, Run
from rlhf.preflight import reward_models

MIB = 1024**2


def plan_tables(run: Run, stages: tuple[str, ...]) -> Iterator[Table]:
    """The tables in the order in which they are shown."""
    yield _graph(run, stages)
    yield _batches(run.cfg)
    yield _memory(run)


def _graph(run: Run, stages: tuple[str, ...]) -> Table:
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "parents", "would be", "why"):
        table.add_column(column, overflow="fold")
    dirty: set[str] = set()
    if run.world is not None and not run.folder("world").is_dir():
        table.add_row("world", "", "built", "base model, data and annotators of the quickstart")
        dirty.add("world")
    else:
        run.build_world()
    for stage in stages:
        if stage == "ppo" and "rm" not in stages and run.cfg.stage is Stage.all:
            table.add_row("rm", "", "left out", UNUSED.partition(": ")[2])
        action, why = _parents_allow(run, stage, stages) or _action(run, stage, dirty)
        if action != "skipped":
            dirty.add(stage)
        table.add_row(stage, ", ".join(run.parents_of(stage)) or "base", action, why)
    return table


def _parents_allow(run: Run, stage: str, stages: tuple[str, ...]) -> tuple[str, str] | None:
    """A refusal if do=run would refuse for the sake of a parent that it would not make itself."""
    for parent in run.parents_of(stage):
        folder = run.folder(parent)
        if parent in stages or stage_config(run.cfg, parent).artifact:
            continue
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                raise LineageError(f"{parent} is not made yet: add stage={parent}")
            run.check_intact(parent, manifest)
            verdict = folder / VERDICT
            if not verdict.exists():
                raise LineageError(f"{parent} has no verdict: do=gate stage={parent}")
            decision = read_json(verdict)["decision"]
            waived = run.cfg.gate.waiver is not None  # held against it when the stage starts
            if decision != "PASS" and not waived and run.cfg.gate.mode is GateMode.enforce:
                raise LineageError(f"the {parent} gate says {decision}")
        except LineageError as error:
            return "refused", str(error)
    return None


def _action(run: Run, stage: str, dirty: set[str]) -> tuple[str, str]:
    """What do=run would do with a stage, given which nodes before it would be made anew."""
    if stage_config(run.cfg, stage).artifact:
        return "imported", str(stage_config(run.cfg, stage).artifact)
    folder = run.dir / stage
    manifest = read_manifest(folder)
    changed_parents = dirty & {*run.parents_of(stage), "world"}
    if manifest is None and not (folder / STARTED).exists():
        return "run", "not made yet"
    if changed_parents:
        return _anew(run, f"{', '.join(sorted(changed_parents))} would change")
    if stage == "rm":
        run.use_rankings()
    try:
        inputs = run.stage_inputs_of(stage, recipe_of(stage))
    except RLHFError as error:
        return "refused", str(error).split("\n")[0]
    if manifest is not None:
        changed = differences(manifest["inputs"], inputs)
        if changed:
            return _anew(run, "; ".join(changed[:3]))
        try:
            run.check_intact(stage, manifest)
        except LineageError as error:
            return "refused", str(error)
        return "skipped", f"finished {manifest['finished']}"
    if differences(read_json(folder / STARTED)["inputs"], inputs):
        return _anew(run, "unfinished under another configuration")
    checkpoint, _ = latest_checkpoint(folder / "checkpoints")
    return ("resumed", f"from {checkpoint.name}") if checkpoint else ("run", "unfinished, no checkpoint yet")


def _anew(run: Run, why: str) -> tuple[str, str]:
    """What do=run does with a stage that was made from other inputs."""
    if run.cfg.run.fresh:
        return "run", f"{why}; the old one is kept aside"
    return "refused", f"{why}; run.fresh=true or another run.name"


def _batches(cfg: Config) -> Table:
    table = Table(title="batches", title_justify="left")
    for column in ("stage", "an update", "cut into", "length"):
        table.add_column(column, overflow="fold")
    for stage, unit in (("sft", "rows"), ("rm", "prompts")):
        optim = getattr(cfg, stage).optim
        several = f", {cfg.rm.models} reward models" if stage == "rm" and cfg.rm.models > 1 else ""
        table.add_row(
            stage, f"{optim.batch} {unit}", f"{optim.batch // optim.micro_batch} × {optim.micro_batch}",
            f"{optim.epochs:g} epochs{several}",
        )  # fmt: skip
    ppo = cfg.ppo
    steps = ppo.epochs * ppo.batch // ppo.minibatch
    table.add_row(
        "ppo", f"{ppo.batch} episodes", f"{steps} optimizer steps of {ppo.minibatch} episodes, {ppo.epochs} epochs",
        f"{ppo.updates} updates = {ppo.updates * ppo.batch:,} episodes, {ppo.updates * steps:,} steps",
    )  # fmt: skip
    return table


def _skeleton(run: Run) -> Any:
    """The model by its configuration alone, without weights."""
    model, trust = run.cfg.model, run.cfg.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(run.base(), revision=model.revision, trust_remote_code=trust)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: {run.base()} has no readable config.json: {str(error).splitlines()[0]}"
        ) from error


def _scorer(run: Run) -> Any:
    """What a reward model starts from: as the policy, or rm.base where it has a base of its own."""
    own = run.own_base()
    return _skeleton(run) if own is None else scorer_skeleton(own, run.cfg.model)


def _adapter(model: Any, lora: LoraConfig) -> int:
    """The number of weights of one adapter on a model without weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in add_lora(model, lora, 0).parameters() if p.requires_grad)


def role_sizes(run: Run) -> list[tuple[str, int, int]]:
    """What each role holds in memory of its own: its name, the weights, and how many of them are trained. Heads, of
    some thousand weights, are left out."""
    cfg, base = run.cfg, sum(p.numel() for p in _skeleton(run).parameters())
    sizes = []
    scored = "rm" in run.parents_of("ppo")  # by a reward model of the run
    members, holdout = reward_models(run, to_train=False)
    models, scorer = members + holdout, sum(p.numel() for p in _scorer(run).parameters())
    last = "ppo reward" if models == 1 else f"ppo reward × {models}"
    for stage in ("sft", "rm") if scored else ("sft",):
        lora = getattr(cfg, stage).lora
        whole, start = (scorer, _scorer) if stage == "rm" else (base, _skeleton)
        trained = _adapter(start(run), lora) if lora.enabled else whole
        sizes.append((f"{stage} model", whole + trained if lora.enabled else whole, trained))
    if not cfg.ppo.lora.enabled:
        trains = ["ppo policy", "ppo critic"] if cfg.ppo.has_critic else ["ppo policy"]
        sizes += [*((role, base, base) for role in trains), ("ppo reference", base, 0)]
        return [*sizes, (last, models * scorer, 0)] if scored else sizes
    shared = scored and cfg.rm.lora.enabled and cfg.rm.artifact is None and cfg.rm.base is None
    policy, reward = _adapter(_skeleton(run), cfg.ppo.lora), _adapter(_skeleton(run), cfg.rm.lora) if shared else scorer
    critic = reward if shared and cfg.ppo.critic_init is CriticInit.reward else policy
    sizes += [("ppo shared base", base, 0), ("ppo policy", policy, policy)]
    sizes += [("ppo critic", critic, critic)] if cfg.ppo.has_critic else []
    sizes += [("ppo reference", 0, 0)]
    return [*sizes, (last, models * reward, 0)] if scored else sizes


def _memory(run: Run) -> Table:
    """Bytes of weights, gradients and Adam's two moments by role; activations come on top. All are in fp32: with
    model.dtype=bfloat16 only the arithmetic is not."""
    table = Table(title="memory on one rank, without activations", title_justify="left")
    for column in ("role", "parameters", "weights MiB", "gradients MiB", "optimizer MiB", "checkpoint MiB"):
        table.add_column(column, justify="right")
    if run.world is not None and not Path(run.base()).is_dir():
        table.add_row("built by the world on the first run", *[""] * 5)
        return table
    for role, held, trained in role_sizes(run):
        cells = [numbers * 4 / MIB for numbers in (held, trained, 2 * trained, 3 * trained)]
        table.add_row(role, f"{held:,}", *(f"{cell:,.1f}" for cell in cells))
    return table
