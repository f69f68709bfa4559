"""What the two supervised stages share on top of the Hugging Face Trainer: updates, log, evaluation, ranks, engine.

The Trainer keeps its loop, optimiser, schedule and checkpoint files. Four of its habits are replaced:
- its checkpoints are written in place, and one that is torn is resumed from without a word (`rlhf.checkpoints`);
- on several ranks it repeats rows until they come out even: here an update is the same rows on any number of ranks
  (`rlhf.sharing`), and its loss the mean over what they hold together;
- it averages logged losses since the last log, so that a resumed run logs other numbers: here each is of one update;
- a loss that is not finite is hidden: here it stops the run before the update is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from rlhf import pulse
from rlhf.checkpoints import finish_checkpoint, load_best, read_best, save_best
from rlhf.config import Dtype, EngineKind, ModelConfig, OptimConfig, Schedule, shared_batch
from rlhf.console import Bar, progress
from rlhf.engine.deepspeed import (
    choose_backend,
    close_deepspeed,
    gradient_norm,
    share_master_weights,
    trainer_config,
)
from rlhf.errors import Preempted, TrainingError
from rlhf.sharing import Blank, Rows, SharedRows

if TYPE_CHECKING:
    from rlhf.context import Context

LOG_EVERY = 10  # updates
SCHEDULES = {
    Schedule.constant: "constant_with_warmup",
    Schedule.linear: "linear",
    Schedule.cosine: "cosine",
}
# The option was renamed, and TRL turns the old one on. Both are set where both exist.
CHECKPOINTING = {f.name for f in fields(TrainingArguments)} & {"activation_checkpointing", "gradient_checkpointing"}
Measure = Callable[[], dict[str, float]]  # held-out metrics; "loss" is what the best checkpoint is chosen by


@dataclass(kw_only=True, slots=True)
class Plan:
    """The arithmetic of a supervised run, fixed before it starts."""

    optim: OptimConfig
    engine: EngineKind
    seed: int
    rows: int
    micro: int  # rows of a forward pass on one rank
    accumulation: int  # passes of a full update
    updates_per_epoch: int
    updates: int
    eval_at: frozenset[int]


def make_plan(optim: OptimConfig, rows: int, seed: int, key: str, engine: EngineKind, ranks: int) -> Plan:
    """`optim.evals` evaluations, evenly spaced, the last one after the last update. `key`: of `optim`; ConfigError if a
    batch does not divide among the ranks."""
    per_epoch = math.ceil(rows / optim.batch)
    updates = math.ceil(optim.epochs * per_epoch)
    eval_at = frozenset(math.ceil(updates * i / optim.evals) for i in range(1, optim.evals + 1))
    micro, accumulation = shared_batch(optim.batch, optim.micro_batch, ranks, key)
    return Plan(
        optim=optim, engine=engine.on(ranks), seed=seed, rows=rows, micro=micro, accumulation=accumulation,
        updates_per_epoch=per_epoch, updates=updates, eval_at=eval_at,
    )  # fmt: skip


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """The same arguments for one device: with several GPUs in sight the Trainer would wrap the model in DataParallel,
    and an update would be of as many times more rows."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def trainer_options(plan: Plan, context: Context, model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments (and of TRL's SFTConfig, which is one).

    `model.dtype=bfloat16` means bf16 arithmetic over float32 weights: at usual learning rates an update is smaller
    than bf16 can add to a weight.
    """
    optim, bf16 = plan.optim, model.dtype is Dtype.bfloat16
    sharded: dict[str, Any] = {}
    choose_backend(plan.engine)
    if plan.engine.zero:
        sharded["deepspeed"] = trainer_config(plan.engine, plan.micro, plan.accumulation, optim.max_grad_norm, bf16)
    return {
        **sharded,
        "output_dir": str(context.folder / "checkpoints"),
        "per_device_train_batch_size": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "max_steps": plan.updates,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": math.ceil(optim.warmup * plan.updates),
        "weight_decay": optim.weight_decay,
        "adam_beta2": optim.adam_beta2,
        # Clipped in `Recorder`, which needs the norm; DeepSpeed clips itself, and wants to hear it twice.
        "max_grad_norm": optim.max_grad_norm if sharded else 0.0,
        "optim": "adamw_torch",
        "seed": plan.seed,
        "use_cpu": context.device.type == "cpu",
        "bf16": bf16,
        "fp16": False,
        **dict.fromkeys(CHECKPOINTING, model.activation_checkpointing),
        "eval_strategy": "no",  # when to evaluate, log and save is decided in `Recorder`
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


@dataclass(kw_only=True, slots=True)
class Loop:
    """What a trainer of ours carries beside the library's state."""

    plan: Plan
    context: Context
    measure: Measure
    lengths: list[int]  # of the rows, in tokens
    padded: bool  # a pass pads its rows to the longest of them
    blank: Blank
    beside: Callable[[], None] | None = None  # called at each update, for what is learnt beside the model
    loss: float = 0.0  # of the update that is being made, this rank's part until the update ends
    numbers: dict[str, float] = field(default_factory=dict)  # of the last update
    early: bool = False
    preempted: bool = False
    bar: Bar = field(default_factory=Bar)

    @property
    def best(self) -> Path:
        return self.context.folder / "checkpoints" / "best"


