"""do=plan: the graph with what would happen at each stage, batch arithmetic, and bytes by role. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from rlhf.artifacts import folder_digest, latest_checkpoint, read_json
from rlhf.config import Config, GateMode, Stage, shared_batch, stage_config
from rlhf.errors import ConfigError, LineageError, RLHFError
from rlhf.gates.policy import policy_digest
from rlhf.manifest import STARTED, VERDICT, differences, read_manifest, recipe_of
from rlhf.pipeline import UNUSED, Run
from rlhf.plan_memory import base_is_there, peaks_table, ranks_asked, role_sizes, roles_table
from rlhf.preflight import check_batches, validate


def plan_tables(run: Run, stages: tuple[str, ...]) -> Iterator[Table]:
    """The tables in the order in which they are shown."""
    yield _graph(run, stages)
    yield _batches(run.cfg)
    sizes = role_sizes(run) if base_is_there(run) else []
    yield roles_table(run, sizes)
    yield peaks_table(run, stages, sizes)


def _graph(run: Run, stages: tuple[str, ...]) -> Table:
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "parents", "would be", "why"):
        table.add_column(column, overflow="fold")
    dirty: set[str] = set()
    stopped = ""  # why no later stage would be reached
    try:
        check_batches(run, stages)
        if run.world is not None and not run.folder("world").is_dir():
            table.add_row("world", "", "built", "base model, data and annotators of the quickstart")
            dirty.add("world")
        else:
            run.build_world()
            validate(run, stages)
    except RLHFError as error:
        table.add_row("before any", "", "refused", str(error))
        stopped = "the command ends before any stage"
    for stage in stages:
        if stage == "ppo" and "rm" not in stages and run.cfg.stage is Stage.all:
            table.add_row("rm", "", "left out", UNUSED.partition(": ")[2])
        action, why = ("not reached", stopped) if stopped else _action(run, stage, stages, dirty)
        if action != "skipped":
            dirty.add(stage)
        stopped = stopped or _ends_here(run, stage, action)
        table.add_row(stage, ", ".join(run.parents_of(stage)) or "base", action, why)
    return table


def _ends_here(run: Run, stage: str, action: str) -> str:
    """Why do=run would go no further than this stage; nothing if it would, as far as can be said before it is run."""
    if action == "refused":
        return f"{stage} is refused"
    verdict = run.dir / stage / VERDICT
    if action == "skipped" and run.cfg.gate.mode is GateMode.enforce and verdict.exists():
        stored, waived = read_json(verdict), run.cfg.gate.waiver is not None  # held against it when the stage ends
        same_policy = stored["policy_digest"] == policy_digest(run.cfg.gate, stage)
        if same_policy and stored["decision"] != "PASS" and not waived:
            return f"the {stage} gate says {stored['decision']}"
    return ""


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


def _action(run: Run, stage: str, stages: tuple[str, ...], dirty: set[str]) -> tuple[str, str]:
    """What do=run would do with a stage, given which nodes before it would be made anew."""
    refused = _parents_allow(run, stage, stages)
    if refused is not None:
        return refused
    if stage_config(run.cfg, stage).artifact:
        return _imported(run, stage)
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


def _imported(run: Run, stage: str) -> tuple[str, str]:
    """What do=run does with the user's own model, in whose place something may have been before."""
    try:
        model, manifest = run.model(stage), read_manifest(run.dir / stage)
        if manifest is None:
            return "imported", str(model)
        if manifest.get("imported") != str(model):
            return _anew(run, f"{stage}.artifact: {manifest.get('imported')} -> {model}", "imported")
        if manifest["digest"] != folder_digest(model):
            return _anew(run, f"the files in {model} were altered since they were judged", "imported")
        run.check_entered(stage, run.dir / stage, manifest)
    except RLHFError as error:
        return "refused", str(error)
    return "skipped", f"imported before: {model}"


def _anew(run: Run, why: str, action: str = "run") -> tuple[str, str]:
    """What do=run does with a stage that was made from other inputs."""
    if run.cfg.run.fresh:
        return action, f"{why}; the old one is kept aside"
    return "refused", f"{why}; run.fresh=true or another run.name"


def _batches(cfg: Config) -> Table:
    """How updates are cut up among the ranks; where they cannot be, the nearest numbers that can."""
    ranks = ranks_asked(cfg)
    where = "one rank" if ranks == 1 else f"each of {ranks} ranks"
    table = Table(title="batches", title_justify="left")
    for column in ("stage", "an update", f"cut into, on {where}", "length"):
        table.add_column(column, overflow="fold")
    for stage, unit in (("sft", "rows"), ("rm", "prompts")):
        optim = getattr(cfg, stage).optim
        several = f", {cfg.rm.models} reward models" if stage == "rm" and cfg.rm.models > 1 else ""
        try:
            micro, passes = shared_batch(optim.batch, optim.micro_batch, ranks, f"{stage}.optim")
            cut = f"{passes} × {micro}"
        except ConfigError as error:
            cut = str(error)
        table.add_row(stage, f"{optim.batch} {unit}", cut, f"{optim.epochs:g} epochs{several}")
    ppo = cfg.ppo
    steps = ppo.epochs * ppo.batch // ppo.minibatch
    table.add_row(
        "ppo", f"{ppo.batch} episodes",
        f"{steps} optimizer steps of {ppo.minibatch} episodes, {ppo.epochs} epochs{_idle_ranks(cfg, ranks)}",
        f"{ppo.updates} updates = {ppo.updates * ppo.batch:,} episodes, {ppo.updates * steps:,} steps",
    )  # fmt: skip
    return table


def _idle_ranks(cfg: Config, ranks: int) -> str:
    """Said where decoding leaves ranks without work: a decode group is never split."""
    groups = -(-cfg.ppo.batch // cfg.ppo.decode_group)
    if groups >= ranks:
        return ""
    return (
        f"; {ranks - groups} of {ranks} ranks wait while {groups} decode: "
        f"ppo.decode_group={max(1, cfg.ppo.batch // ranks)} gives each a group"
    )
