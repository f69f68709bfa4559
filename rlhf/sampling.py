"""do=sample: K responses a prompt from a stage's model, one JSON line a prompt, ready to be ranked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from rlhf.artifacts import write_text
from rlhf.config import Config
from rlhf.inputs import Inputs
from rlhf.models import load_policy
from rlhf.rollout import Sampling, generate, seed_of


def sample_rankings(cfg: Config, model: Path, inputs: Inputs, device: torch.device, out: Path) -> int:
    """Write `{"prompt", "responses", "id", **tags}` lines to `out`; the number of prompts.

    Response i of prompt j is drawn with the seed (cfg.seed, "sample", j, i), whatever else is sampled beside it.
    """
    renderer, settings = inputs.renderer, cfg.sample
    # Held-out prompts too: the split is by prompt, so their rankings are held out wherever they are read.
    prompts = [*inputs.prompts.train, *inputs.prompts.heldout]
    if settings.prompts is not None and settings.prompts < len(prompts):
        prompts = random.Random(seed_of(cfg.seed, "prompts")).sample(prompts, settings.prompts)
    policy = load_policy(model, cfg.model, device)
    ids = [renderer.prompt_ids(p.messages) for p in prompts for _ in range(settings.k)]
    seeds = [seed_of(cfg.seed, "sample", j, i) for j in range(len(prompts)) for i in range(settings.k)]
    sampling = Sampling(settings.temperature, cfg.ppo.max_new_tokens, renderer.eos_id, cfg.ppo.decode_group)
    responses = [renderer.decode(r.ids) for r in generate(policy, ids, seeds, sampling)]
    lines = [
        json.dumps(
            {**p.tags, "prompt": p.messages, "responses": responses[j * settings.k : (j + 1) * settings.k], "id": p.id},
            ensure_ascii=False,
            default=str,
        )
        for j, p in enumerate(prompts)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(line + "\n" for line in lines))
    return len(prompts)
