"""What `do=` can be: each verb one function from a checked configuration to an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import closing
from pathlib import Path

import torch
from rich.table import Table

from rlhf.artifacts import read_json, write_json
from rlhf.chat import chat as converse
from rlhf.config import STAGES, Config, Do, GateMode, Stage
from rlhf.console import say, show
from rlhf.doctor import examine
from rlhf.engine.crew import Crew, follow
from rlhf.engine.ranks import Ranks
from rlhf.errors import ConfigError, LineageError, Preempted, RLHFError, TrainingError
from rlhf.judging import judge_stage
from rlhf.manifest import model_folder, read_manifest, write_config
from rlhf.pipeline import UNUSED, Run
from rlhf.plan import plan_tables
from rlhf.plan_memory import ranks_asked
from rlhf.preflight import check_batches, validate
from rlhf.report.verb import report
from rlhf.sampling import sample_rankings
from rlhf.signals import StoppedAtOnce
from rlhf.tracking import NoTracker

AUDIT = "audit.json"
DISK_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")


def dispatch(cfg: Config, ranks: Ranks | None = None) -> int:
    """Do what `cfg.do` says, as rank 0 of `ranks`, whose others `obey`; the exit code."""
    crew = Crew(ranks or Ranks())
    _prepare(cfg)
    verbs = {Do.plan: plan, Do.gate: gate, Do.sample: sample, Do.report: report, Do.chat: chat,
             Do.doctor: doctor}  # fmt: skip
    try:
        code = run(cfg, crew) if cfg.do is Do.run else verbs[cfg.do](cfg)
    except (RLHFError, StoppedAtOnce) as error:
        crew.dismiss(error.exit_code if isinstance(error, RLHFError) else Preempted.exit_code)
        raise
    except Exception as error:  # safetensors and torch wrap the system's error in kinds of their own
        crew.dismiss(1)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or any(text in str(error) for text in DISK_FULL):
            raise TrainingError(
                f"the disk is full ({cfg.run.dir}): nothing that was saved before is lost. "
                "Free some space and run the same command again"
            ) from error
        raise
    crew.dismiss(code)
    return code


def obey(cfg: Config, ranks: Ranks) -> int:
    """What a rank above 0 does with `do=run`: its part of each stage that rank 0 calls; the exit code."""
    _prepare(cfg)

    def take_part(now: Config, stage: str) -> None:
        with closing(Run(now, read_only=True, crew=Crew(ranks))) as work:
            work.perform(stage, NoTracker())

    return follow(ranks, take_part)


def _prepare(cfg: Config) -> None:
    if cfg.launch.threads is not None:
        torch.set_num_threads(cfg.launch.threads)
    _quiet_libraries()


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and guesses out of what the user reads."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # DeepSpeed, which accelerate imports, warns about each machine without a GPU unless it is told.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def chosen(work: Run) -> tuple[str, ...]:
    """The stages that the command is about: stage=all leaves out a reward model that nothing would use."""
    if work.cfg.stage is not Stage.all:
        return (work.cfg.stage.value,)
    return tuple(stage for stage in STAGES if stage != "rm" or stage in work.parents_of("ppo"))


def run(cfg: Config, crew: Crew | None = None) -> int:
    """do=run: bring the chosen stages to finished, judged artifacts."""
    with closing(Run(cfg, crew=crew)) as work:
        return _run(work, chosen(work))


def _run(work: Run, stages: tuple[str, ...]) -> int:
    cfg = work.cfg
    check_batches(work, stages)
    work.build_world()
    validate(work, stages)
    if cfg.stage is Stage.all and "rm" not in stages:
        say(f"rm: {UNUSED}")
    for stage in stages:
        judgement = work.run_stage(stage)
        write_config(work.dir, cfg)  # not if refused
        if not judgement.allowed and cfg.gate.mode is GateMode.enforce:
            break
    failed = work.failed
    if work.world is not None and not (failed and cfg.gate.mode is GateMode.enforce):
        audit(work)
    show(summary(work))
    if failed:
        raise failed[0].error()
    say(next_step(work, stages))
    return 0


def audit(work: Run) -> None:
    """The world's closing table once the policy is there, kept beside the models that it was made for."""
    made = {stage: read_manifest(work.folder(stage)) for stage in (*work.parents_of("ppo"), "ppo")}
    if work.world is None or not all(made.values()) or any(m.get("imported") for m in made.values() if m):
        return  # nothing to compare yet, or with a model from another world
    digests = {stage: manifest["digest"] for stage, manifest in made.items() if manifest}
    path = work.dir / AUDIT
    stored = read_json(path) if path.exists() else {}
    if stored.get("models") != digests:
        models = {"base": Path(work.base()), **{stage: work.model(stage) for stage in made}}
        stored = {"models": digests, "text": work.world.audit(models)}
        write_json(path, stored)
    say(stored["text"])


