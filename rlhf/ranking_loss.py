"""The loss of a reward model on rankings of any number of responses, ties and unranked ones included. torch alone.

For one prompt whose responses have rewards r, the Bradley-Terry model says P(i over j) = sigmoid(r_i - r_j). The loss
is the mean over the C(K, 2) comparable pairs of the cross-entropy between that and the annotator's verdict (Ouyang et
al. 2022, equation 1: all pairs of a prompt are one element, so that each response is forwarded once).

A tie has the verdict one half: its cross-entropy is least at equal rewards, where it is log 2, and its gradient
(sigmoid(d) - 1/2) pulls the two together. A pair with an unranked response is not comparable.

Shapes: N responses of all prompts laid end to end, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Comparable pairs as places in the N responses. `weight_P` of one prompt sums to 1 when no tie is discounted."""

    first_P: Tensor
    second_P: Tensor
    target_P: Tensor  # the preference for `first`: 1, or 1/2 for a tie
    weight_P: Tensor

    def to(self, device: torch.device) -> Pairs:
        return Pairs(
            first_P=self.first_P.to(device), second_P=self.second_P.to(device),
            target_P=self.target_P.to(device), weight_P=self.weight_P.to(device),
        )  # fmt: skip


def comparable_pairs(ranks: Sequence[int | None]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Strict pairs as (better, worse) and tied pairs, as places in `ranks` (1 is best, None unranked)."""
    strict, tied = [], []
    known = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
    for place, (rank_i, i) in enumerate(known):
        for rank_j, j in known[place + 1 :]:
            if rank_i == rank_j:
                tied.append((i, j))
            else:
                strict.append((i, j) if rank_i < rank_j else (j, i))
    return strict, tied


def make_pairs(rankings: Sequence[Sequence[int | None]], tie_weight: float) -> Pairs:
    """The pairs of several prompts, whose responses lie end to end in the same order.

    Each pair weighs 1 / (comparable pairs of its prompt), a tie `tie_weight` times that. With `tie_weight` 0 a tie is
    not comparable and is not counted either.
    """
    rows: list[tuple[int, int, float, float]] = []
    offset = 0
    for ranks in rankings:
        strict, tied = comparable_pairs(ranks)
        tied = tied if tie_weight > 0 else []
        count = len(strict) + len(tied)
        rows += [(offset + i, offset + j, 1.0, 1 / count) for i, j in strict]
        rows += [(offset + i, offset + j, 0.5, tie_weight / count) for i, j in tied]
        offset += len(ranks)
    first, second, target, weight = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Pairs(
        first_P=torch.tensor(first, dtype=torch.long), second_P=torch.tensor(second, dtype=torch.long),
        target_P=torch.tensor(target), weight_P=torch.tensor(weight),
    )  # fmt: skip


def pair_loss(rewards_N: Tensor, pairs: Pairs) -> Tensor:
    """Sum over prompts of the mean cross-entropy of their pairs, in nats; a scalar.

    With d = r_first - r_second and target t it is softplus(d) - t d, which is -logsigmoid(d) for t = 1.
    """
    difference_P = rewards_N[pairs.first_P] - rewards_N[pairs.second_P]
    return (pairs.weight_P * (functional.softplus(difference_P) - pairs.target_P * difference_P)).sum()


def center_penalty(rewards_N: Tensor, rankings: Sequence[Sequence[int | None]]) -> Tensor:
    """Sum over prompts of the squared mean reward of their ranked responses. The loss sees differences only, so it
    leaves each prompt's level open."""
    total = rewards_N.new_zeros(())
    offset = 0
    for ranks in rankings:
        ranked = [offset + i for i, rank in enumerate(ranks) if rank is not None]
        if ranked:
            total = total + rewards_N[ranked].mean() ** 2
        offset += len(ranks)
    return total
