"""Everything that the next update depends on, in one sealed folder, so that a resumed run is the unbroken one.

The place in the data, the noise of every sample and the learning rates are functions of (seed, update) and need no
state. Weights are safetensors; optimiser and generator states are read with `weights_only`, so no code is ever loaded.
"""

from __future__ import annotations

import platform
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.artifacts import atomic_folder, latest_checkpoint, prune_checkpoints, read_json, seal, write_json
from rlhf.console import say
from rlhf.errors import TrainingError
from rlhf.ppo.update import Learner

Weights = dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is. `best` are the weights of the best evaluation under the KL budget, kept if there is one."""

    step: int = 0  # updates done
    over_budget: int = 0  # updates in a row with a KL over the budget
    best_step: int | None = None
    best_reward: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # the last that were logged
    best: Weights | None = None


def weights_of(model: torch.nn.Module) -> Weights:
    """A CPU copy of the parameters, shared ones once."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}


def put_weights(model: torch.nn.Module, weights: Weights, what: str) -> None:
    """Copy `weights` into the model's parameters; a TrainingError if they are not exactly those."""
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        raise TrainingError(
            f"{what}: its tensors are not those of the model: {sorted(own.keys() ^ weights.keys())[:3]}"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


def save(folder: Path, learner: Learner, progress: Progress, keep: int) -> None:
    """Write `folder`/step-N aside, seal it, rename it, and drop all but the newest `keep`."""
    with atomic_folder(folder / f"step-{progress.step}") as part:
        save_file(weights_of(learner.roles.policy), part / "policy.safetensors")
        save_file(weights_of(learner.roles.critic), part / "critic.safetensors")
        if progress.best is not None:
            save_file(progress.best, part / "best.safetensors")
        state = {
            "policy": learner.policy_optimizer.state_dict(), "critic": learner.critic_optimizer.state_dict(),
            "torch": torch.get_rng_state(), "python": random.getstate(),
        }  # fmt: skip
        torch.save(state, part / "optimizers.pt")
        numbers = {k: v for k, v in asdict(_without_best(progress)).items() if k != "best"}
        write_json(part / "state.json", {**numbers, "machine": machine()})
        seal(part)
    prune_checkpoints(folder, keep)


def resume(folder: Path, learner: Learner) -> Progress:
    """Load the newest intact checkpoint below `folder` into `learner`; a fresh Progress if there is none."""
    path, torn = latest_checkpoint(folder)
    for bad in torn:
        say(f"checkpoint {bad.name} is torn or altered and is passed over")
    if path is None:
        return Progress()
    numbers = read_json(path / "state.json")
    changed = {k: (v, machine().get(k)) for k, v in numbers.pop("machine").items() if machine().get(k) != v}
    for key, (was, now) in changed.items():
        say(f"{key} was {was} when {path.name} was written and is {now} now: the last bits may differ")
    put_weights(learner.roles.policy, load_file(path / "policy.safetensors"), f"{path.name}/policy")
    put_weights(learner.roles.critic, load_file(path / "critic.safetensors"), f"{path.name}/critic")
    state: dict[str, Any] = torch.load(path / "optimizers.pt", weights_only=True)
    learner.policy_optimizer.load_state_dict(state["policy"])
    learner.critic_optimizer.load_state_dict(state["critic"])
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    best = load_file(path / "best.safetensors") if (path / "best.safetensors").exists() else None
    return Progress(**numbers, best=best)


def machine() -> dict[str, Any]:
    """What decides the last bits of a float beside the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device,
            "vector": torch.backends.cpu.get_cpu_capability()}  # fmt: skip


def _without_best(progress: Progress) -> Progress:
    return Progress(
        step=progress.step, over_budget=progress.over_budget, best_step=progress.best_step,
        best_reward=progress.best_reward, metrics=progress.metrics,
    )  # fmt: skip