def summary(work: Run) -> Table:
    """What was made, the verdicts, where it lies."""
    table = Table(title=f"run {work.cfg.run.name}", title_justify="left")
    for column in ("stage", "status", "verdict", "stopped by", "model"):
        table.add_column(column, overflow="fold")
    for stage in STAGES:
        manifest = read_manifest(work.folder(stage))
        if manifest is None:
            table.add_row(stage, "not made", "", "", "")
            continue
        verdict = work.folder(stage) / "verdict.json"
        decision = read_json(verdict)["decision"] if verdict.exists() else "none"
        model = model_folder(work.folder(stage), manifest)
        where = os.path.relpath(model) if model.is_relative_to(Path.cwd()) else str(model)
        table.add_row(stage, manifest.get("status", ""), decision, manifest["stop_reason"], where)
    return table


def next_step(work: Run, stages: tuple[str, ...]) -> str:
    order = (*work.parents_of("ppo"), "ppo")
    following = order[order.index(stages[-1]) + 1 :]
    if following:
        return f"next: python -m rlhf stage={following[0]} run.name={work.cfg.run.name}"
    return "next: load ppo/model with AutoModelForCausalLM.from_pretrained, or look at it with rlhf.load_run"


def plan(cfg: Config) -> int:
    """do=plan: what would be skipped, resumed or run, and what it needs; loads no weights, writes nothing."""
    work = Run(cfg, read_only=True, crew=Crew(Ranks(size=ranks_asked(cfg))))
    for table in plan_tables(work, chosen(work)):
        show(table)
    return 0


def gate(cfg: Config) -> int:
    """do=gate: judge a stored artifact, or any model folder given as <stage>.artifact."""
    if cfg.stage is Stage.all:
        raise ConfigError("stage: do=gate judges one stage's artifact: add stage=sft, rm or ppo")
    with closing(Run(cfg)) as work:
        return _gate(work, cfg.stage.value)


def _gate(work: Run, stage: str) -> int:
    cfg = work.cfg
    work.build_world()
    if getattr(cfg, stage).artifact:
        manifest = work.import_artifact(stage)
    else:
        manifest = read_manifest(work.dir / stage) or {}
        if not manifest:
            raise LineageError(
                f"{stage}: no finished artifact in {work.dir / stage}; give {stage}.artifact=path to judge one"
            )
        work.check_intact(stage, manifest)
        for parent in manifest["parents"]:
            if parent in STAGES:
                work.require(parent, stage)
    judgement = work.accept(judge_stage(work, stage, manifest))
    if not judgement.allowed:
        raise judgement.error()
    return 0


def sample(cfg: Config) -> int:
    """do=sample: K responses a prompt from a stage's policy, as JSONL ready to be ranked."""
    if cfg.stage not in (Stage.sft, Stage.ppo):
        raise ConfigError("stage: do=sample draws from a policy: add stage=sft or stage=ppo")
    with closing(Run(cfg)) as work:
        return _sample(work, cfg.stage.value)


def _sample(work: Run, stage: str) -> int:
    cfg = work.cfg
    work.build_world()
    out = Path(cfg.sample.out) if cfg.sample.out else work.dir / f"samples-{stage}.jsonl"
    count = sample_rankings(cfg, work.model(stage), work.inputs("ppo"), work.device, out)
    say(f"{count} prompts with {cfg.sample.k} responses each: {out}")
    say('next: add "ranks" to each line (1 is best, equal numbers tie, null is unranked), then data.rankings.path=...')
    return 0


def chat(cfg: Config) -> int:
    """do=chat: talk to a stage's model; takes no lock. Ctrl-C ends it as /quit does."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        return converse(cfg, sys.stdin, sys.stdout)
    except StoppedAtOnce:
        sys.stdout.write("\n")
        return 0


def doctor(cfg: Config) -> int:
    """do=doctor: what this machine has and lacks."""
    table, missing = examine(Path(cfg.run.dir))
    show(table)
    if missing:
        raise RLHFError("missing: " + "; ".join(missing))
    return 0
