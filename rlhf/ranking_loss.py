"""The losses of a reward model on rankings of any number of responses, ties and unranked ones included. torch alone.

All C(K, 2) pairs of a prompt are one element (Ouyang et al. 2022, equation 1), so that each response is forwarded once,
and a prompt counts once whatever its K. With d = r_i - r_j for two responses of one prompt:

- Strict pairs follow Bradley and Terry (1952): P(i over j) = sigmoid(d).
- Ties follow Davidson (1970): the verdicts "i", "j" and "tie" have the weights exp(d/2), exp(-d/2) and nu. Given that a
  pair is not tied, that is Bradley-Terry again, with the same d. Two equally good responses tie with the probability
  nu / (2 + nu). log nu is learnt together with the rewards.
- `half` has no parameter: a tie is a cross-entropy at one half, least at d = 0.
- Plackett and Luce (Luce 1959): a ranked response is chosen out of itself and all worse ones, with the probability
  softmax(r). Responses that tie are each chosen so; which of them is the better is not asked.

A pair or choice with an unranked response is not comparable.

Shapes: N responses of all prompts laid end to end, P pairs, C choices of at most K responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Verdict(Protocol):
    """One annotator's ranking of one prompt's responses: 1 is best, equal numbers tie, None is unranked."""

    @property
    def ranks(self) -> Sequence[int | None]: ...
    @property
    def scores(self) -> Sequence[float | None] | None: ...  # None without a rank
    @property
    def weight(self) -> float: ...


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Comparable pairs as places in the N responses. `weight_P` of one ranking sums to the ranking's weight."""

    first_P: Tensor  # the better one, unless they tie
    second_P: Tensor
    tied_P: Tensor  # 1 or 0
    margin_P: Tensor  # by which the better one has to lead
    weight_P: Tensor

    def to(self, device: torch.device) -> Pairs:
        return Pairs(
            first_P=self.first_P.to(device), second_P=self.second_P.to(device),
            tied_P=self.tied_P.to(device), margin_P=self.margin_P.to(device), weight_P=self.weight_P.to(device),
        )  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Choices:
    """Choices of the best out of several, as places in the N responses. `weight_C` of a ranking sums to its weight."""

    chosen_C: Tensor
    member_CK: Tensor  # the chosen one and all worse ones
    mask_CK: Tensor  # True is a member
    weight_C: Tensor

    def to(self, device: torch.device) -> Choices:
        return Choices(
            chosen_C=self.chosen_C.to(device), member_CK=self.member_CK.to(device),
            mask_CK=self.mask_CK.to(device), weight_C=self.weight_C.to(device),
        )  # fmt: skip


Targets = Pairs | Choices


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


def make_pairs(rankings: Sequence[Verdict], *, ties: bool, margin: float = 0.0) -> Pairs:
    """The pairs of several prompts, whose responses lie end to end in the same order.

    Each pair weighs the ranking's weight / (pairs of the ranking). Without `ties` a tied pair is neither read nor
    counted. The better of a strict pair has to lead by `margin` times the difference of the scores, if there are any.
    """
    rows: list[tuple[int, int, float, float, float]] = []
    offset = 0
    for ranking in rankings:
        strict, tied = comparable_pairs(ranking.ranks)
        tied = tied if ties else []
        weight = ranking.weight / max(len(strict) + len(tied), 1)
        leads = [margin * score_gap(ranking, i, j) for i, j in strict] + [0.0] * len(tied)
        for place, (i, j) in enumerate(strict + tied):
            rows.append((offset + i, offset + j, float(place >= len(strict)), leads[place], weight))
        offset += len(ranking.ranks)
    first, second, tie, lead, weights = zip(*rows, strict=True) if rows else ((),) * 5
    return Pairs(
        first_P=torch.tensor(first, dtype=torch.long), second_P=torch.tensor(second, dtype=torch.long),
        tied_P=torch.tensor(tie), margin_P=torch.tensor(lead), weight_P=torch.tensor(weights),
    )  # fmt: skip


def score_gap(ranking: Verdict, i: int, j: int) -> float:
    """By how much the score of i is above that of j; 0 without scores."""
    if ranking.scores is None:
        return 0.0
    above, below = ranking.scores[i], ranking.scores[j]
    assert above is not None and below is not None  # ranked, so scored
    return above - below


def make_choices(rankings: Sequence[Verdict]) -> Choices:
    """One choice for each ranked response that has a worse one; each weighs the ranking's weight / (its choices)."""
    rows: list[tuple[list[int], float]] = []
    offset = 0
    for ranking in rankings:
        ranks = [(rank, i) for i, rank in enumerate(ranking.ranks) if rank is not None]
        found = [[offset + i, *(offset + j for other, j in ranks if other > rank)] for rank, i in ranks]
        found = [members for members in found if len(members) > 1]
        rows += [(members, ranking.weight / len(found)) for members in found]
        offset += len(ranking.ranks)
    width = max((len(members) for members, _ in rows), default=1)
    places = [members + members[:1] * (width - len(members)) for members, _ in rows]
    inside = [[k < len(members) for k in range(width)] for members, _ in rows]
    member_CK = torch.tensor(places, dtype=torch.long).reshape(-1, width)
    mask_CK = torch.tensor(inside, dtype=torch.bool).reshape(-1, width)
    return Choices(
        chosen_C=member_CK[:, 0], member_CK=member_CK, mask_CK=mask_CK,
        weight_C=torch.tensor([weight for _, weight in rows]),
    )  # fmt: skip


