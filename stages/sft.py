"""Stage 1, supervised fine-tuning: the base model learns to answer as the demonstrations do.

The loss is the mean negative log-likelihood of the response tokens, the end token among them, over all response tokens
of an update: prompts carry no loss, and how an update is cut into micro-batches cannot change it. TRL's SFTTrainer
makes the updates; rows come to it as token ids, rendered by the function that renders for the later stages too.

    python -m rlhf stage=sft
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from rlhf import pulse
from rlhf.artifacts import atomic_folder, read_json, write_json
from rlhf.checkpoints import find_resume
from rlhf.config import Config
from rlhf.engine.ranks import Ranks
from rlhf.errors import DataError
from rlhf.lora import add_lora, is_lora, merge_lora, save_adapter
from rlhf.models import DTYPES, check_vocabulary, load_policy, save_model, training_config
from rlhf.scoring import micro_batches, pad_right
from rlhf.sharing import own_share
from rlhf.training import Loop, Supervised, fit, make_plan, one_device, trainer_options
from rlhf.types import Demonstration, StageResult

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.context import Context

RECIPE = 1
EVAL_LOGITS = 1 << 24  # numbers in one evaluation forward's logits, tokens times vocabulary: 64 MB
IGNORED = -100  # the label of a token that carries no loss

Row = tuple[list[int], int]  # token ids of prompt and response, and the length of the prompt


class Trainer(Supervised, SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's trainer with our order of rows, log, best weights and checkpoints."""


def run(cfg: Config, context: Context) -> StageResult:
    """Fine-tune the base model on `context.data.demonstrations`; writes model/ (and adapter/ with LoRA)."""
    # 1. Rows to token ids.
    assert context.data.demonstrations is not None
    rows = render(context.data.demonstrations.train, context)
    heldout = render(context.data.demonstrations.heldout, context)
    ranks, engine = context.ranks, cfg.engine.kind
    plan = make_plan(cfg.sft.optim, len(rows), cfg.seed, "sft.optim", engine, ranks.size)

    # 2. The base model, and what it scores before any update.
    model = start_model(cfg, context)
    checkpoints = context.folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = find_resume(checkpoints, engine, ranks)
    before = base_metrics(model, heldout, checkpoints / "base.json", ranks, known=resume is not None)
    if resume is None:
        context.tracker.log({f"eval/{name}": value for name, value in before.items()}, 0)

    # 3. Updates.
    if cfg.sft.lora.enabled:
        model = add_lora(model, cfg.sft.lora, cfg.seed)
    loop = Loop(
        plan=plan, context=context, measure=lambda: measure(model, heldout, ranks), lengths=[len(r[0]) for r in rows],
        padded=not cfg.sft.packing, blank=blank,
    )  # fmt: skip
    outcome = fit(make_trainer(cfg, model, rows, loop), resume, lambda: fresh_model(cfg, context))
    result = StageResult(
        metrics={}, stop_reason=outcome.stop_reason, updates=outcome.updates, planned_updates=loop.plan.updates,
        extra={"best_update": outcome.best_update},
    )  # fmt: skip
    if not ranks.is_main:
        return result

    # 4. The best weights, merged, saved and opened again, by rank 0.
    result.metrics = report(before, outcome.metrics)
    publish(cfg, context, outcome.model)
    return result


def start_model(cfg: Config, context: Context) -> Any:
    """The base model, in float32. ConfigError if the tokenizer is another model's."""
    base = context.parents["base"]
    model = load_policy(base, training_config(cfg.model), context.device)
    check_vocabulary(model, context.renderer.tokenizer, base)
    return model


def fresh_model(cfg: Config, context: Context) -> Any:
    """What training starts from, once more."""
    model = start_model(cfg, context)
    return add_lora(model, cfg.sft.lora, cfg.seed) if cfg.sft.lora.enabled else model


def publish(cfg: Config, context: Context, model: Any) -> None:
    """Write model/, and adapter/ with LoRA."""
    if is_lora(model):
        with atomic_folder(context.folder / "adapter") as part:
            save_adapter(model, part)
        model = merge_lora(model)
    model = model.to(DTYPES[cfg.model.dtype]).eval()
    with atomic_folder(context.folder / "model") as part:
        save_model(model, context.renderer.tokenizer, part, trust_remote_code=cfg.model.trust_remote_code)


def blank(row: dict[str, Any]) -> dict[str, Any]:
    """The row without a token that carries loss."""
    return {**row, "labels": [IGNORED] * len(row["labels"])}


