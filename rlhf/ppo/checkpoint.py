"""Everything that the next update depends on, in one sealed folder, so that a resumed run is the unbroken one.

The place in the data, the noise of every sample and the learning rates are functions of (seed, update) and need no
state. Weights are safetensors; optimiser and generator states are read with `weights_only`, so no code is ever loaded.
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
from torch import Tensor

from rlhf.artifacts import atomic_folder, latest_checkpoint, prune_checkpoints, read_json, seal, write_json
from rlhf.console import say
from rlhf.errors import TrainingError
from rlhf.ppo.update import Learner

Weights = dict[str, Tensor]
KEPT = ("best", "average")  # weights beside those that are trained


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run is, and what it remembers. `best` are the weights of the best evaluation under the KL budget, kept
    where the run may go back to them; `average` those of ppo.ema."""

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


def follow(average: Weights, model: torch.nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * the model's weights, in place."""
    for name, p in model.named_parameters():
        average[name].lerp_(p.detach().to("cpu"), 1 - decay)


@contextmanager
def averaged(model: torch.nn.Module, average: Weights | None) -> Iterator[None]:
    """The model with the averaged weights inside, if there are any, and with its own again afterwards."""
    if average is None:
        yield
        return
    own = weights_of(model)
    put_weights(model, average, "average")
    try:
        yield
    finally:
        put_weights(model, own, "policy")


def save(folder: Path, learner: Learner, progress: Progress, keep: int) -> None:
    """Write `folder`/step-N aside, seal it, rename it, and drop all but the newest `keep`."""
    with atomic_folder(folder / f"step-{progress.step}") as part:
        save_file(weights_of(learner.roles.policy), part / "policy.safetensors")
        state = {
            "policy": learner.policy_optimizer.state_dict(),
            "torch": torch.get_rng_state(), "python": random.getstate(),
        }  # fmt: skip
        if learner.roles.critic is not None and learner.critic_optimizer is not None:
            save_file(weights_of(learner.roles.critic), part / "critic.safetensors")
            state["critic"] = learner.critic_optimizer.state_dict()
        for name in KEPT:
            if (weights := getattr(progress, name)) is not None:
                save_file(weights, part / f"{name}.safetensors")
        torch.save(state, part / "optimizers.pt")
        numbers = asdict(dataclasses.replace(progress, best=None, average=None))
        for name in KEPT:
            del numbers[name]
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
    state: dict[str, Any] = torch.load(path / "optimizers.pt", weights_only=True)
    learner.policy_optimizer.load_state_dict(state["policy"])
    if learner.roles.critic is not None and learner.critic_optimizer is not None:
        put_weights(learner.roles.critic, load_file(path / "critic.safetensors"), f"{path.name}/critic")
        learner.critic_optimizer.load_state_dict(state["critic"])
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kept = {name: load_file(path / f"{name}.safetensors") for name in KEPT if (path / f"{name}.safetensors").exists()}
    return Progress(**numbers, **kept)


def machine() -> dict[str, Any]:
    """What decides the last bits of a float beside the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device,
            "vector": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
