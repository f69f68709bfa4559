"""One process of the comparison: PPOTrainer of TRL 1.12, update by update, on a frozen workload."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # part of the floor
from frozen import Replay, Workload
from process import BATCH, EPOCHS, LORA_ALPHA, LORA_RANK, Channel, Settings

SETTINGS = Settings(**json.loads(sys.argv[1]))
sys.path.insert(0, SETTINGS.trl)
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl.experimental.ppo.ppo_trainer as trl_ppo  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


def main() -> None:
    channel = Channel()
    torch.set_num_threads(SETTINGS.threads)
    if SETTINGS.lora:
        import peft  # noqa: F401
    work = Workload.load(Path(SETTINGS.workload))
    channel.imported()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(work, folder)
        watch = Watch(channel)
        trainer.add_callback(watch)
        watch.split()
        if SETTINGS.check:
            capture(trainer, work)
        else:
            trainer.train()


def build(work: Workload, folder: str) -> PPOTrainer:
    """The trainer in fp32, without recomputation, logging or saving; fused AdamW is its default."""
    tokenizer = AutoTokenizer.from_pretrained(work.policy, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(work.policy)
    reward, value = (AutoModelForSequenceClassification.from_pretrained(work.reward) for _ in range(2))
    torch.nn.init.zeros_(value.score.weight)
    peft_config = None
    if SETTINGS.lora:
        from peft import LoraConfig, inject_adapter_in_model

        peft_config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        on_value = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=linear_names(value))
        inject_adapter_in_model(on_value, value)
        value.score.requires_grad_(True)
    args = PPOConfig(
        output_dir=folder, per_device_train_batch_size=SETTINGS.micro_batch,
        gradient_accumulation_steps=BATCH // SETTINGS.micro_batch, num_mini_batches=1, num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=SETTINGS.chunk, total_episodes=BATCH * 10_000, num_sample_generations=0,
        response_length=work.cap, stop_token=None if work.fixed else "eos", temperature=1.0, kl_coef=0.05,
        missing_eos_penalty=None, vf_coef=1.0, learning_rate=SETTINGS.learning_rate, lr_scheduler_type="constant",
        bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": work.prompts})
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy,
        ref_model=None if SETTINGS.lora else AutoModelForCausalLM.from_pretrained(work.policy), reward_model=reward,
        train_dataset=data, value_model=value, peft_config=peft_config,
    )  # fmt: skip
    # The prompts in their order: the trainer's own loader shuffles.
    trainer.dataloader = DataLoader(data, batch_size=BATCH, collate_fn=trainer.data_collator)
    replay(trainer.policy_model, work, tokenizer.eos_token_id)
    return trainer


def linear_names(model: Any) -> list[str]:
    """Every linear layer but the head, as "all-linear" takes them for the policy."""
    named = (name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    return sorted({name for name in named if name != "score"})


def replay(policy: Any, work: Workload, eos_id: int) -> None:
    """Put the recorded tokens in the place of those that `generate` draws; the drawing still happens."""
    recorded, generate, draw = Replay(work, eos_id), policy.generate, torch.multinomial
    rows: list[tuple[int, ...]] = []
    step = 0

    def replayed_generate(**named: Any) -> Any:
        nonlocal rows, step
        pairs = zip(named["input_ids"], named["attention_mask"], strict=True)
        rows, step = [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs], 0
        return generate(**named)

    def replayed_draw(probabilities: torch.Tensor, num_samples: int, **named: Any) -> torch.Tensor:
        nonlocal step
        draw(probabilities, num_samples, **named)
        step += 1
        return torch.tensor([[recorded.token(row, step - 1)] for row in rows], device=probabilities.device)

    policy.generate = replayed_generate
    torch.multinomial = replayed_draw


class Watch(TrainerCallback):
    """Holds each update until the parent says so, and tells what it took."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.start = self.generated = self.scored = 0.0

    def split(self) -> None:
        """Note when generation and when scoring ends: after the only calls of these two functions."""
        generate, whiten = trl_ppo.batch_generation, trl_ppo.masked_whiten

        def timed_generation(*args: Any, **named: Any) -> Any:
            out = generate(*args, **named)
            self.generated = time.perf_counter()
            return out

        def timed_whiten(*args: Any, **named: Any) -> Any:
            out = whiten(*args, **named)
            self.scored = time.perf_counter()
            return out

        trl_ppo.batch_generation, trl_ppo.masked_whiten = timed_generation, timed_whiten

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._hold()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.channel.report(
            {
                "seconds": now - self.start, "generate": self.generated - self.start,
                "score": self.scored - self.generated, "train": now - self.scored,
            }
        )  # fmt: skip
        self._hold()

    def _hold(self) -> None:
        if not SETTINGS.check and not self.channel.wait():
            sys.exit(0)
        self.start = time.perf_counter()


class Enough(Exception):
    """One update was made."""


def capture(trainer: PPOTrainer, work: Workload) -> None:
    """One update, and what it computed, into the file that `check` names: lists in the order of the prompts."""
    seen: dict[str, list[torch.Tensor]] = {"logprob": [], "get_reward": [], "masked_whiten": []}
    for name, function in (("logprob", "selective_log_softmax"), ("get_reward",) * 2, ("masked_whiten",) * 2):
        setattr(trl_ppo, function, _kept(getattr(trl_ppo, function), seen[name]))
    logged: dict[str, float] = {}

    def log(metrics: dict[str, float], *_: Any) -> None:
        logged.update(metrics)
        raise Enough

    trainer.log = log
    with suppress(Enough):
        trainer.train()
    chunks = BATCH // SETTINGS.chunk  # of each: log-probs and reference in turn, values and scores in turn
    width = max(map(len, work.prompts[:BATCH]))
    lengths = [len(response) for response in work.responses[:BATCH]]

    def rows(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [row[:n].float() for row, n in zip((r for part in parts for r in part), lengths, strict=True)]

    logprobs, rewards = seen["logprob"][: 2 * chunks], seen["get_reward"]
    torch.save(
        {
            "logp": rows(logprobs[0::2]), "reference": rows(logprobs[1::2]),
            "values": rows([full[:, width - 1 : -1].squeeze(-1) for full, _, _ in rewards[0::2]]),
            "scores": torch.cat([score for _, score, _ in rewards[1::2]]), "advantages": rows(seen["masked_whiten"]),
            "losses": (logged["loss/policy_avg"], logged["loss/value_avg"]),
        },
        SETTINGS.check,
    )  # fmt: skip


def _kept(function: Any, into: list[Any]) -> Any:
    def wrapped(*args: Any, **named: Any) -> Any:
        out = function(*args, **named)
        into.append(out.detach().clone() if isinstance(out, torch.Tensor) else out)
        return out

    return wrapped


if __name__ == "__main__":
    main()
