"""The supervised trainers on DeepSpeed: its configuration, and the few questions that only it can answer.

The Hugging Face Trainer drives it (`TrainingArguments(deepspeed=...)`). Three things are kept away from the rest of the
program: its configuration is global while a trainer lives, and `from_pretrained` then calls collectives; weights that
it has cut up read as empty tensors; and it steps inside `backward`, before any callback of the Trainer.

With bf16 the weights that are trained are in float32 and cut up with the optimiser's state; the model holds a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import EngineKind
from rlhf.engine.ranks import Ranks

SWITCH = "ACCELERATE_USE_DEEPSPEED"  # left set by a trainer on DeepSpeed, it silently puts the next one on it too
BUCKET = 20_000_000  # numbers that are sent at a time; two such buffers are held


def choose_backend(kind: EngineKind) -> None:
    """To be called before a trainer is made: with DeepSpeed or without."""
    os.environ.pop(SWITCH, None)
    if not kind.zero:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed.ops

    # Else the first job of several CPU ranks compiles a collective in shared memory, for a minute, to the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def trainer_config(kind: EngineKind, micro: int, accumulation: int, max_norm: float, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for `TrainingArguments`, whose own values it has to repeat.

    micro: rows of a forward pass on one rank; accumulation: passes of an update; max_norm: 0 does not clip.
    """
    zero: dict[str, Any] = {"stage": kind.zero, "overlap_comm": False, "reduce_bucket_size": BUCKET}
    if kind.zero < 3:
        zero |= {"allgather_bucket_size": BUCKET}
    else:
        zero |= {
            "stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": 5 * BUCKET,
            "stage3_max_reuse_distance": 5 * BUCKET, "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": False,
        }  # fmt: skip
    if kind is EngineKind.zero3_offload:
        pinned = torch.cuda.is_available()
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": pinned},
                 "offload_param": {"device": "cpu", "pin_memory": pinned}}  # fmt: skip
    return {
        "zero_optimization": zero, "bf16": {"enabled": bf16}, "gradient_clipping": max_norm,
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "train_batch_size": "auto", "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 31,
    }  # fmt: skip


def share_master_weights(optimizer: Any) -> None:
    """Under ZeRO-3 in float32 DeepSpeed steps on one copy of a rank's weights and computes with another of the same
    numbers: let them be one. It means to do so itself, but compares a device with a device's name.

    ZeRO-1 and 2 keep their copy, since DeepSpeed has given out views of it by now.
    """
    if not hasattr(optimizer, "fp32_partitioned_groups_flat") or optimizer.offload_optimizer:
        return
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
    for stepped, computed in pairs:
        if (stepped.dtype, stepped.device) == (computed.dtype, computed.device):
            stepped.data = computed.data


def close_deepspeed(trainer: Any) -> None:
    """Let go of the trainer's engine, so that models are loaded whole again."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if trainer.deepspeed is not None:
        trainer.deepspeed.destroy()
    trainer.accelerator.free_memory()
    trainer.deepspeed = trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    unset_hf_deepspeed_config()
    os.environ.pop(SWITCH, None)


def gradient_norm(engine: Any) -> float:
    """The norm over all ranks, before clipping, of the gradient that was just stepped with."""
    norm = engine.get_global_grad_norm()
    return float(norm)


def trained_weights(model: nn.Module, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 CPU copy of each trained parameter, whole. Every rank takes part; rank 0 alone gets them."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if ranks.is_main:
                yield name, whole.detach().to("cpu", torch.float32, copy=True).contiguous()
