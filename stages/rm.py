"""Stage 2, the reward model: a scalar head on the SFT model, or on rm.base, trained on rankings of K responses.

The loss is `rlhf.ranking_loss`: the mean over a prompt's comparable pairs, then the mean over the prompts of an update.
All responses of a prompt stand in one element, so that each is forwarded once and none is both in training and held
out. Departures from Ouyang et al. 2022: ties count, with a likelihood of their own, whose one parameter is learnt
beside the model; and Plackett-Luce can take the place of the pairs.

The finished model is measured once more: the mean and standard deviation of its rewards on held-out demonstrations go
into the manifest, so that PPO can use rewards of mean 0 and deviation 1.

    python -m rlhf stage=rm
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from rlhf.artifacts import MEMBERS, atomic_folder
from rlhf.checkpoints import find_resume
from rlhf.config import Config
from rlhf.data import prompt_key
from rlhf.engine.ranks import Ranks
from rlhf.errors import DataError, TrainingError
from rlhf.lora import add_lora, is_lora, merge_lora, save_adapter
from rlhf.members import plan_members, train_beside
from rlhf.models import DTYPES, check_vocabulary, ensure_pad, load_reward_model, save_model, training_config
from rlhf.ranking_loss import RankingLoss, comparable_pairs
from rlhf.ranking_trainer import RankingTrainer, Row, blank, collate, read_chunks_in_forward, shared_scores
from rlhf.render import Renderer
from rlhf.reward_report.write import write_report
from rlhf.scoring import score_ids
from rlhf.statistics import clopper_pearson_lower, clopper_pearson_upper
from rlhf.training import Loop, Supervised, fit, make_plan, one_device, trainer_options
from rlhf.types import Ranking, StageResult

if TYPE_CHECKING:
    from rlhf.context import Context

RECIPE = 2
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}  # of one forward pass, padding included; cannot change the result
ALPHA = 0.05  # of the interval of the held-out accuracy


class Trainer(Supervised, RankingTrainer):
    """The ranking loss, with our updates, log, best weights and checkpoints."""


def run(cfg: Config, context: Context) -> StageResult:
    """Train a reward model on `context.data.rankings`; writes model/ (and adapter/ with LoRA).

    With rm.members or rm.holdout several, each on folds of its own: those beside the first come before it, so that
    whatever is finished when the process is killed stays finished.
    """
    assert context.data.rankings is not None
    rankings = context.data.rankings.train
    first, *others = plan_members(cfg.rm, cfg.seed)
    beside = {}
    for member in others:
        train = partial(train_one, cfg, rankings=member.rows(rankings), seed=member.seed)
        beside[member.name] = train_beside(cfg, context, member, train)
    result = train_one(cfg, context, first.rows(rankings), first.seed)
    if beside:
        result.extra |= {"reads": first.reading, MEMBERS: beside}
    return result


def train_one(cfg: Config, context: Context, rankings: Sequence[Ranking], seed: int) -> StageResult:
    """One reward model into `context.folder`, trained on `rankings`, judged on the held-out ones of the context.

    seed: of the head, the adapter and the order of the rows.
    """
    # 1. The SFT model, or a base of its own, with a new head, and a pad token that is not its end token.
    ranks, engine = context.ranks, cfg.engine.kind
    model, tokenizer = start_model(cfg, context, seed)

    # 2. Rankings to token ids, with the tokenizer that scores in PPO.
    assert context.data.rankings is not None
    renderer = Renderer(tokenizer)
    loss = make_loss(cfg, rankings).to(context.device)
    rows = render(rankings, renderer, loss)
    heldout = render(context.data.rankings.heldout, renderer, loss)
    plan = make_plan(cfg.rm.optim, len(rows), seed, "rm.optim", engine, ranks.size)

    # 3. Updates.
    if cfg.rm.lora.enabled:
        model = add_lora(model, cfg.rm.lora, seed)
    checkpoints = context.folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = find_resume(checkpoints, engine, ranks)
    loop = Loop(
        plan=plan, context=context, measure=lambda: measure(model, heldout, loss, ranks), blank=blank,
        lengths=[sum(len(ids) for ids in row.ids) for row in rows], padded=False,
    )  # fmt: skip
    outcome = fit(make_trainer(cfg, model, rows, loop, loss), resume, lambda: fresh_model(cfg, context, seed))
    result = StageResult(
        metrics={}, stop_reason=outcome.stop_reason, updates=outcome.updates, planned_updates=plan.updates,
        extra={"best_update": outcome.best_update},
    )  # fmt: skip
    if not ranks.is_main:
        return result

    # 4. The best weights, merged, saved and opened again, by rank 0.
    model = publish(cfg, context, outcome.model, tokenizer)

    # 5. Held-out accuracy with its interval, the scale of the rewards, and report.json.
    result.extra |= reward_scale(model, renderer, context, heldout)
    result.metrics = {"rm/eval_loss": outcome.metrics["loss"], **accuracy(model, rows, heldout, cfg.seed)}
    if "tie_nu" in outcome.metrics:  # of the best weights, as the loss
        result.extra["tie_nu"] = result.metrics["rm/tie_nu"] = outcome.metrics["tie_nu"]
    write_report(context, model, renderer, rankings, cfg.seed)
    return result


def start_model(cfg: Config, context: Context, seed: int) -> tuple[Any, Any]:
    """The model that is trained, in float32 with a new head, and its tokenizer, which has a pad token of its own."""
    start = context.parents["base" if cfg.rm.base else "sft"]
    model = load_reward_model(start, training_config(cfg.model), context.device, init_head=True, seed=seed)
    check_vocabulary(model, context.renderer.tokenizer, start)
    tokenizer = copy.deepcopy(context.renderer.tokenizer)
    ensure_pad(model, tokenizer)
    return model, tokenizer


def fresh_model(cfg: Config, context: Context, seed: int) -> Any:
    """What training starts from, once more."""
    model, _ = start_model(cfg, context, seed)
    return add_lora(model, cfg.rm.lora, seed) if cfg.rm.lora.enabled else model


def publish(cfg: Config, context: Context, model: Any, tokenizer: Any) -> Any:
    """Write model/, and adapter/ with LoRA; the merged model."""
    if is_lora(model):
        with atomic_folder(context.folder / "adapter") as part:
            save_adapter(model, part)
        model = merge_lora(model)
    model = model.to(DTYPES[cfg.model.dtype]).eval()
    with atomic_folder(context.folder / "model") as part:
        save_model(model, tokenizer, part, trust_remote_code=cfg.model.trust_remote_code)
    return model


def make_loss(cfg: Config, rankings: Sequence[Ranking]) -> RankingLoss:
    """The loss that `cfg.rm` asks for, on these training rankings. DataError if they order no two responses."""
    if not any(comparable_pairs(ranking.ranks)[0] for ranking in rankings):
        raise DataError("data.rankings: no training ranking has a strict pair: ties alone order nothing")
    if cfg.rm.margin and all(ranking.scores is None for ranking in rankings):
        raise DataError("rm.margin: no training ranking has scores (`scores`, or `margin` of a pair) to take it from")
    return RankingLoss(
        rankings, loss=cfg.rm.loss.value, ties=cfg.rm.ties.value, smoothing=cfg.rm.label_smoothing,
        margin=cfg.rm.margin,
    )  # fmt: skip


def render(rankings: Sequence[Ranking], renderer: Renderer, loss: RankingLoss) -> list[Row]:
    """Token ids of each ranking that the loss can read. DataError if there is none."""
    rows = []
    for ranking in rankings:
        if not loss.reads(ranking):
            continue
        full = [renderer.full_ids(ranking.prompt.messages, response) for response in ranking.responses]
        lengths = [len(ids) - start for ids, start in full]
        rows.append(Row(
            prompt=prompt_key(ranking.prompt.messages), ids=[ids for ids, _ in full], ranks=ranking.ranks,
            response_lengths=lengths, scores=ranking.scores, weight=ranking.weight,
        ))  # fmt: skip
    if not rows:
        raise DataError(
            "data.rankings: no comparable pair is left for one side of the split into training and held-out rows"
        )
    return rows


def make_trainer(cfg: Config, model: Any, rows: list[Row], loop: Loop, loss: RankingLoss) -> Any:
    micro_tokens = FORWARD_TOKENS.get(loop.context.device.type, 2048)
    score_ids(model, [rows[0].ids[0]], 1)  # while it is whole: its last layer is tried once (`rlhf.last_layer`)
    read_chunks_in_forward(model)
    trainer = Trainer(
        model=model, train_dataset=rows,
        args=one_device(TrainingArguments(**trainer_options(loop.plan, loop.context, cfg.model))),
        data_collator=lambda part: {"batch": collate(part, loss, micro_tokens)},
    )  # fmt: skip
    trainer.loop = loop
    trainer.ranking_loss = loss
    trainer.center_coef = cfg.rm.center_coef
    trainer.ranks, trainer.lockstep = loop.context.ranks, loop.plan.engine.zero == 3
    loop.beside = trainer.step_ties
    trainer.model_accepts_loss_kwargs = True  # the loss is divided by the whole update's prompts, not once more
    return trainer


def rewards(model: Any, rows: Sequence[Row], ranks: Ranks | None = None) -> list[list[float]]:
    """The reward of each response of each ranking; by `ranks` together, if they are given."""
    ids = [ids for row in rows for ids in row.ids]
    flat = iter(score_ids(model, ids, 4096) if ranks is None else shared_scores(model, ids, 4096, ranks))
    return [[next(flat) for _ in row.ids] for row in rows]


def measure(model: Any, rows: Sequence[Row], ranking_loss: RankingLoss, ranks: Ranks) -> dict[str, float]:
    """Held-out loss (nats a pair or choice, mean over prompts), accuracy over all strict pairs, and nu if learnt."""
    scored = rewards(model, rows, ranks)
    flat_N = torch.tensor([value for row in scored for value in row], device=model.device)
    with torch.no_grad():
        total = ranking_loss(flat_N, ranking_loss.targets(rows).to(model.device))
    right, count = agreement(scored, rows)
    nu = ranking_loss.nu
    ties = {} if nu is None else {"tie_nu": nu}
    return {"loss": float(total) / len(rows), "accuracy": right / max(count, 1), **ties}


def agreement(values: Sequence[Sequence[float]], rows: Sequence[Row]) -> tuple[int, int]:
    """Strict pairs whose better response has the greater value, and strict pairs. Equal values are a miss."""
    right = count = 0
    for value, row in zip(values, rows, strict=True):
        strict, _ = comparable_pairs(row.ranks)
        right += sum(value[better] > value[worse] for better, worse in strict)
        count += len(strict)
    return right, count


def accuracy(model: Any, train: Sequence[Row], heldout: Sequence[Row], seed: int) -> dict[str, float]:
    """Held-out accuracy: over all strict pairs, and over one random pair a prompt, which are independent, so that
    their exact (Clopper-Pearson, two-sided 95 %) interval holds. Beside it what length alone scores, in the direction
    that is right more often in training."""
    scored = rewards(model, heldout)
    right, count = agreement(scored, heldout)
    if not count:
        raise DataError("data.rankings: no held-out ranking has a strict pair, so the accuracy cannot be measured")
    by_prompt: dict[str, list[bool]] = {}
    for value, row in zip(scored, heldout, strict=True):
        for better, worse in comparable_pairs(row.ranks)[0]:
            by_prompt.setdefault(row.prompt, []).append(value[better] > value[worse])
    draw = random.Random(seed)
    drawn = [draw.choice(found) for found in by_prompt.values()]
    k, n = sum(drawn), len(drawn)
    longer = agreement([row.response_lengths for row in train], train)
    shorter = agreement([[-length for length in row.response_lengths] for row in train], train)
    sign = 1 if longer[0] >= shorter[0] else -1
    by_length, _ = agreement([[sign * length for length in row.response_lengths] for row in heldout], heldout)
    return {
        "rm/accuracy": right / count, "rm/pairs": count, "rm/one_pair_accuracy": k / n, "rm/prompts": n,
        "rm/one_pair_lower": clopper_pearson_lower(k, n, ALPHA / 2),
        "rm/one_pair_upper": clopper_pearson_upper(k, n, ALPHA / 2), "rm/length_accuracy": by_length / count,
    }  # fmt: skip


def reward_scale(model: Any, renderer: Renderer, context: Context, heldout: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard deviation of the reward on held-out demonstrations, or without any on held-out rankings."""
    demonstrations = context.data.demonstrations
    rows = list(demonstrations.heldout) if demonstrations else []
    if len(rows) >= 2:
        ids = [renderer.full_ids(row.prompt.messages, row.response)[0] for row in rows]
    else:
        ids = [ids for row in heldout for ids in row.ids]
    values = score_ids(model, ids, 4096)
    spread = statistics.pstdev(values)
    if not spread > 1e-9:
        raise TrainingError("the reward model gives every response the same reward: raise rm.optim.learning_rate")
    source = "held-out demonstrations" if len(rows) >= 2 else "held-out rankings"
    return {"reward_mean": statistics.fmean(values), "reward_std": spread, "normalised_on": source}
