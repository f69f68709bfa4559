"""The Hugging Face Trainer on rankings: what a batch is, the loss of an update, and the parameter of ties.

A batch is all responses of some prompts, sorted by length and cut into chunks, whatever prompt they belong to. The
wrappers that spread a model over ranks see only calls of its `forward`, so one call has to read all chunks
(`read_chunks_in_forward`); where calls hold collectives, each rank reads as many chunks as the one that has most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, get_scheduler

from rlhf import pulse
from rlhf.engine.ranks import Ranks
from rlhf.ranking_loss import RankingLoss, Targets, center_penalty
from rlhf.scoring import micro_batches, pad_right, read_scores
from rlhf.sharing import own_share

TIE_RATE = 0.02  # learning rate of log nu, under the schedule of the rest; Adam moves it by about that an update
TIE_FILE = "ranking_loss.pt"  # in each checkpoint


@dataclass(kw_only=True, slots=True)
class Row:
    """One ranking as token ids (prompt and response each), its ranks and the responses' lengths in tokens."""

    prompt: str  # the same for two rankings of one prompt
    ids: list[list[int]]
    ranks: list[int | None]
    response_lengths: list[int]
    scores: list[float | None] | None = None
    weight: float = 1.0
    counts: bool = True  # False: read so that a rank makes as many passes as the others


def blank(row: Row) -> Row:
    """The row as one that does not count."""
    return dataclasses.replace(row, counts=False)


@dataclass(kw_only=True, slots=True)
class Batch:
    """Rankings as the model reads them: all responses sorted by length and cut, whatever prompt they belong to."""

    chunks: list[tuple[Tensor, Tensor]]  # ids_BT and lengths_B
    back_N: Tensor  # where in the chunks' rows, laid end to end, each response is
    targets: Targets
    rows: Sequence[Row]

    @property
    def count(self) -> int:
        """Prompts that the loss is a mean over."""
        return sum(row.counts for row in self.rows)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            chunks=[(ids.to(device), lengths.to(device)) for ids, lengths in self.chunks],
            back_N=self.back_N.to(device), targets=self.targets.to(device), rows=self.rows,
        )  # fmt: skip


def collate(rows: Sequence[Row], loss: RankingLoss, micro_tokens: int) -> Batch:
    """K may differ from row to row; short responses are not padded to the longest of the batch."""
    responses = [ids for row in rows for ids in row.ids]
    groups = micro_batches([len(ids) for ids in responses], micro_tokens)
    back = torch.empty(len(responses), dtype=torch.long)
    back[[place for group in groups for place in group]] = torch.arange(len(responses))
    cpu = torch.device("cpu")
    return Batch(
        chunks=[pad_right([responses[place] for place in group], 0, cpu) for group in groups],
        back_N=back, targets=loss.targets(rows), rows=rows,
    )  # fmt: skip


def read_chunks_in_forward(model: Any) -> None:
    """Let `model(chunks=...)` give the rewards of all chunks, laid end to end; other calls stay as they are."""
    plain = model.forward

    def forward(*args: Any, chunks: Sequence[tuple[Tensor, Tensor]] | None = None, **kwargs: Any) -> Any:
        if chunks is None:
            return plain(*args, **kwargs)
        return torch.cat([read_scores(model, *chunk) for chunk in chunks])

    model.forward = forward


class RankingTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types
    """transformers.Trainer with the ranking loss. The four attributes are set before `train` is called."""

    ranking_loss: RankingLoss
    center_coef = 0.0
    ranks: Ranks
    lockstep = False  # each rank has to make the same number of passes
    ties: TieParameter | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        if self.ties is None and self.ranking_loss.log_nu is not None:
            self.ties = TieParameter(self.ranking_loss.log_nu, self.args)
        return optimizer

    def step_ties(self) -> None:
        """One step of the parameter of ties, if there is one: once for each update, on every rank."""
        if self.ties is not None:
            self.ties.step(self.ranks)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.ties is not None and self.ranks.is_main:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self.ties.state(), folder / TIE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ties is not None and checkpoint is not None:
            self.ties.load(torch.load(Path(checkpoint) / TIE_FILE, weights_only=True))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        # Without labels the Trainer cannot count. The prompts of the whole update are what the loss is divided by.
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches: list[Batch] = [sample["batch"] for sample in samples]
        if self.lockstep:
            most = self.ranks.gather([len(batch.chunks) for batch in batches])
            for batch, lengths in zip(batches, zip(*most, strict=True), strict=True):
                batch.chunks += batch.chunks[-1:] * (max(lengths) - len(batch.chunks))
        prompts = torch.tensor(sum(batch.count for batch in batches), device=device)
        return samples, self.ranks.sum(prompts)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's sum over the update's prompts on all ranks, times the ranks, whose mean is taken."""
        batch: Batch = inputs["batch"].to(self.args.device)
        with self.accelerator.autocast():
            read_N = model(chunks=batch.chunks)
        rewards_N = read_N[batch.back_N]
        loss: Tensor = self.ranking_loss(rewards_N, batch.targets)
        if self.center_coef:
            loss = loss + self.center_coef * center_penalty(rewards_N, batch.rows)
        if not batch.count:
            loss = loss * 0.0
        if len(read_N) > len(rewards_N):  # chunks that were read for company
            loss = loss + 0.0 * read_N[len(rewards_N) :].sum()
        mean: Tensor = loss * self.ranks.size / num_items_in_batch
        return mean

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


class TieParameter:
    """AdamW on log nu, with the arguments of the model's, a rate of its own and the same schedule. It is no part of the
    model, so no engine cuts it up or averages its gradient."""

    def __init__(self, log_nu: torch.nn.Parameter, args: Any) -> None:
        self.log_nu = log_nu
        self.optimizer = torch.optim.AdamW(
            [log_nu], lr=TIE_RATE, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=0.0
        )
        self.schedule = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
        )

    def step(self, ranks: Ranks) -> None:
        if self.log_nu.grad is not None:
            ranks.sum(self.log_nu.grad).div_(ranks.size)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return {
            "log_nu": self.log_nu.detach(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.log_nu.copy_(state["log_nu"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@torch.no_grad()
def shared_scores(model: Any, rows: Sequence[list[int]], micro_tokens: int, ranks: Ranks) -> list[float]:
    """As `scoring.score_ids`, by all ranks together: each reads a part, and has all rewards in the end."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    own, _ = own_share(micro_batches([len(row) for row in rows], micro_tokens), ranks)
    found: dict[int, float] = {}
    for places in own:
        pulse.beat()
        scores = read_scores(model, *pad_right([rows[place] for place in places], 0, device)).tolist()
        found |= dict(zip(places, scores, strict=True))
    model.train(training)
    everywhere = {place: score for part in ranks.gather(found) for place, score in part.items()}
    return [everywhere[place] for place in range(len(rows))]
