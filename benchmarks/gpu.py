"""DeepSpeed-Chat's step-3 shape on one GPU: pairs (prompt and response) a second, and where the time goes.

    python benchmarks/gpu.py                      on a CUDA GPU: a policy and a reference shaped as OPT-1.3B, a critic
                                                  and a reward as OPT-350M, random weights, 256 + 256 tokens
    python benchmarks/gpu.py --lora               policy, reference and critic on one OPT-1.3B base
    python benchmarks/gpu.py --trl /some/folder   PPOTrainer of TRL 1.12 (pip install --no-deps --target ...) instead;
                                                  that one needs accelerate and datasets too
    python benchmarks/gpu.py --tiny --device cpu  the same code on toy shapes: a smoke test, no measurement

Ours needs torch, transformers and peft alone. Nothing ends before 256 tokens: both systems sample and train on the same
number of tokens, one epoch, one minibatch. Weights are fp32 and arithmetic bf16, in both. The bandwidth floor of a
decode step is the time to read the policy's weights (in bf16) and the key-value cache (at its mean length) once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from rlhf.adapters import SharedBase
from rlhf.config import KlConfig, LoraConfig, PpoConfig, Schedule
from rlhf.ppo.episodes import Episode, compare, estimate
from rlhf.ppo.roles import Roles, add_critic, assemble, share
from rlhf.ppo.update import Learner
from rlhf.rollout import Sampling, generate, seed_of
from rlhf.scoring import score_ids
from rlhf.types import Prompt

NEVER = -1  # no token has this id: nothing ends
RANK, ALPHA = 16, 32


@dataclass(kw_only=True, slots=True)
class Shapes:
    policy: OPTConfig
    small: OPTConfig  # of critic and reward
    tokens: int  # of a prompt, and of a response


def shapes(tiny: bool) -> Shapes:
    """OPT-1.3B and OPT-350M (Zhang et al. 2205.01068, table 1), or toys."""
    if tiny:
        toy = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
        policy, small = (OPTConfig(hidden_size=w, ffn_dim=2 * w, word_embed_proj_dim=w, **toy) for w in (16, 8))
        return Shapes(policy=policy, small=small, tokens=8)
    policy = OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    )
    small = OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )  # fmt: skip
    return Shapes(policy=policy, small=small, tokens=256)


class Stopwatch:
    """Seconds of each part of an update; on a GPU after its queue is empty."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.laps = device, dict[str, float]()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        self._settle()
        start = time.perf_counter()
        out = work()
        self._settle()
        self.laps[name] = time.perf_counter() - start
        return out

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Ours:
    """Policy, reference, critic and reward, and one update of them through the stage's own parts."""

    def __init__(self, shape: Shapes, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device, self.tokens = torch.device(args.device), shape.tokens
        lora = LoraConfig(enabled=args.lora, r=RANK, alpha=ALPHA)
        self.cfg = PpoConfig(
            updates=1000, batch=args.batch, minibatch=args.batch, epochs=1, micro_tokens=args.micro_tokens,
            decode_group=args.batch, max_new_tokens=shape.tokens, schedule=Schedule.constant, kl=KlConfig(coef=0.05),
            lora=lora,
        )  # fmt: skip
        policy = OPTForCausalLM(shape.policy).to(self.device).eval()
        self.reward = OPTForSequenceClassification(_one_label(shape.small)).to(self.device).eval()
        self.roles = self._roles(policy, shape, lora)
        self.learner = Learner(self.roles, self.cfg, 0)
        self.prompts = _prompts(shape, args.batch)

    def _roles(self, policy: Any, shape: Shapes, lora: LoraConfig) -> Roles:
        if not lora.enabled:
            body = OPTForSequenceClassification(_one_label(shape.small)).model.to(self.device)
            return assemble(policy, body)
        roles = share(SharedBase(policy, "random"), lora, 0)
        add_critic(roles, lora, 0)
        return roles

    def update(self, number: int) -> dict[str, float]:
        watch = Stopwatch(self.device)
        episodes = watch.time("generate", lambda: self.sample(number, self.tokens))
        watch.time("score", lambda: self._score(episodes, number))
        watch.time("train", lambda: self._train(episodes, number))
        return watch.laps

    def sample(self, number: int, new_tokens: int) -> list[Episode]:
        sampling = Sampling(1.0, new_tokens, NEVER, self.cfg.decode_group)
        seeds = [seed_of(0, number, i) for i in range(len(self.prompts))]
        responses = generate(self.roles.policy, self.prompts, seeds, sampling)
        return [
            Episode(
                prompt=Prompt(messages=[], id=str(i)), prompt_ids=ids, ids=response.ids, finished=False, text="",
                logp=torch.tensor(response.logprobs),
            )
            for i, (ids, response) in enumerate(zip(self.prompts, responses, strict=True))
        ]  # fmt: skip

    def _score(self, episodes: Sequence[Episode], number: int) -> None:
        scores = score_ids(self.reward, [e.prompt_ids + e.ids for e in episodes], self.cfg.micro_tokens)
        for episode, value in zip(episodes, scores, strict=True):
            episode.score = value
        compare(episodes, self.roles, self.cfg, number)

    def _train(self, episodes: Sequence[Episode], number: int) -> None:
        self.learner.appraise(episodes, number)
        estimate(episodes, self.cfg, self.cfg.kl.coef)
        self.learner.learn(episodes, number)


def _one_label(config: OPTConfig) -> OPTConfig:
    config.num_labels, config.pad_token_id = 1, 1
    return config


def _prompts(shape: Shapes, batch: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(4, shape.policy.vocab_size, (batch, shape.tokens), generator=draw).tolist()


def floor_of_a_step(shape: Shapes, batch: int, bandwidth: float) -> float:
    """Seconds to read bf16 weights and cache once, at `bandwidth` bytes a second."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in OPTForCausalLM(shape.policy).parameters())
    length = shape.tokens * 1.5  # of prompt and response so far, on average
    cache = 2 * shape.policy.num_hidden_layers * shape.policy.hidden_size * batch * length
    return 2 * (weights + cache) / bandwidth


def measure(shape: Shapes, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the updates after the first, our system."""
    ours = Ours(shape, args)
    device = ours.device
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        laps = [ours.update(number) for number in range(1, args.updates + 2)][1:]
        watch = Stopwatch(device)
        watch.time("prefill", lambda: ours.sample(0, 1))
    middle = {name: sorted(lap[name] for lap in laps)[len(laps) // 2] for name in laps[0]}
    seconds = sum(middle.values())
    step = (middle["generate"] - watch.laps["prefill"]) / (shape.tokens - 1)
    return {
        "system": "lora" if args.lora else "full", "pairs_per_second": args.batch / seconds,
        "generation_share": middle["generate"] / seconds, **{f"{name}_seconds": s for name, s in middle.items()},
        "decode_step_ms": 1e3 * step, "floor_share": floor_of_a_step(shape, args.batch, args.bandwidth * 1e9) / step,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch", type=int, default=64, help="pairs an update")
    parser.add_argument("--updates", type=int, default=3, help="counted ones; one more comes first")
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--bandwidth", type=float, default=4800, help="of the device's memory, GB/s (H200: 4800)")
    parser.add_argument("--trl", help="folder that TRL 1.12.0 was installed into: measure that instead")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("not run: PyTorch sees no GPU here (--tiny --device cpu tries the code)")
    shape = shapes(args.tiny)
    if args.trl:
        from gpu_trl import measure as measure_trl

        found = measure_trl(shape, args)
    else:
        found = measure(shape, args)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