class Supervised:
    """Mixed in before a Trainer; `loop` is set before `train` is called."""

    loop: Loop
    args: Any
    model: Any
    state: Any
    control: Any

    accelerator: Any
    train_dataset: Any
    data_collator: Any

    def get_train_dataloader(self) -> DataLoader[Any]:
        # The epoch comes from the update counter: `set_epoch` does not reach a sampler inside a resumed epoch.
        loop, plan = self.loop, self.loop.plan
        batches = SharedRows(
            loop.lengths, plan.optim.batch, plan.micro, loop.context.ranks,
            lambda: plan.seed * 1_000_003 + self.state.global_step // plan.updates_per_epoch, padded=loop.padded,
        )  # fmt: skip
        return DataLoader(Rows(self.train_dataset, loop.blank), batch_sampler=batches, collate_fn=self.data_collator)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, as the engine averages it over ranks: the update's sum over its count, times the
        number of ranks."""
        loop, ranks = self.loop, self.loop.context.ranks
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]  # the Trainer is the next base
        loop.loss += float(loss.detach()) / ranks.size
        # DeepSpeed steps inside `backward`. Replicas add up later: here a rank would wait for the slower one's pass.
        if ranks.size == 1 or (loop.plan.engine.zero and self.accelerator.sync_gradients):
            self.settle_loss()
        return loss

    def settle_loss(self) -> None:
        """Add up the update's loss over the ranks. TrainingError on every rank, before any weight is changed, if it is
        not finite."""
        loop, ranks = self.loop, self.loop.context.ranks
        if ranks.size > 1:
            part = torch.tensor(loop.loss, dtype=torch.float64, device=self.args.device)
            loop.loss = float(ranks.sum(part))
        if not math.isfinite(loop.loss):
            raise TrainingError(
                f"{loop.context.stage}: the loss of update {self.state.global_step + 1} is {loop.loss}; "
                "lower the learning rate or look at that update's rows. Earlier checkpoints are untouched"
            )

    def _get_grad_norm(self, *_args: Any, **_kwargs: Any) -> float:
        """For the library's log, which is not kept: it would read all gradients once more."""
        return 0.0

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Held-out metrics of the live weights; keeps them if they are the best so far, stops when patience ends."""
        loop, step = self.loop, self.state.global_step
        metrics = loop.measure()
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(f"{loop.context.stage}: the held-out loss at update {step} is {metrics['loss']}")
        self.control.should_evaluate = False  # else the end of an epoch would evaluate again
        loop.context.tracker.log({f"eval/{name}": value for name, value in metrics.items()}, step)
        past = [entry["eval_loss"] for entry in self.state.log_history]
        if metrics["loss"] < min(past, default=math.inf):
            kept = {"step": step, "metrics": metrics}
            save_best(self.model, loop.best, kept, loop.plan.engine, loop.context.ranks)
        self.state.log_history.append({"step": step, "eval_loss": metrics["loss"]})
        losses = [*past, metrics["loss"]]
        patience = loop.plan.optim.patience
        if patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience:
            loop.early, loop.preempted = step < loop.plan.updates, False
            self.control.should_training_stop = True
            self.control.should_save = False  # resumed from here, it would go on
        return {f"eval_{name}": value for name, value in metrics.items()}

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Of a checkpoint. With DeepSpeed its own files hold the weights, a part on each rank."""
        if not self.loop.plan.engine.zero:
            super().save_model(*args, **kwargs)  # type: ignore[misc]  # as above

    def log(self, *_args: Any, **_kwargs: Any) -> None:
        """Metrics go to the tracker, from `Recorder` and `evaluate`."""

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """The card is written from the manifest, for the finished model only."""


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Clips, logs, evaluates, checkpoints and stops at the updates where that is due."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.loop = trainer, trainer.loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.loop.plan.engine.zero:
            share_master_weights(self.trainer.deepspeed.optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.loop.context.ranks.size > 1 and not self.loop.plan.engine.zero:
            self.trainer.settle_loss()
        norm = self._clipped(kwargs["model"])
        if not math.isfinite(norm):
            raise TrainingError(
                f"{self.loop.context.stage}: the gradient of update {state.global_step + 1} has norm {norm}; "
                "earlier checkpoints are untouched"
            )
        if self.loop.beside is not None:
            self.loop.beside()
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.loop.numbers = {"train/loss": self.loop.loss, "train/lr": rate, "train/grad_norm": norm}
        self.loop.loss = 0.0

    def _clipped(self, model: torch.nn.Module) -> float:
        """The gradient's norm before it is clipped; over all ranks, since each has the mean gradient by now."""
        if self.loop.plan.engine.zero:
            return gradient_norm(self.trainer.deepspeed)
        limit = self.loop.plan.optim.max_grad_norm
        weights = [p for p in model.parameters() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(weights, limit if limit > 0 else math.inf))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loop, step = self.loop, state.global_step
        last = step >= loop.plan.updates
        pulse.beat()
        loop.bar.advance(loss=loop.numbers["train/loss"])
        if step % LOG_EVERY == 0 or last:
            loop.context.tracker.log(loop.numbers, step)
        control.should_evaluate = step in loop.plan.eval_at
        control.should_save = step % loop.plan.optim.checkpoint_every == 0 and not last
        if loop.context.stopping() and not last:
            loop.preempted = True
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loop = self.loop
        finish_checkpoint(Path(args.output_dir), state.global_step, loop.plan.engine, loop.context.ranks)


@dataclass(kw_only=True, slots=True)
class Outcome:
    """`model` is whole, plain and has the best weights, which the held-out `metrics` are of; None on ranks above 0."""

    updates: int
    stop_reason: str
    best_update: int
    metrics: dict[str, float]
    model: Any


def train(trainer: Any, resume: Path | None) -> Any:
    """The model with the last update's weights; None where an engine has it in parts, which is then let go of."""
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return None if trainer.loop.plan.engine.zero else trainer.model
    finally:
        if trainer.loop.plan.engine.zero:
            close_deepspeed(trainer)


def fit(trainer: Any, resume: Path | None, fresh: Callable[[], Any]) -> Outcome:
    """Train to the end of the plan. Raises Preempted or TrainingError, on every rank alike.

    fresh: the model as it was before training, made once more for the best weights of an engine that cut it up.
    """
    loop: Loop = trainer.loop
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(trainer))
    assert trainer.is_deepspeed_enabled == bool(loop.plan.engine.zero)
    with progress(loop.plan.updates, loop.context.stage) as loop.bar, pulse.phase(f"{loop.context.stage}: training"):
        if resume:
            loop.bar.advance(int(resume.name.rpartition("-")[2]))
        model = train(trainer, resume)
    updates = trainer.state.global_step
    if loop.preempted:
        raise Preempted(f"{loop.context.stage}: stopped and checkpointed at update {updates}")
    kept: dict[str, Any] = {"step": 0, "metrics": {}}
    if loop.context.ranks.is_main:
        kept = read_best(loop.best)
        model = fresh() if model is None else model
        load_best(model, loop.best)
    return Outcome(
        updates=updates, stop_reason="early_stop" if loop.early else "finished", best_update=kept["step"],
        metrics=kept["metrics"], model=model if loop.context.ranks.is_main else None,
    )  # fmt: skip
