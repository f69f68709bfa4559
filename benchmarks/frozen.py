"""The work that both systems are given: the same prompts, the same sampled tokens, the same models.

A workload is a JSON file: prompts (messages and their token ids) and, for each, the response that the starting policy
gave once. Both systems still sample at every step, and pay for it; then the recorded token takes the place of theirs
(`Replay`). So lengths, padding, log-probabilities and losses belong to one and the same rollout.
"""

from __future__ import annotations

import gzip
import json
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config import ModelConfig
from rlhf.data.formats import HHText
from rlhf.data.rows import Dirty, Malformed
from rlhf.render import Renderer, load_tokenizer
from rlhf.rollout import Sampling, generate, seed_of
from rlhf.types import Messages

PROMPTS, MAX_PROMPT, FIXED = 256, 96, 64  # prompts, their longest in tokens, and the length of both parts when fixed


@dataclass(kw_only=True, slots=True)
class Workload:
    """`responses[i]` answers `prompts[i]`: the recorded tokens up to the cap, the end token included if it came."""

    name: str
    cap: int
    fixed: bool  # no end token in any response
    messages: list[Messages]
    prompts: list[list[int]]
    responses: list[list[int]]
    policy: str  # model folders
    reward: str

    def table(self) -> dict[tuple[int, ...], list[int]]:
        """From a prompt's ids to its response."""
        return {tuple(p): r for p, r in zip(self.prompts, self.responses, strict=True)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Workload:
        return Workload(**json.loads(path.read_text(encoding="utf-8")))


class Replay:
    """Puts recorded tokens in the place of sampled ones, row by row of a decode batch."""

    def __init__(self, workload: Workload, eos_id: int) -> None:
        self.table, self.eos_id = workload.table(), eos_id

    def token(self, prompt: tuple[int, ...], step: int) -> int:
        """The recorded token; the end token for a row that has ended, which some decoders keep in the batch."""
        response = self.table[prompt]
        return response[step] if step < len(response) else self.eos_id


def prepare(model: Path, files: list[Path], folder: Path, caps: list[int]) -> dict[str, Path]:
    """Write the models (fp32) and one file a workload into `folder`; workloads by name, `cap64`, ..., `fixed`."""
    folder.mkdir(parents=True, exist_ok=True)
    policy, reward = folder / "policy", folder / "reward"
    _write_models(model, policy, reward)
    renderer = Renderer(load_tokenizer(policy, ModelConfig(path=str(policy))))
    transcripts = list(_transcripts(files))
    messages, prompts = _first_prompts(transcripts, renderer)
    responses = _record(policy, prompts, renderer, max(caps), ends=True)
    paths = {}
    shared: dict[str, Any] = {"policy": str(policy), "reward": str(reward)}
    for cap in caps:
        cut = [response[:cap] for response in responses]
        work = Workload(
            name=f"cap{cap}", cap=cap, fixed=False, messages=messages, prompts=prompts, responses=cut, **shared
        )
        paths[work.name] = folder / f"{work.name}.json"
        work.save(paths[work.name])
    messages, prompts = _trimmed_prompts(transcripts, renderer)
    responses = _record(policy, prompts, renderer, FIXED, ends=False)
    work = Workload(
        name="fixed", cap=FIXED, fixed=True, messages=messages, prompts=prompts, responses=responses, **shared
    )
    paths["fixed"] = folder / "fixed.json"
    work.save(paths["fixed"])
    return paths


def _write_models(model: Path, policy: Path, reward: Path) -> None:
    """fp32 copies: the policy, and a reward model of the same shape with a random head (its scores need no meaning)."""
    for path, auto, options in (
        (policy, AutoModelForCausalLM, {}),
        (reward, AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        auto.from_pretrained(model, dtype=torch.float32, **options).save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(model / name, path / name)


def _transcripts(files: list[Path]) -> Iterator[Messages]:
    """The prompts of an HH file, in order, each once."""
    seen: set[str] = set()
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    (prompt,) = HHText().parse(json.loads(line), "prompt")
                except (Dirty, Malformed):
                    continue
                if (key := json.dumps(prompt.messages)) not in seen:
                    seen.add(key)
                    yield prompt.messages


def _first_prompts(transcripts: list[Messages], renderer: Renderer) -> tuple[list[Messages], list[list[int]]]:
    """The first PROMPTS prompts of at most MAX_PROMPT tokens."""
    found: dict[tuple[int, ...], Messages] = {}
    for messages in transcripts:
        ids = renderer.prompt_ids(messages)
        if len(ids) <= MAX_PROMPT and len(found) < PROMPTS:
            found.setdefault(tuple(ids), messages)
    return list(found.values()), [list(ids) for ids in found]


def _trimmed_prompts(transcripts: list[Messages], renderer: Renderer) -> tuple[list[Messages], list[list[int]]]:
    """PROMPTS prompts of exactly FIXED tokens: the text of a conversation as one message, its end cut off."""
    found: dict[tuple[int, ...], Messages] = {}
    for messages in transcripts:
        text = "\n".join(message["content"] for message in messages)[: 8 * FIXED]
        cuts = [[{"role": "user", "content": text[:n]}] for n in range(1, len(text) + 1)]
        place = bisect_left(cuts, FIXED, key=lambda cut: len(renderer.prompt_ids(cut)))
        ids = renderer.prompt_ids(cuts[place]) if place < len(cuts) else []
        if len(ids) == FIXED:  # not every length is met: one more letter can be two more tokens
            found.setdefault(tuple(ids), cuts[place])
        if len(found) == PROMPTS:
            break
    return list(found.values()), [list(ids) for ids in found]


def _record(policy: Path, prompts: list[list[int]], renderer: Renderer, cap: int, *, ends: bool) -> list[list[int]]:
    """One sampled response for each prompt, without the pad token, and without the end token unless `ends`."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    never = [renderer.pad_id] if ends else [renderer.pad_id, renderer.eos_id]

    def forbid(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(never), float("-inf"))

    model.get_output_embeddings().register_forward_hook(forbid)
    sampling = Sampling(temperature=1.0, max_new_tokens=cap, eos_id=renderer.eos_id)
    return [r.ids for r in generate(model, prompts, [seed_of(0, "frozen", i) for i in range(len(prompts))], sampling)]
