"""PPO's roles on DeepSpeed's ZeRO: each rank holds a part of the optimisers' state (ZeRO-1), of the gradients too (2),
of the weights too (3), those of the frozen reference among them.

Policy and critic have an engine each: DeepSpeed reduces gradients inside `backward`, and in one engine the second
role's would join the first's. Under ZeRO-3 what is only read (a rollout, the reference, values) is read under one
gather of the whole model, with no hook of DeepSpeed's in it: no collective then, and the same bits as on one rank.
Training goes layer by layer. With LoRA it is the shared frozen base that is cut up; the adapters, a few percent of it,
stay whole, and ZeRO-2 takes their gradients and Adam's state.

Checkpoints hold whole weights and each rank's part of Adam's state, not DeepSpeed's own files, which are pickles.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.adapters import RoleModel, SharedBase
from rlhf.config import EngineKind
from rlhf.engine.deepspeed import choose_backend, share_master_weights, trainer_config
from rlhf.engine.ppo import Weights, check_names, copied, fill
from rlhf.engine.ranks import Ranks
from rlhf.last_layer import usable_blocks

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Shards:
    """Weights, gradients and optimiser states as ZeRO cuts them up."""

    lockstep = True  # ZeRO-2 reduces in every backward pass, ZeRO-3 gathers in every forward pass

    def __init__(self, kind: EngineKind, ranks: Ranks, *, mixed: bool) -> None:
        """mixed: passes in bf16 arithmetic, as torch.autocast has it around the stage."""
        choose_backend(kind)
        self.stage, self.kind, self.ranks = kind, kind.value, ranks
        self.mixed = mixed
        self.trainers: list[ShardTrainer] = []
        self.gathers = 0  # of whole models, since the start
        self._whole: set[int] = set()
        self._bases: list[Any] = []  # engines without an optimiser
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls

    def trainer(self, model: Any, rate: float, max_norm: float) -> ShardTrainer:
        usable_blocks(getattr(model, "body", model))
        shared = _shared_base(model) is not None
        config = self._config(max_norm, weights=not shared)
        trainer = ShardTrainer(model, rate, self.ranks, config)
        self.trainers.append(trainer)
        return trainer

    def _config(self, max_norm: float, *, weights: bool = True) -> dict[str, Any]:
        """weights: those of the model may be cut up; if not, ZeRO-3 becomes ZeRO-2."""
        cut = self.stage.zero < 3 or weights
        made = trainer_config(self.stage if cut else EngineKind.zero2, 1, 1, max_norm, bf16=False)
        if not cut and self.stage is EngineKind.zero3_offload:
            made["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        del made["train_batch_size"]  # it follows from the others
        # `step` ends the accumulation, after as many micro-batches as there were.
        made["managed_gradient_accumulation"] = False
        if self.mixed:  # DeepSpeed turns torch's autocast off unless it is its own; weights and gradients stay in fp32
            made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return made

    def freeze(self, model: Any) -> None:
        if self.stage.zero < 3:
            return
        import deepspeed

        usable_blocks(model)

        config, base = self._config(0.0), _shared_base(model)
        if base is not None:
            # Policy and critic are trained through it, layer by layer: it needs the hooks, which an engine sets.
            with _without_adapters(base):
                engine, *_ = deepspeed.initialize(model=base.model, config=config, dist_init_required=False)
            self._bases.append(engine)
            return
        deepspeed.zero.Init(
            module=model, config_dict_or_path=config, dtype=next(model.parameters()).dtype,
            remote_device=config["zero_optimization"].get("offload_param", {}).get("device"),
        )  # fmt: skip

    @contextmanager
    def whole(self, model: Any) -> Iterator[None]:
        if not isinstance(model, nn.Module):  # a reward, which may have a model on the shared base
            model = getattr(model, "model", None)
        if not isinstance(model, nn.Module):
            yield
            return
        base = _shared_base(model)
        root = model if base is None else base.model
        if self.stage.zero < 3 or id(root) in self._whole or not any(hasattr(p, "ds_id") for p in root.parameters()):
            with _without_hooks(root):
                yield
            return
        self._whole.add(id(root))
        self.gathers += 1
        try:
            with _without_hooks(root), _gathered(root):
                yield
        finally:
            self._whole.discard(id(root))

    def weights(self, model: nn.Module) -> Weights:
        with _gathered(model):
            return copied(model) if self.ranks.is_main else {}

    def put(self, model: nn.Module, weights: Weights, what: str) -> None:
        check_names(self.ranks, model, weights, what)
        with _gathered(model, writer=0):
            fill(self.ranks, model, weights)
        for trainer in self.trainers:
            if trainer.module is model:
                trainer.engine.optimizer.refresh_fp32_params()


class ShardTrainer:
    """AdamW on a model that DeepSpeed has cut up."""

    def __init__(self, model: nn.Module, rate: float, ranks: Ranks, config: dict[str, Any]) -> None:
        import deepspeed

        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )  # fmt: skip
        share_master_weights(self.engine.optimizer)
        self.module, self.model, self.ranks = model, self.engine, ranks

    def set_rate(self, rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.ranks.size)  # DeepSpeed takes the mean over the ranks

    def step(self) -> tuple[float, str]:
        self.engine.step()  # skips itself where the norm is not finite
        norm = float(self.engine.get_global_grad_norm())
        return norm, "" if math.isfinite(norm) else "norm"

    def discard(self) -> None:
        """What DeepSpeed does with a gradient that has overflowed."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_overflow_clean_up"):
            optimizer._overflow_clean_up(1.0)
            return
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in kept:
                kept[group] = None

    def state(self) -> list[dict[str, Tensor]]:
        """Adam's state of this rank's part, group by group."""
        held = self.engine.optimizer.optimizer.state
        return [{name: value.detach().cpu() for name, value in held[flat].items()} for flat in self._parts()]

    def load_state(self, state: list[dict[str, Tensor]]) -> None:
        held = self.engine.optimizer.optimizer.state
        for flat, stored in zip(self._parts(), state, strict=True):
            held[flat] = {name: value.to(flat.device if value.ndim else "cpu") for name, value in stored.items()}

    def _parts(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        name = "fp32_partitioned_groups_flat" if self.engine.zero_optimization_partition_weights() else (
            "single_partition_of_fp32_groups"
        )  # fmt: skip
        parts: list[Tensor] = getattr(optimizer, name)
        return parts


@contextmanager
def _gathered(model: nn.Module, writer: int | None = None) -> Iterator[None]:
    """All weights of the model, if they are cut up, on every rank; afterwards those that rank `writer` has left."""
    import deepspeed

    cut: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    for p in cut:
        p.ds_active_sub_modules.clear()
    with deepspeed.zero.GatheredParameters(cut, modifier_rank=writer, enabled=bool(cut)):
        yield


def _shared_base(model: Any) -> SharedBase | None:
    """The base that a role with LoRA, its critic or a reward model on it computes with."""
    role = model if isinstance(model, RoleModel) else getattr(model, "body", None)
    return role.base if isinstance(role, RoleModel) else None


@contextmanager
def _without_adapters(base: SharedBase) -> Iterator[None]:
    """The base as a model without adapters, for who looks at its parameters."""
    kept = [(layer, name) for layer in base.layers for name in layer.adapter_layer_names if name in layer._modules]
    modules = [layer._modules.pop(name) for layer, name in kept]
    try:
        yield
    finally:
        for (layer, name), module in zip(kept, modules, strict=True):
            layer._modules[name] = module


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """No hook of the model's modules runs inside: DeepSpeed's would release a weight after its first use."""
    kept = [(module, name, getattr(module, name)) for module in model.modules() for name in HOOKS]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
