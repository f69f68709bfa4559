"""A reward model's update on K-wise rankings here against TRL's RewardTrainer on all their pairs, on the CPU.

    python benchmarks/rm_vs_trl.py --model POCKET --threads 1

What makes it fair:
- One process; the two make their updates in turn (ours, TRL, ours, ...) on the same prompts. The first is not counted.
- Ours forwards each of the K responses once. TRL's rows are the C(K, 2) pairs, two responses each, so that a response
  is forwarded K - 1 times; it has no other form for a ranking.
- Both: the same weights, AdamW, fp32, full fine-tuning, no recomputation, no logging. TRL's own collator and
  `training_step`, with the best of the micro-batches in --pairs, each timed on the update that is not counted.
- Token ids are random, and lengths uniform: 20 to 120 tokens of prompt, 20 to 180 of response. What is computed depends
  on lengths alone.
- The losses of the first update, at equal weights, must agree to 1e-4.
Seconds are of the process's CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from rlhf.config import ModelConfig
from rlhf.models import ensure_pad, load_reward_model
from rlhf.ranking_loss import RankingLoss
from rlhf.render import load_tokenizer
from rlhf.scoring import read_scores
from rlhf.training import CHECKPOINTING
from stages.rm import FORWARD_TOKENS, Row, collate

RATE = 1e-5


def draw(generator: random.Random, prompts: int, k: int, tokens: Sequence[int], longest: int) -> list[Row]:
    """Strict rankings of random token ids; the first response is the best."""
    rows = []
    for _ in range(prompts):
        prompt = [generator.choice(tokens) for _ in range(generator.randint(20, 120) * longest // 300)]
        lengths = [max(1, generator.randint(20, 180) * longest // 300) for _ in range(k)]
        ids = [[*prompt, *(generator.choice(tokens) for _ in range(length))] for length in lengths]
        rows.append(Row(prompt=str(len(rows)), ids=ids, ranks=list(range(1, k + 1)), response_lengths=lengths))
    return rows


class Ours:
    def __init__(self, model: Any) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def update(self, rows: list[Row]) -> float:
        loss = RankingLoss(rows)
        batch = collate(rows, loss, FORWARD_TOKENS["cpu"])
        rewards_N = torch.cat([read_scores(self.model, *chunk) for chunk in batch.chunks])[batch.back_N]
        value = loss(rewards_N, batch.targets) / len(rows)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value.detach())


class Theirs:
    def __init__(self, model: Any, tokenizer: Any, folder: str) -> None:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        args = RewardConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], max_length=None,
            **dict.fromkeys(CHECKPOINTING, False),
        )  # fmt: skip
        one = Dataset.from_list([{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}])
        self.trainer = RewardTrainer(model=model, args=args, train_dataset=one, processing_class=tokenizer)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.pairs = 4

    def update(self, rows: list[Row]) -> float:
        pairs = [
            {"chosen_ids": row.ids[i], "rejected_ids": row.ids[j]}
            for row in rows
            for i, j in combinations(range(len(row.ids)), 2)
        ]
        parts = [pairs[start : start + self.pairs] for start in range(0, len(pairs), self.pairs)]
        trainer, total = self.trainer, 0.0
        for part in parts:
            # The gradient of the mean over all pairs: a part counts by its share, also the last and smaller one.
            trainer.current_gradient_accumulation_steps = len(pairs) / len(part)
            total += float(trainer.training_step(trainer.model, trainer.data_collator(part)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def timed(update: Callable[[list[Row]], float], rows: list[Row]) -> tuple[float, float]:
    """CPU seconds and the loss."""
    start = time.process_time()
    loss = update(rows)
    return time.process_time() - start, loss


def compare(args: argparse.Namespace, k: int, folder: str) -> None:
    """One line of the table."""
    cpu = torch.device("cpu")
    model = load_reward_model(args.model, ModelConfig(), cpu, init_head=True, seed=0)
    tokenizer = load_tokenizer(args.model, ModelConfig())
    ensure_pad(model, tokenizer)
    ours, theirs = Ours(copy.deepcopy(model)), Theirs(model, tokenizer, folder)
    longest = min(300, model.config.max_position_embeddings)
    generator = random.Random(0)
    # TRL's classifier reads a row that ends with the pad token at the token before.
    tokens = [token for token in range(model.config.vocab_size) if token != model.config.pad_token_id]
    batches = [draw(generator, args.prompts, k, tokens, longest) for _ in range(args.updates + 1)]
    kept = copy.deepcopy(model.state_dict())
    found = {}
    for theirs.pairs in args.pairs:
        model.load_state_dict(kept)
        found[theirs.pairs] = timed(theirs.update, batches[0])
    theirs.pairs = min(found, key=lambda pairs: found[pairs][0])
    expected, (_, loss) = found[theirs.pairs][1], timed(ours.update, batches[0])
    if not abs(loss - expected) <= 1e-4:
        raise SystemExit(f"K = {k}: our loss is {loss}, TRL's {expected}")
    laps = [(timed(ours.update, rows)[0], timed(theirs.update, rows)[0]) for rows in batches[1:]]
    mine, other = (statistics.median(lap[side] for lap in laps) / args.prompts for side in (0, 1))
    each = [a / b for a, b in laps]
    tokens = sum(len(ids) for rows in batches[1:] for row in rows for ids in row.ids) / args.updates / args.prompts
    print(
        f"| {k} | {tokens:.0f} | {theirs.pairs} | {mine:.3f} | {other:.3f} | "
        f"**{mine / other:.3f}** ({min(each):.3f} to {max(each):.3f}) | {1 / (k - 1):.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a small causal LM")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 9])
    parser.add_argument("--prompts", type=int, default=4, help="of an update")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 4, 8], help="TRL's micro-batches to choose from")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| K | tokens a prompt | TRL's micro-batch | ours s a prompt | TRL s a prompt | ours / TRL | forwards |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for k in args.k:
            compare(args, k, folder)


if __name__ == "__main__":
    main()
