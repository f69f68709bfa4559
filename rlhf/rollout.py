"""Sampling responses: our own decode loop over `forward` and a cache.

`generate()` of transformers can neither drop finished rows nor take noise of its own for each row, so the loop is here.
A response depends on its prompt, its seed and the weights, never on its neighbours: each sample draws Gumbel noise from
a generator of its own, and argmax(log p + noise) is a sample of p (Gumbel-max: Maddison et al., 1411.0030).

Shapes: B rows, T tokens of a padded row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.decode_step import DecodeStep, decode_step
from rlhf.kv_cache import fill_holes, make_cache
from rlhf.last_layer import last_layer_at
from rlhf.logprobs import evaluating, widen
from rlhf.recorded import RecordedSteps, recorded_steps

NOISE_STEPS, NOISE_BLOCK = 8, 1 << 16  # what a generator draws ahead, steps and numbers: part of what a seed means


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 takes the likeliest token; `group` rows are decoded together."""

    temperature: float
    max_new_tokens: int
    eos_id: int
    group: int = 64


@dataclass(kw_only=True, slots=True)
class Response:
    """Sampled token ids, the end token included if it came; `logprobs` at the sampling temperature; `finished` is False
    for a response that was cut at `max_new_tokens`."""

    ids: list[int]
    logprobs: list[float]
    finished: bool


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2**63) that is a stable hash of `parts`, e.g. (run seed, update, sample id)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generate(model: Any, prompts_ids: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
    """Sample one response for each prompt, in the order given. `seeds[i]` alone decides the noise of sample i."""
    out: list[Response | None] = [None] * len(prompts_ids)
    with torch.inference_mode(), evaluating(model):
        steps = _steps_for(model, prompts_ids, sampling)
        for group in decode_groups([len(ids) for ids in prompts_ids], sampling.group):
            given = [prompts_ids[i] for i in group], [seeds[i] for i in group]
            decoded = _Decoder(model, *steps, *given, sampling).run()
            for i, response in zip(group, decoded, strict=True):
                out[i] = response
    return [response for response in out if response is not None]


def stream(model: Any, prompt_ids: list[int], seed: int, sampling: Sampling) -> Iterator[int]:
    """The ids of the response that `generate` gives for this prompt and seed, each as it is sampled."""
    with torch.inference_mode(), evaluating(model):
        steps = _Decoder(model, *_steps_for(model, [prompt_ids], sampling), [prompt_ids], [seed], sampling).steps()
    while True:
        with torch.inference_mode(), evaluating(model):  # not while the caller holds a token
            sampled = next(steps, None)
        if sampled is None:
            return
        yield sampled[0]


def _steps_for(
    model: Any, prompts_ids: Sequence[list[int]], sampling: Sampling
) -> tuple[DecodeStep | None, RecordedSteps | None]:
    """The short cuts that may be taken past the first token of these responses."""
    step = decode_step(model)
    tokens = max((len(ids) for ids in prompts_ids), default=0) + sampling.max_new_tokens
    return step, recorded_steps(model, step, min(len(prompts_ids), sampling.group), tokens)


def decode_groups(lengths: Sequence[int], group: int) -> list[list[int]]:
    """Places in `lengths` (of prompts) in groups of `group`, the shortest prompts first. Groups taken out of these, in
    order, are grouped the same way again: all but the very last are full."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[start : start + group] for start in range(0, len(order), group)]


class _Noise:
    """Gumbel noise for one row, drawn a block of steps ahead. fp64, since fp32 uniforms cut off the tail at 16.6.

    Drawn where it is used: a CPU would take longer over a large vocabulary than a GPU over the model.
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.shape = (max(1, min(NOISE_STEPS, NOISE_BLOCK // vocabulary)), vocabulary)

    def block(self) -> Tensor:
        uniform = torch.rand(
            self.shape, generator=self.generator, dtype=torch.float64, device=self.generator.device
        )  # fmt: skip
        return uniform.log_().neg_().log_().neg_()


class _Decoder:
    """One decode group: prompts padded on the left, rows leave as they finish."""

    def __init__(
        self, model: Any, step: DecodeStep | None, recorded: RecordedSteps | None, prompts: Sequence[list[int]],
        seeds: Sequence[int], sampling: Sampling,
    ) -> None:  # fmt: skip
        self.model, self.step, self.recorded, self.sampling = model, step, recorded, sampling
        self.device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        place_T = torch.arange(longest, device=self.device)
        start_B1 = (longest - lengths_B).unsqueeze(1)
        # Masks come from lengths, never from `ids != pad`: the pad token may be a real one.
        self.mask_BT = (place_T >= start_B1).long()
        self.position_BT = (place_T - start_B1).clamp(min=0)
        self.padded = longest > min(len(prompt) for prompt in prompts)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.cache = make_cache(model) if recorded is None else recorded.cache()
        self.prompts = prompts
        self.rows = list(range(len(prompts)))  # the row of the group that each row of the batch is
        self.seeds = list(seeds)
        self.noise: list[_Noise] = []
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.finished = [False] * len(prompts)

    def run(self) -> list[Response]:
        for _ in self.steps():
            pass
        triples = zip(self.ids, self.logprobs, self.finished, strict=True)
        return [Response(ids=ids, logprobs=logprobs, finished=finished) for ids, logprobs, finished in triples]

    def steps(self) -> Iterator[list[int]]:
        """Sample a token for each row that is left, and again until none is; the tokens of each step."""
        for step in range(self.sampling.max_new_tokens):
            logits_BV = widen(self._forward())
            if self.sampling.temperature > 0:
                logits_BV = logits_BV / self.sampling.temperature
            logp_BV = logits_BV.log_softmax(-1)
            token_B = self._choose(step, logp_BV)
            logp_B = logp_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
            tokens, logprobs = token_B.tolist(), logp_B.tolist()
            for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
                self.ids[row].append(token)
                self.logprobs[row].append(logprob)
                self.finished[row] = token == self.sampling.eos_id
            left = self._advance(token_B, tokens)
            yield tokens
            if not left:
                return

    def _forward(self) -> Tensor:
        if self.ids_BT.shape[1] == 1 and self.cache.get_seq_length():
            if self.recorded is not None:
                return self.recorded(self.ids_BT, self.position_BT, self.mask_BT.shape[1] - 1)
            if self.step is not None:
                mask_BT = self.mask_BT if self.padded else None
                return self.step(self.ids_BT, self.position_BT, mask_BT, self.cache)[:, -1]
        extra: dict[str, Any] = {}
        if self.padded:
            extra["attention_mask"] = self.mask_BT
        if self.takes_positions:
            extra["position_ids"] = self.position_BT
        rows, width = self.ids_BT.shape
        last_B = torch.arange(1, rows + 1, device=self.device) * width - 1
        with last_layer_at(self.model, last_B) if width > 1 else nullcontext():
            out = self.model(
                input_ids=self.ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **extra
            )  # fmt: skip
        logits: Tensor = out.logits[:, -1]
        return logits

    def _choose(self, step: int, logp_BV: Tensor) -> Tensor:
        """The next token of each row that is left."""
        return (logp_BV if self.sampling.temperature == 0 else logp_BV + self._noise(step, logp_BV)).argmax(-1)

    def _noise(self, step: int, like_BV: Tensor) -> Tensor:
        if not self.noise:
            self.noise = [_Noise(seed, like_BV.shape[1], self.device) for seed in self.seeds]
        at = step % self.noise[0].shape[0]
        if at == 0:
            self.block_BSV = torch.stack([self.noise[row].block() for row in self.rows]).to(like_BV)
        return self.block_BSV[:, at]

    def _advance(self, token_B: Tensor, tokens: list[int]) -> bool:
        """Drop the rows that have just finished and set up the next step; False when none is left."""
        keep = fill_holes([i for i, token in enumerate(tokens) if token != self.sampling.eos_id])
        if not keep:
            return False
        position_B1 = self.position_BT[:, -1:] + 1
        if len(keep) < len(tokens):
            keep_K = torch.tensor(keep, device=self.device)
            (self.recorded or self.cache).batch_select_indices(keep_K)
            token_B, position_B1, self.mask_BT = token_B[keep_K], position_B1[keep_K], self.mask_BT[keep_K]
            self.rows = [self.rows[i] for i in keep]
            if self.sampling.temperature > 0:
                self.block_BSV = self.block_BSV[keep_K]
        self.ids_BT, self.position_BT = token_B.unsqueeze(1), position_B1
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(keep), 1)], 1)
        return True
