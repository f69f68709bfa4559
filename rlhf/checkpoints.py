"""The checkpoints of the supervised stages: which one to go on from, and the best weights so far.

The Trainer writes in place, and resumes without a word from a folder without its optimiser's files. Here a folder
counts once it is sealed with the digests of its files, holds every file that a resume reads, and says with which engine
and on how many ranks it was made: the parts of the ranks fit no other number.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf.artifacts import (
    atomic_folder,
    check_made_by,
    is_intact,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    seal,
    write_json,
)
from rlhf.config import EngineKind
from rlhf.console import say
from rlhf.engine.deepspeed import trained_weights
from rlhf.engine.ranks import Ranks
from rlhf.errors import TrainingError

KEEP_CHECKPOINTS = 2
MADE_BY = "engine.json"  # in each checkpoint


def find_resume(folder: Path, kind: EngineKind, ranks: Ranks) -> Path | None:
    """The newest intact checkpoint, the same on every rank; newer ones that are torn or altered are named and removed.

    ConfigError if it is another engine's or of another number of ranks; TrainingError if a file of it is missing.
    """
    name = ""
    if ranks.is_main:
        found, torn = latest_checkpoint(folder)
        for path in torn:
            say(f"{path.name} is torn or altered: passed over")
            shutil.rmtree(path)
        name = found.name if found else ""
    name = ranks.broadcast(name)
    if not name:
        return None
    found = folder / name
    path = found / MADE_BY
    made: dict[str, Any] = read_json(path) if path.exists() else {"engine": EngineKind.single.value, "ranks": 1}
    check_made_by(found, (made["engine"], made["ranks"]), (kind.on(ranks.size).value, ranks.size))
    missing = missing_files(found, kind, ranks.size)
    if missing:
        raise TrainingError(f"{found}: lacks {', '.join(missing)}: delete it to go on from the one before")
    say(f"resuming from {name}")
    return found


def missing_files(folder: Path, kind: EngineKind, size: int) -> list[str]:
    """What a resume would read and the folder does not hold. Without these files the Trainer goes on in silence, with
    a fresh optimiser and other weights."""
    names = ["trainer_state.json", "scheduler.pt"]
    names += ["rng_state.pth"] if size == 1 else [f"rng_state_{rank}.pth" for rank in range(size)]
    if not kind.zero:
        return [name for name in [*names, "optimizer.pt"] if not (folder / name).is_file()]
    missing = [name for name in [*names, "latest"] if not (folder / name).is_file()]
    parts = len(list(folder.glob("global_step*/*_optim_states.pt")))
    return missing if parts == size else [*missing, f"the optimiser states of {size - parts} of {size} ranks"]


def finish_checkpoint(folder: Path, step: int, kind: EngineKind, ranks: Ranks) -> None:
    """Seal `checkpoint-<step>` once every rank has written its part, and delete old ones."""
    ranks.barrier()
    made = folder / f"checkpoint-{step}"
    missing = ranks.broadcast(missing_files(made, kind, ranks.size))
    if missing:
        raise TrainingError(f"{made}: {', '.join(missing)} was not written")
    if ranks.is_main:
        write_json(made / MADE_BY, {"engine": kind.on(ranks.size).value, "ranks": ranks.size})
        seal(made)
        prune_checkpoints(folder, KEEP_CHECKPOINTS)
    ranks.barrier()


def save_best(model: torch.nn.Module, folder: Path, kept: dict[str, Any], kind: EngineKind, ranks: Ranks) -> None:
    """Keep the trained weights (of LoRA: the adapters and the head) and what they scored. Every rank takes part."""
    if kind.zero:
        weights = dict(trained_weights(model, ranks))
    else:
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if ranks.is_main:
        with atomic_folder(folder) as part:
            save_file(weights, part / "weights.safetensors")
            write_json(part / "metrics.json", kept)
            seal(part)


def load_best(model: torch.nn.Module, folder: Path) -> None:
    """Put the kept weights into a whole model, in place. TrainingError if they are torn or not that model's."""
    weights = load_file(folder / "weights.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name, p in trained.items() if name not in weights or weights[name].shape != p.shape]
    if wrong or weights.keys() - trained.keys():
        raise TrainingError(f"{folder}: the best weights are not those of the model: {wrong[:3]}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def read_best(folder: Path) -> dict[str, Any]:
    """What `save_best` was given beside the weights. TrainingError if they are torn."""
    if not is_intact(folder):
        raise TrainingError(f"{folder}: the best weights are torn or altered; delete {folder.parent} and run again")
    kept: dict[str, Any] = read_json(folder / "metrics.json")
    return kept