def render(demonstrations: Sequence[Demonstration], context: Context) -> list[Row]:
    """Token ids of each demonstration. DataError if there is none, or one without a response token."""
    if not demonstrations:
        raise DataError("data.demonstrations: no row is left for one side of the split into training and held-out rows")
    rows = []
    for row in demonstrations:
        ids, prompt_length = context.renderer.full_ids(row.prompt.messages, row.response)
        if prompt_length >= len(ids):
            raise DataError(f"{row.prompt.where}: the response has no token, so the row has nothing to learn from")
        rows.append((ids, prompt_length))
    return rows


def make_trainer(cfg: Config, model: Any, rows: list[Row], loop: Loop) -> Any:
    """The trainer over `rows`, packed or padded as the configuration says."""
    logging.getLogger("trl").setLevel(logging.ERROR)
    disable_progress_bars()
    data = Dataset.from_dict({
        "input_ids": [ids for ids, _ in rows],
        "labels": [[IGNORED] * start + ids[start:] for ids, start in rows],
    })  # fmt: skip
    options = trainer_options(loop.plan, loop.context, cfg.model)
    packing = cfg.sft.packing
    arguments = SFTConfig(
        **options, packing=packing, max_length=cfg.data.max_length if packing else None, pad_to_multiple_of=None
    )
    tokenizer = copy.deepcopy(loop.context.renderer.tokenizer)  # TRL sets its pad token
    trainer = Trainer(model=model, args=one_device(arguments), train_dataset=data, processing_class=tokenizer)
    trainer.loop = loop
    # TRL adds up over the ranks what it counts in each pass, for a log that is not kept: they would wait in each pass.
    trainer.accelerator.gather_for_metrics = lambda counted: counted
    if packing:  # rows of the trainer are now packs
        packs = trainer.train_dataset["input_ids"]
        loop.lengths[:] = [len(pack) for pack in packs]
        plan, ranks = loop.plan, loop.context.ranks
        loop.plan = make_plan(cfg.sft.optim, len(packs), cfg.seed, "sft.optim", plan.engine, ranks.size)
        trainer.args.max_steps = loop.plan.updates
        trainer.args.warmup_steps = math.ceil(cfg.sft.optim.warmup * loop.plan.updates)
    return trainer


def base_metrics(model: Any, heldout: list[Row], path: Path, ranks: Ranks, *, known: bool) -> dict[str, float]:
    """What the model scores before training; a resumed run reads what its first process found."""
    known = ranks.broadcast(known and path.exists())
    metrics: dict[str, float] = read_json(path) if known else measure(model, heldout, ranks)
    if ranks.is_main and not known:
        write_json(path, metrics)
    return metrics


@torch.no_grad()
def measure(model: Any, rows: list[Row], ranks: Ranks | None = None) -> dict[str, float]:
    """Mean loss (nats a response token) and the share of response tokens that are the model's first choice.

    ranks: that all call this, each with all rows, and share the work.
    """
    ranks = ranks or Ranks()
    device, training = next(model.parameters()).device, model.training
    model.eval()
    vocabulary = model.get_input_embeddings().num_embeddings  # its weight is empty where an engine cut it up
    groups = micro_batches([len(ids) for ids, _ in rows], min(4096, max(512, EVAL_LOGITS // vocabulary)))
    own, counted = own_share(groups, ranks)
    loss, right, count = 0.0, 0, 0
    for number, places in enumerate(own):
        pulse.beat()
        part = [rows[place] for place in places]
        ids_BT, lengths_B = pad_right([ids for ids, _ in part], 0, device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        mask_BT = response_mask([start for _, start in part], lengths_B, ids_BT.shape[1])[:, 1:]
        if number >= counted:
            break
        logits_NV, targets_N = logits_BTV[mask_BT].float(), ids_BT[:, 1:][mask_BT]
        loss += float(functional.cross_entropy(logits_NV, targets_N, reduction="sum"))
        right += int((logits_NV.argmax(-1) == targets_N).sum())
        count += len(targets_N)
    model.train(training)
    sums = torch.tensor([loss, right, count], dtype=torch.float64, device=device)
    loss, right, count = ranks.sum(sums).tolist()
    return {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700.0)), "token_accuracy": right / count}


def response_mask(starts: list[int], lengths_B: Tensor, width: int) -> Tensor:
    """mask_BT, True at the tokens of the response, from lengths alone: the pad token may be any token."""
    at_T = torch.arange(width, device=lengths_B.device)
    starts_B = torch.tensor(starts, device=lengths_B.device)
    return (at_T >= starts_B[:, None]) & (at_T < lengths_B[:, None])


def report(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The stage's metrics: held-out, of the weights that were kept, beside the base model's."""
    return {
        "sft/eval_loss": after["loss"], "sft/perplexity": after["perplexity"],
        "sft/token_accuracy": after["token_accuracy"], "sft/base_loss": before["loss"],
        "sft/base_perplexity": before["perplexity"], "sft/base_token_accuracy": before["token_accuracy"],
    }  # fmt: skip
