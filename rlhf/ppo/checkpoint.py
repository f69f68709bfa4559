"""Everything that the next update depends on, in one sealed folder, so that a resumed run is the unbroken one.

The place in the data, the noise of every sample and the learning rates are functions of (seed, update) and need no
state. Weights are safetensors; optimiser and generator states are read with `weights_only`, so no code is ever loaded.

On several ranks rank 0 writes what all have, each rank its own generators and its part of the optimisers' state, into
one folder, which is sealed when all have written. It is resumed by as many ranks and the same engine, or not at all.
"""

from __future__ import annotations

import dataclasses
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf.artifacts import (
    atomic_folder,
    check_made_by,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    seal,
    write_json,
)
from rlhf.config import EngineKind
from rlhf.console import say
from rlhf.engine.ppo import Placement, Weights
from rlhf.engine.ranks import Ranks
from rlhf.ppo.update import Learner

KEPT = ("best", "average")  # weights beside those that are trained


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is, and what it remembers. `best` are the weights of the best evaluation under the KL budget, kept
    where the run may go back to them; `average` those of ppo.ema. Both are empty on ranks above 0."""

    step: int = 0  # updates done
    kl_coef: float = 0.0  # of the next update
    over_budget: int = 0  # updates in a row with a KL over the budget
    alarms: int = 0  # evaluations in a row that show over-optimisation
    best_step: int | None = None
    best_reward: float = 0.0
    start: list[float] | None = None  # what the start was judged by, a number for each evaluation prompt
    # Rewards and holdout where the holdout of the prompts with even, with odd places stood highest.
    peaks: list[dict[str, list[float]]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # the last that were logged
    best: Weights | None = None
    average: Weights | None = None


def follow(average: Weights, weights: Weights, decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, in place."""
    for name, weight in weights.items():
        average[name].lerp_(weight, 1 - decay)


@contextmanager
def averaged(placement: Placement, model: torch.nn.Module, average: Weights | None) -> Iterator[None]:
    """The model with the averaged weights inside, if there are any, and with its own again afterwards."""
    if average is None:
        yield
        return
    own = placement.weights(model)
    placement.put(model, average, "average")
    try:
        yield
    finally:
        placement.put(model, own, "policy")


def save(folder: Path, learner: Learner, progress: Progress, keep: int) -> None:
    """Write `folder`/step-N aside, seal it, rename it, and drop all but the newest `keep`."""
    placement, ranks = learner.placement, learner.ranks
    with _folder_of_all(ranks, folder / f"step-{progress.step}") as part:
        for role in learner.trainers:
            weights = placement.weights(getattr(learner.roles, role))
            if ranks.is_main:
                save_file(weights, part / f"{role}.safetensors")
            del weights
        states = {role: trainer.state() for role, trainer in learner.trainers.items()}
        state = {role: each for role, each in states.items() if each is not None}
        generators = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if ranks.is_main:
            for name in KEPT:
                if (kept := getattr(progress, name)) is not None:
                    save_file(kept, part / f"{name}.safetensors")
        torch.save(state | generators, part / _state_file(ranks.rank))
        if ranks.is_main:
            numbers = asdict(dataclasses.replace(progress, best=None, average=None))
            for name in KEPT:
                del numbers[name]
            write_json(part / "state.json", {**numbers, "machine": machine(), "engine": engine_of(placement)})
    if ranks.is_main:
        prune_checkpoints(folder, keep)


@contextmanager
def _folder_of_all(ranks: Ranks, final: Path) -> Iterator[Path]:
    """`atomic_folder`, sealed, for every rank to write into: it takes its place when all have written."""
    if not ranks.is_main:
        yield ranks.broadcast(final)
        ranks.barrier()
    else:
        with atomic_folder(final) as part:
            yield ranks.broadcast(part)
            ranks.barrier()
            seal(part)
    ranks.barrier()  # it is there for all


def _state_file(rank: int) -> str:
    return "optimizers.pt" if rank == 0 else f"optimizers-{rank}.pt"


def resume(folder: Path, learner: Learner) -> Progress:
    """Load the newest intact checkpoint below `folder` into `learner`; a fresh Progress if there is none. ConfigError
    if another engine or number of ranks wrote it."""
    placement, ranks = learner.placement, learner.ranks
    path, torn = ranks.broadcast(latest_checkpoint(folder) if ranks.is_main else (None, []))
    for bad in torn:
        say(f"checkpoint {bad.name} is torn or altered and is passed over")
    if path is None:
        return Progress()
    numbers = read_json(path / "state.json")
    made = numbers.pop("engine", {"kind": EngineKind.single.value, "ranks": 1})
    check_made_by(path, (made["kind"], made["ranks"]), (placement.kind, ranks.size))
    changed = {k: (v, machine().get(k)) for k, v in numbers.pop("machine").items() if machine().get(k) != v}
    for key, (was, now) in changed.items():
        say(f"{key} was {was} when {path.name} was written and is {now} now: the last bits may differ")
    state: dict[str, Any] = torch.load(path / _state_file(ranks.rank), weights_only=True)
    shared = state if ranks.is_main else torch.load(path / _state_file(0), weights_only=True)
    for role, trainer in learner.trainers.items():
        weights = load_file(path / f"{role}.safetensors") if ranks.is_main else {}
        placement.put(getattr(learner.roles, role), weights, f"{path.name}/{role}")
        trainer.load_state(state.get(role, shared[role]))
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    files = {name: path / f"{name}.safetensors" for name in KEPT}
    kept = {name: load_file(file) if ranks.is_main else {} for name, file in files.items() if file.exists()}
    return Progress(**numbers, **kept)


def engine_of(placement: Placement) -> dict[str, Any]:
    """What a checkpoint can be resumed by."""
    return {"kind": placement.kind, "ranks": placement.ranks.size}


def machine() -> dict[str, Any]:
    """What decides the last bits of a float beside the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device,
            "vector": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
