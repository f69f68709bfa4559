"""What a run holds in memory, before it begins: bytes of each role on one rank, and the most that each stage holds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config import Config, CriticInit, Dtype, LoraConfig, stage_config
from rlhf.encoders import scorer_skeleton
from rlhf.errors import ConfigError
from rlhf.footprint import (
    FLOAT,
    Role,
    Shapes,
    cache_bytes,
    largest_shapes,
    loss_pass,
    noise_bytes,
    policy_pass,
    reading_pass,
    reading_shapes,
    score_pass,
)
from rlhf.lora import add_lora
from rlhf.memory import peak_of
from rlhf.models import enable_activation_checkpointing
from rlhf.pipeline import Run
from rlhf.preflight import reward_models
from rlhf.trial import UNLIKE

MIB = 1024**2
PASSES = {"sft": loss_pass, "rm": score_pass, "ppo": policy_pass, "read": reading_pass}


def ranks_asked(cfg: Config) -> int:
    """How many ranks do=run would start: `launch.gpus`, or the slots of the host file. ConfigError without one."""
    if cfg.launch.hostfile is None:
        return cfg.launch.gpus
    hosts = Path(cfg.launch.hostfile)
    if not hosts.is_file():
        raise ConfigError(f"launch.hostfile: there is no file {hosts}")
    text = hosts.read_text(encoding="utf-8")
    slots = sum(map(int, re.findall(r"^[^#\n]*\bslots\s*=\s*(\d+)", text, re.MULTILINE)))
    if slots == 0:
        raise ConfigError(f"launch.hostfile: no line of {hosts} gives a machine its ranks: `address slots=N`")
    return slots


# ---- models without weights


def base_is_there(run: Run) -> bool:
    """False where the world has yet to make the model that everything starts from."""
    return run.world is None or Path(run.base()).is_dir()


def skeleton(run: Run) -> Any:
    """The policy by its configuration alone, without weights."""
    model, trust = run.cfg.model, run.cfg.model.trust_remote_code
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(run.base(), revision=model.revision, trust_remote_code=trust)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path: {run.base()} has no readable config.json: {str(error).splitlines()[0]}"
        ) from error


def _scorer(run: Run) -> Any:
    """What a reward model starts from: as the policy, or rm.base where it has a base of its own."""
    own = run.own_base()
    return skeleton(run) if own is None else scorer_skeleton(own, run.cfg.model)


def _adapter(model: Any, lora: LoraConfig) -> int:
    """The number of weights of one adapter on a model without weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in add_lora(model, lora, 0).parameters() if p.requires_grad)


# ---- roles


Sizes = list[tuple[str, int, int]]  # of each role: its name, its weights, how many of them are trained


def role_sizes(run: Run) -> Sizes:
    """What each role holds in memory of its own. Heads, of some thousand weights, are left out."""
    cfg, base = run.cfg, sum(p.numel() for p in skeleton(run).parameters())
    sizes = []
    scored = "rm" in run.parents_of("ppo")  # by a reward model of the run
    members, holdout = reward_models(run, to_train=False)
    models, scorer = members + holdout, sum(p.numel() for p in _scorer(run).parameters())
    last = "ppo reward" if models == 1 else f"ppo reward × {models}"
    for stage in ("sft", "rm") if scored else ("sft",):
        lora = getattr(cfg, stage).lora
        whole, start = (scorer, _scorer) if stage == "rm" else (base, skeleton)
        trained = _adapter(start(run), lora) if lora.enabled else whole
        sizes.append((f"{stage} model", whole + trained if lora.enabled else whole, trained))
    if not cfg.ppo.lora.enabled:
        trains = ["ppo policy", "ppo critic"] if cfg.ppo.has_critic else ["ppo policy"]
        sizes += [*((role, base, base) for role in trains), ("ppo reference", base, 0)]
        return [*sizes, (last, models * scorer, 0)] if scored else sizes
    shared = scored and cfg.rm.lora.enabled and cfg.rm.artifact is None and cfg.rm.base is None
    policy, reward = _adapter(skeleton(run), cfg.ppo.lora), _adapter(skeleton(run), cfg.rm.lora) if shared else scorer
    critic = reward if shared and cfg.ppo.critic_init is CriticInit.reward else policy
    sizes += [("ppo shared base", base, 0), ("ppo policy", policy, policy)]
    sizes += [("ppo critic", critic, critic)] if cfg.ppo.has_critic else []
    sizes += [("ppo reference", 0, 0)]
    return [*sizes, (last, models * reward, 0)] if scored else sizes


