"""PPOTrainer of TRL 1.12 on the shapes of gpu.py."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

import torch
from gpu import ALPHA, RANK, Shapes, _one_label, _prompts
from transformers import (
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)


class Enough(Exception):
    """All updates were made."""


def measure(shape: Shapes, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of an update after the first, and the share of generation."""
    sys.path.insert(0, args.trl)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl.experimental.ppo.ppo_trainer as trl_ppo

    laps: list[tuple[float, float]] = []  # seconds, and those of them that generated
    state = {"start": 0.0, "generated": 0.0}
    generate = trl_ppo.batch_generation

    def timed_generation(*given: Any, **named: Any) -> Any:
        out = generate(*given, **named)
        _settle(args.device)
        state["generated"] = time.perf_counter()
        return out

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            state["start"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _settle(args.device)
            now = time.perf_counter()
            laps.append((now - state["start"], state["generated"] - state["start"]))
            state["start"] = now
            if len(laps) == args.updates + 1:
                raise Enough

    trl_ppo.batch_generation = timed_generation
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(trl_ppo, shape, args, folder)
        trainer.add_callback(Laps())
        try:
            trainer.train()
        except Enough:
            seconds, generated = sorted(laps[1:])[args.updates // 2]
    return {
        "system": "trl lora" if args.lora else "trl full", "pairs_per_second": args.batch / seconds,
        "generation_share": generated / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device != "cpu" else None,
    }  # fmt: skip


def build(trl_ppo: Any, shape: Shapes, args: argparse.Namespace, folder: str) -> Any:
    """The trainer: fp32 weights, bf16 arithmetic, no recomputation; one epoch of one minibatch, as in gpu.py."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig

    torch.manual_seed(0)
    policy, reference = OPTForCausalLM(shape.policy), OPTForCausalLM(shape.policy)
    reference.load_state_dict(policy.state_dict())
    reward, value = (OPTForSequenceClassification(_one_label(shape.small)) for _ in range(2))
    peft_config = None
    if args.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.generation_config.pad_token_id = 1
    cpu = args.device == "cpu"
    micro = min(args.batch, max(1, args.micro_tokens // (2 * shape.tokens)))
    config = PPOConfig(
        output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=args.batch // micro,
        num_mini_batches=1, num_ppo_epochs=1, local_rollout_forward_batch_size=args.batch,
        total_episodes=args.batch * 1000, num_sample_generations=0, response_length=shape.tokens, temperature=1.0,
        bf16=not cpu, use_cpu=cpu, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return trl_ppo.PPOTrainer(
        args=config, processing_class=_tokenizer(shape.policy.vocab_size), model=policy,
        ref_model=None if args.lora else reference, reward_model=reward, value_model=value, peft_config=peft_config,
        train_dataset=Dataset.from_dict({"input_ids": _prompts(shape, args.batch)}),
    )  # fmt: skip


def _tokenizer(size: int) -> Any:
    """Never asked to tokenize: only its pad and end ids are used."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t2", padding_side="left")


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