def pair_loss(rewards_N: Tensor, pairs: Pairs, log_nu: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Weighted sum over rankings of the mean negative log-likelihood of their pairs, in nats; a scalar.

    Of a strict pair that is log(exp(d/2) + exp(-d/2) + nu) - d/2, of a tie the same first term - log nu. Without
    `log_nu` nu is 0 and a tie is the cross-entropy at one half, which is the first term alone; a strict pair is
    softplus(-d). `smoothing` is the probability that a strict verdict is the wrong way round (label smoothing).
    The margin of a pair is taken off its d (Llama 2, Touvron et al. 2307.09288, equation 2).
    """
    half_P = (rewards_N[pairs.first_P] - rewards_N[pairs.second_P] - pairs.margin_P) / 2
    loss_P = torch.logaddexp(half_P, -half_P)
    if log_nu is not None:
        loss_P = torch.logaddexp(loss_P, log_nu) - pairs.tied_P * log_nu
    loss_P = loss_P - (1 - pairs.tied_P) * (1 - 2 * smoothing) * half_P
    return (pairs.weight_P * loss_P).sum()


def choice_loss(rewards_N: Tensor, choices: Choices) -> Tensor:
    """Weighted sum over rankings of the mean negative log-likelihood of their choices, in nats; a scalar."""
    members_CK = rewards_N[choices.member_CK].masked_fill(~choices.mask_CK, -math.inf)
    return (choices.weight_C * (members_CK.logsumexp(1) - rewards_N[choices.chosen_C])).sum()


def center_penalty(rewards_N: Tensor, rankings: Sequence[Verdict]) -> Tensor:
    """Sum over prompts of the squared mean reward of their ranked responses. The loss sees differences only, so it
    leaves each prompt's level open."""
    total = rewards_N.new_zeros(())
    offset = 0
    for ranking in rankings:
        ranked = [offset + i for i, rank in enumerate(ranking.ranks) if rank is not None]
        if ranked:
            total = total + rewards_N[ranked].mean() ** 2
        offset += len(ranking.ranks)
    return total


class RankingLoss(nn.Module):
    """The loss with its options and, with Davidson's ties, its parameter `log_nu`.

    loss: "pairs" or "plackett_luce". ties: "davidson", "half" or "drop"; with Plackett-Luce only "drop".
    """

    def __init__(
        self,
        rankings: Sequence[Verdict],
        *,
        loss: str = "pairs",
        ties: str = "davidson",
        smoothing: float = 0.0,
        margin: float = 0.0,
    ) -> None:
        """`rankings`: those of training. log nu starts at its maximum-likelihood estimate for equal rewards, which a
        new head nearly gives: log(2 T / S), for tied pairs of the weight T and strict ones of S. Without a tie there
        is nothing to learn it from: nu is 0, and the loss is Bradley-Terry's."""
        super().__init__()
        assert loss == "pairs" or ties == "drop"
        self.loss, self.smoothing, self.margin = loss, smoothing, margin
        self.mean_weight = math.fsum(ranking.weight for ranking in rankings) / len(rankings)
        self.log_nu: nn.Parameter | None = None
        pairs = make_pairs(rankings, ties=True)
        tied = float((pairs.weight_P * pairs.tied_P).sum())
        strict = float((pairs.weight_P * (1 - pairs.tied_P)).sum())
        if ties == "davidson" and tied > 0 and strict > 0:
            self.log_nu = nn.Parameter(torch.tensor(math.log(2 * tied / strict)))
        self.reads_ties = ties == "half" or self.log_nu is not None

    @property
    def nu(self) -> float | None:
        """None if ties have no parameter."""
        return None if self.log_nu is None else math.exp(float(self.log_nu.detach()))

    def reads(self, ranking: Verdict) -> bool:
        """Whether the ranking has anything that this loss can read."""
        strict, tied = comparable_pairs(ranking.ranks)
        return bool(strict or (tied and self.reads_ties))

    def targets(self, rankings: Sequence[Verdict]) -> Targets:
        if self.loss == "plackett_luce":
            return make_choices(rankings)
        return make_pairs(rankings, ties=self.reads_ties, margin=self.margin)

    def forward(self, rewards_N: Tensor, targets: Targets) -> Tensor:
        """Sum over rankings, in nats, each with its weight over the mean weight of training: only the weights'
        proportions matter, and the loss of an update is on the scale of one without weights."""
        if isinstance(targets, Choices):
            return choice_loss(rewards_N, targets) / self.mean_weight
        return pair_loss(rewards_N, targets, self.log_nu, self.smoothing) / self.mean_weight