def roles_table(run: Run, sizes: Sizes) -> Table:
    """Bytes of weights, gradients and Adam's moments by role on one rank (rlhf.footprint); no sizes: no base yet."""
    ranks = ranks_asked(run.cfg)
    engine = run.cfg.engine.kind.on(ranks).value
    where = "one rank" if ranks == 1 else f"each of {ranks} ranks"
    table = Table(title=f"memory on {where}, engine={engine}, without passes", title_justify="left")
    for column in ("role", "parameters", "weights MiB", "gradients MiB", "optimizer MiB", "checkpoint MiB"):
        table.add_column(column, justify="right")
    if not sizes:
        table.add_row("built by the world on the first run", *[""] * 5)
    for role in (Role(*size) for size in sizes):
        parts = role.weights(engine, ranks), role.gradients(engine, ranks), role.optimizer(engine, ranks)
        table.add_row(role.name, f"{role.held:,}", *(f"{size / MIB:,.1f}" for size in (*parts, role.checkpoint)))
    return table


# ---- stages


def peaks_table(run: Run, stages: tuple[str, ...], sizes: Sizes) -> Table:
    """The most that each stage holds at once on one rank, with rows as long as the configuration lets them be."""
    table = Table(title="peak on one rank at the longest rows", title_justify="left")
    for column in ("stage", "at rest MiB", "training adds MiB", "reading adds MiB", "peak MiB"):
        table.add_column(column, justify="right")
    for stage in stages if sizes else ():
        if stage_config(run.cfg, stage).artifact is None:
            table.add_row(stage, *_cells(run, stage, sizes))
    return table


def _cells(run: Run, stage: str, sizes: Sizes) -> list[str]:
    """The numbers of a stage; why there are none where torch cannot make a pass of this model without data."""
    try:
        rest, trains, reads = stage_peak(run, stage, sizes)
    except UNLIKE as error:  # those of tensors without data are RuntimeErrors
        first = str(error).strip().partition("\n")[0]
        return ["", "not counted", "", f"{type(error).__name__}: {first[:60]}"]
    return [f"{cell / MIB:,.0f}" for cell in (rest, trains, reads, rest + max(trains, reads))]


def stage_peak(run: Run, stage: str, sizes: Sizes) -> tuple[float, float, float]:
    """Bytes on one rank: weights and moments of the stage's roles; what its largest training pass adds, gradients among
    it; what evaluation or decoding adds, at another time."""
    cfg, ranks = run.cfg, ranks_asked(run.cfg)
    engine = cfg.engine.kind.on(ranks).value
    mine = [Role(*size) for size in sizes if size[0].split()[0] == stage]
    trained, largest = next(role for role in mine if role.trained), max(mine, key=lambda role: role.held)
    rest = sum(role.weights(engine, ranks) + role.optimizer(engine, ranks) for role in mine)
    on_cpu = run.device.type == "cpu"
    if stage == "ppo" and on_cpu:  # copies in the machine's memory: the best so far, the average
        rest += FLOAT * trained.held * ((cfg.ppo.kl.budget is not None) + bool(cfg.ppo.ema))
    shapes = largest_shapes(cfg, stage, ranks, _responses(run) if stage == "rm" else 1)
    trains = _pass(run, stage, stage, replace(shapes, on_cpu=on_cpu))
    trains += trained.gradients(engine, ranks) - FLOAT * trained.trained + trained.sent(engine)
    if stage == "rm":  # held-out rankings are read in passes of their own, without logits
        return rest, trains + largest.gathered(engine), 0.0
    config = skeleton(run).config
    reads = _pass(run, stage, "read", reading_shapes(cfg, stage, config))
    if stage == "ppo":
        reads += cache_bytes(config, cfg, recorded=not on_cpu) + noise_bytes(config, cfg)
        if on_cpu and cfg.model.dtype is not Dtype.bfloat16:  # the packed copy of the policy's weights (rlhf.packed)
            reads += FLOAT * mine[0].held
    return rest, trains + largest.gathered(engine), float(reads)


def _pass(run: Run, stage: str, kind: str, shapes: Shapes) -> float:
    """The most bytes that a pass holds, the gradients of all trained weights among them. Counted once for a model."""
    lora, cfg = getattr(run.cfg, stage).lora, run.cfg.model
    model = _scorer(run) if stage == "rm" else skeleton(run)
    mixed = cfg.dtype is Dtype.bfloat16
    key = (model.config.to_json_string(), kind, shapes, repr(lora), cfg.activation_checkpointing, mixed)
    if key not in _counted:
        with torch.device("meta"):
            model = add_lora(model, lora, 0) if lora.enabled else model
        if cfg.activation_checkpointing:
            enable_activation_checkpointing(model)

        def work(model: Any) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                PASSES[kind](model.train(), shapes)

        _counted[key] = peak_of(model, work)
    return _counted[key]


_counted: dict[tuple[Any, ...], int] = {}


def _responses(run: Run) -> int:
    """The most responses of a ranking: of the rows, or those that will be sampled."""
    rankings = run.inputs("rm").for_stage("rm").rankings if run.world is None or run.own_rankings else None
    if rankings is None:
        return run.cfg.sample.k
    return max(len(row.responses) for row in rankings.train)
