"""A tiny PPO run in a process of its own that ends itself with SIGKILL at a chosen moment.

    python ppo_killed.py FOLDER MODEL LORA-RANK [PART OCCURRENCE EVENT]

A moment is a call or return (of Python or C code) counted from the OCCURRENCE-th entry into one of `PARTS`. Without
one, the run goes to its end and writes how many events each part had to FOLDER/../parts.json. LORA-RANK 0 trains all
weights.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from ppo_tiny import config, context, early_letters

from rlhf import artifacts, models, tracking
from rlhf.config import Config, KlConfig, LoraConfig
from rlhf.ppo import checkpoint, episodes, evaluate, update
from stages import ppo

PARTS: dict[str, Any] = {
    "resume": checkpoint.resume,
    "update": ppo.Loop._update,
    "rollout": episodes.rollout,
    "learn": update.Learner.learn,
    "evaluate": evaluate.Evaluator.run,
    "log": tracking.JsonlTracker.log,
    "weights": safetensors.torch.save_file,  # the rest is inside a checkpoint's or the model's writing, in this order
    "state": torch.save,
    "seal": artifacts.seal,
    "flush": artifacts._fsync_tree,
    "prune": artifacts.prune_checkpoints,
    "model": models.save_model,
}


def noisy(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """A reward that draws from a generator of the process, whose state a resumed run must therefore have."""
    return early_letters(prompt, response, row) + 0.1 * random.random()


def kill_config(**changes: Any) -> Config:
    """Six updates, three checkpoints, three evaluations, and every state that a checkpoint can hold."""
    settings = {
        "updates": 6, "checkpoint_every": 2, "eval_every": 3, "ema": 0.8, "critic_warmup": 1,
        "kl": KlConfig(coef=0.05, target=0.5, horizon=100, budget=50.0),
    }  # fmt: skip
    cfg = config(**{**settings, **changes})
    cfg.reward = {**cfg.reward, "function": "ppo_killed.noisy"}
    return cfg


class Moments:
    """A profile function: counts the events of each entry into each part, and ends the process at one of them."""

    def __init__(self, parts: Mapping[str, Any], occurrence: int = 0, event: int = -1) -> None:
        self.names = {inspect.unwrap(function).__code__: name for name, function in parts.items()}
        self.at = (occurrence, event)
        self.counts: defaultdict[str, list[int]] = defaultdict(list)
        self.inside: list[tuple[FrameType, list[int]]] = []  # the parts that are being run, the outermost first

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (name := self.names.get(frame.f_code)):
            self.counts[name].append(0)
            self.inside.append((frame, self.counts[name]))
        for _, counts in self.inside:
            if (len(counts), counts[-1]) == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            counts[-1] += 1
        if event == "return" and self.inside and frame is self.inside[-1][0]:
            self.inside.pop()


def main(folder: str, model: str, rank: str, *moment: str) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    given = context(Path(folder), Path(model))
    lora = {"lora": LoraConfig(enabled=True, r=int(rank))} if int(rank) else {}
    moments = Moments({moment[0]: PARTS[moment[0]]}, int(moment[1]), int(moment[2])) if moment else Moments(PARTS)
    sys.setprofile(moments)
    try:
        ppo.run(kill_config(**lora), given)
    finally:
        sys.setprofile(None)
    (Path(folder).parent / "parts.json").write_text(json.dumps(moments.counts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
