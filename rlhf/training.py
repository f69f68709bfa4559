"""What the two supervised stages share on top of the Hugging Face Trainer: order of rows, log, best weights, resume.

The Trainer keeps its loop, optimiser, schedule and checkpoint files. Three of its habits are replaced:
- its checkpoints are written in place, and one that is torn is resumed from without a word: here a finished checkpoint
  is sealed with the digests of its files, and only an intact one is resumed from;
- it averages logged losses since the last log, so that a resumed run logs other numbers: here each is of one update;
- a loss that is not finite is hidden: here it stops the run before the update is made.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from rlhf.artifacts import (
    atomic_folder,
    is_intact,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    seal,
    write_json,
)
from rlhf.config import Dtype, ModelConfig, OptimConfig, Schedule
from rlhf.console import Bar, progress, say
from rlhf.errors import Preempted, TrainingError

if TYPE_CHECKING:
    from rlhf.context import Context

LOG_EVERY = 10  # updates
KEEP_CHECKPOINTS = 2
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
    seed: int
    rows: int
    updates_per_epoch: int
    updates: int
    eval_at: frozenset[int]


def make_plan(optim: OptimConfig, rows: int, seed: int) -> Plan:
    """`optim.evals` evaluations, evenly spaced, the last one after the last update."""
    per_epoch = math.ceil(rows / optim.batch)
    updates = math.ceil(optim.epochs * per_epoch)
    eval_at = frozenset(math.ceil(updates * i / optim.evals) for i in range(1, optim.evals + 1))
    return Plan(optim=optim, seed=seed, rows=rows, updates_per_epoch=per_epoch, updates=updates, eval_at=eval_at)


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
    optim = plan.optim
    return {
        "output_dir": str(context.folder / "checkpoints"),
        "per_device_train_batch_size": optim.micro_batch,
        "gradient_accumulation_steps": optim.batch // optim.micro_batch,
        "max_steps": plan.updates,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": math.ceil(optim.warmup * plan.updates),
        "weight_decay": optim.weight_decay,
        "adam_beta2": optim.adam_beta2,
        "max_grad_norm": 0.0,  # clipped in `Recorder`, which needs the norm
        "optim": "adamw_torch",
        "seed": plan.seed,
        "use_cpu": context.device.type == "cpu",
        "bf16": model.dtype is Dtype.bfloat16,
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


class EpochOrder(Sampler[int]):
    """A new permutation of the rows for each epoch, a function of seed and epoch alone, so that a resume finds it.

    Inside one update's rows the long ones come first: the update is the same, its micro-batches have less padding.
    """

    def __init__(self, lengths: list[int], plan: Plan, epoch: Callable[[], int]) -> None:
        self.lengths, self.plan, self.epoch = lengths, plan, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.plan.optim.batch):
            yield from sorted(order[start : start + self.plan.optim.batch], key=lambda row: -self.lengths[row])


@dataclass(kw_only=True, slots=True)
class Loop:
    """What a trainer of ours carries beside the library's state."""

    plan: Plan
    context: Context
    measure: Measure
    lengths: list[int]
    loss: float = 0.0  # of the update that is being made
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
    model: Any
    state: Any
    control: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        # The epoch comes from the update counter: `set_epoch` does not reach a sampler inside a resumed epoch.
        plan = self.loop.plan
        return EpochOrder(self.loop.lengths, plan, lambda: self.state.global_step // plan.updates_per_epoch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]  # the Trainer is the next base
        self.loop.loss += float(loss)
        if not math.isfinite(self.loop.loss):
            raise TrainingError(
                f"{self.loop.context.stage}: the loss of update {self.state.global_step + 1} is {float(loss)}; "
                "lower the learning rate or look at that update's rows. Earlier checkpoints are untouched"
            )
        return loss

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
            save_best(self.model, loop.best, step, metrics)
        self.state.log_history.append({"step": step, "eval_loss": metrics["loss"]})
        losses = [*past, metrics["loss"]]
        patience = loop.plan.optim.patience
        if patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience:
            loop.early, loop.preempted = step < loop.plan.updates, False
            self.control.should_training_stop = True
            self.control.should_save = False  # resumed from here, it would go on
        return {f"eval_{name}": value for name, value in metrics.items()}

    def log(self, *_args: Any, **_kwargs: Any) -> None:
        """Metrics go to the tracker, from `Recorder` and `evaluate`."""

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """The card is written from the manifest, for the finished model only."""


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Clips, logs, evaluates, checkpoints and stops at the updates where that is due."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit = self.loop.plan.optim.max_grad_norm
        weights = [p for p in kwargs["model"].parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, limit if limit > 0 else math.inf))
        if not math.isfinite(norm):
            raise TrainingError(
                f"{self.loop.context.stage}: the gradient of update {state.global_step + 1} has norm {norm}; "
                "the weights are untouched since the last checkpoint"
            )
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        self.loop.numbers = {"train/loss": self.loop.loss, "train/lr": rate, "train/grad_norm": norm}
        self.loop.loss = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loop, step = self.loop, state.global_step
        last = step >= loop.plan.updates
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
        folder = Path(args.output_dir)
        seal(folder / f"checkpoint-{state.global_step}")
        prune_checkpoints(folder, KEEP_CHECKPOINTS)


@dataclass(kw_only=True, slots=True)
class Outcome:
    updates: int
    stop_reason: str
    best_update: int
    metrics: dict[str, float]  # held-out, of the best weights, which the model now has


def find_resume(folder: Path) -> Path | None:
    """The newest intact checkpoint; newer ones that are torn or altered are named and removed."""
    found, torn = latest_checkpoint(folder)
    for path in torn:
        say(f"{path.name} is torn or altered: passed over")
        shutil.rmtree(path)
    if found:
        say(f"resuming from {found.name}")
    return found


def fit(trainer: Any, resume: Path | None) -> Outcome:
    """Train to the end of the plan and leave the best weights in the model. Raises Preempted or TrainingError."""
    loop: Loop = trainer.loop
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Recorder(loop))
    with progress(loop.plan.updates, loop.context.stage) as loop.bar:
        if resume:
            loop.bar.advance(int(resume.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if loop.preempted:
        raise Preempted(f"{loop.context.stage}: stopped and checkpointed at update {trainer.state.global_step}")
    best_update, metrics = load_best(trainer.model, loop.best)
    reason = "early_stop" if loop.early else "finished"
    return Outcome(updates=trainer.state.global_step, stop_reason=reason, best_update=best_update, metrics=metrics)


def save_best(model: torch.nn.Module, folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Keep the trained weights (of LoRA: the adapters and the head) and what they scored."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with atomic_folder(folder) as part:
        save_file(weights, part / "weights.safetensors")
        write_json(part / "metrics.json", {"step": step, "metrics": metrics})
        seal(part)


def load_best(model: torch.nn.Module, folder: Path) -> tuple[int, dict[str, float]]:
    """Put the kept weights back, in place; the update they are of and what they scored."""
    if not is_intact(folder):
        raise TrainingError(f"{folder}: the best weights are torn or altered; delete {folder.parent} and run again")
    weights, kept = load_file(folder / "weights.safetensors"), read_json(folder / "metrics.json")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    return kept["step"], kept["metrics"]
