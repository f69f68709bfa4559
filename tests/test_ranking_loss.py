"""The ranking losses and their gradients against values worked by hand, and against TRL's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, tensor

from rlhf.ranking_loss import (
    RankingLoss,
    center_penalty,
    choice_loss,
    comparable_pairs,
    make_choices,
    make_pairs,
    pair_loss,
)

Ranks = Sequence[int | None]
LOG2, LOG3, LOG9 = math.log(2), math.log(3), math.log(9)
NU = 2 / 3  # at d = log 9 the three weights are 3, 1/3 and 2/3, so that the probabilities are 3/4, 1/12 and 1/6


@dataclass(kw_only=True)
class Ranked:
    ranks: Ranks
    scores: list[float | None] | None = None
    weight: float = 1.0


def ranked(*rankings: Ranks) -> list[Ranked]:
    return [Ranked(ranks=ranks) for ranks in rankings]


def differentiate(loss: Tensor, *inputs: Tensor) -> tuple[float, list[float]]:
    """The loss, and its gradient by all inputs, end to end."""
    gradients = torch.autograd.grad(loss, inputs)
    return float(loss.detach()), torch.cat([g.reshape(-1) for g in gradients]).tolist()


def bradley_terry(rewards: list[float], ranks: Ranks, ties: bool = True, smoothing: float = 0.0) -> object:
    r = tensor(rewards, requires_grad=True)
    return differentiate(pair_loss(r, make_pairs(ranked(ranks), ties=ties), smoothing=smoothing), r)


def davidson(rewards: list[float], ranks: Ranks, smoothing: float = 0.0) -> object:
    """The last entry of the gradient is that by log nu."""
    r, log_nu = tensor(rewards, requires_grad=True), tensor(math.log(NU), requires_grad=True)
    return differentiate(pair_loss(r, make_pairs(ranked(ranks), ties=True), log_nu, smoothing), r, log_nu)


def plackett_luce(rewards: list[float], ranks: Ranks) -> object:
    r = tensor(rewards, requires_grad=True)
    return differentiate(choice_loss(r, make_choices(ranked(ranks))), r)


def hand(loss: float, gradient: list[float]) -> object:
    return pytest.approx(loss, rel=1e-5), pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_two_responses_are_minus_logsigmoid() -> None:
    """d = log 3: sigmoid = 3/4, loss = log 4/3, gradient = 1/4 apart."""
    assert bradley_terry([LOG3, 0.0], [1, 2]) == hand(math.log(4 / 3), [-1 / 4, 1 / 4])
    assert bradley_terry([LOG3, 0.0], [2, 1]) == hand(math.log(4), [3 / 4, -3 / 4])


def test_half_a_tie_pulls_together() -> None:
    """Target 1/2 at sigmoid 3/4: loss = -(log 3/4 + log 1/4) / 2 = log 4 - log(3)/2, gradient = 3/4 - 1/2."""
    assert bradley_terry([LOG3, 0.0], [1, 1]) == hand(math.log(4) - LOG3 / 2, [1 / 4, -1 / 4])
    assert bradley_terry([5.0, 5.0], [1, 1]) == hand(LOG2, [0.0, 0.0])


def test_half_and_dropped_ties_of_three() -> None:
    """All rewards 0: two strict pairs of log 2 and one tie of log 2 over three pairs; the tie has no gradient."""
    assert bradley_terry([0.0, 0.0, 0.0], [1, 2, 2]) == hand(LOG2, [-1 / 3, 1 / 6, 1 / 6])
    assert bradley_terry([0.0, 0.0, 0.0], [1, 2, 2], ties=False) == hand(LOG2, [-1 / 2, 1 / 4, 1 / 4])


def test_davidson_of_two() -> None:
    """dL/dd = (P(first) - P(second)) / 2 - {1/2, 0}, and dL/dlog nu = P(tie) - {0, 1}."""
    assert davidson([LOG9, 0.0], [1, 2]) == hand(math.log(4 / 3), [-1 / 6, 1 / 6, 1 / 6])
    assert davidson([LOG9, 0.0], [2, 1]) == hand(math.log(12), [5 / 6, -5 / 6, 1 / 6])
    assert davidson([LOG9, 0.0], [1, 1]) == hand(math.log(6), [1 / 3, -1 / 3, -5 / 6])
    assert davidson([1.0, 1.0], [1, 1]) == hand(math.log(4), [0.0, 0.0, -3 / 4])  # nu / (2 + nu) = 1/4


def test_davidson_of_three_with_a_tie() -> None:
    """Two strict pairs of 3/4, and a tie at d = 0 of 1/4."""
    loss = (2 * math.log(4 / 3) + math.log(4)) / 3
    assert davidson([LOG9, 0.0, 0.0], [1, 2, 2]) == hand(loss, [-1 / 9, 1 / 18, 1 / 18, (1 / 3 - 3 / 4) / 3])


def test_davidson_of_four_with_a_tie_and_one_unranked() -> None:
    """(0, 1) ties at log 9: 1/6. (0, 3) is strict: 3/4. (1, 3) is strict at d = 0: 1 / (2 + 2/3) = 3/8."""
    loss = (math.log(6) + math.log(4 / 3) + math.log(8 / 3)) / 3
    gradient = [(1 / 3 - 1 / 6) / 3, (-1 / 3 - 1 / 2) / 3, 0.0, (1 / 6 + 1 / 2) / 3, (-5 / 6 + 1 / 6 + 1 / 4) / 3]
    assert davidson([LOG9, 0.0, 5.0, 0.0], [1, 1, None, 2]) == hand(loss, gradient)


def test_four_with_one_unranked() -> None:
    """Three ranked ones make three pairs; each strict one at zero has gradient 1/2."""
    assert bradley_terry([0.0, 9.0, 0.0, 0.0], [3, None, 1, 2]) == hand(LOG2, [1 / 3, 0.0, -1 / 3, 0.0])


def test_four_strict_are_six_pairs() -> None:
    assert len(comparable_pairs([4, 3, 2, 1])[0]) == 6
    assert bradley_terry([0.0] * 4, [1, 2, 3, 4]) == hand(LOG2, [-3 / 12, -1 / 12, 1 / 12, 3 / 12])


def test_smoothing_moves_a_strict_target_and_no_tie() -> None:
    """A tenth on the other verdict: -(0.9 log 3/4 + 0.1 log 1/4), gradient 3/4 - 0.9."""
    assert bradley_terry([LOG3, 0.0], [1, 2], smoothing=0.1) == hand(math.log(4) - 0.9 * LOG3, [-0.15, 0.15])
    loss = 0.9 * math.log(4 / 3) + 0.1 * math.log(12)
    assert davidson([LOG9, 0.0], [1, 2], smoothing=0.1) == hand(loss, [1 / 3 - 0.4, 0.4 - 1 / 3, 1 / 6])
    assert davidson([LOG9, 0.0], [1, 1], smoothing=0.1) == davidson([LOG9, 0.0], [1, 1])


def test_plackett_luce_of_three() -> None:
    """Weights 3, 2, 1: the first out of all is 3/6, the second out of the rest 2/3; their mean over two choices."""
    rewards = [LOG3, LOG2, 0.0]
    assert plackett_luce(rewards, [1, 2, 3]) == hand((LOG2 + math.log(3 / 2)) / 2, [-1 / 4, 0.0, 1 / 4])
    # worst first: 1/6, then 2/5
    gradient = [(1 / 2 + 3 / 5) / 2, (1 / 3 - 3 / 5) / 2, (1 / 6 - 1) / 2]
    assert plackett_luce(rewards, [3, 2, 1]) == hand((math.log(6) + math.log(5 / 2)) / 2, gradient)


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    assert plackett_luce([LOG3, 0.0], [2, 1]) == bradley_terry([LOG3, 0.0], [2, 1])


def test_plackett_luce_of_four_with_a_tie_and_one_unranked() -> None:
    """Each of the two best is chosen before the last: 3/4 and 2/3."""
    gradient = [-1 / 8, -1 / 6, 0.0, (1 / 4 + 1 / 3) / 2]
    assert plackett_luce([LOG3, LOG2, 5.0, 0.0], [1, 1, None, 2]) == hand(LOG2 / 2, gradient)


def test_plackett_luce_of_four_at_equal_rewards() -> None:
    """Choices out of 4, 3 and 2: log 24 / 3."""
    gradient = [-3 / 4 / 3, (1 / 4 - 2 / 3) / 3, (1 / 4 + 1 / 3 - 1 / 2) / 3, (1 / 4 + 1 / 3 + 1 / 2) / 3]
    assert plackett_luce([0.0] * 4, [1, 2, 3, 4]) == hand(math.log(24) / 3, gradient)


@pytest.mark.parametrize(("loss", "ties"), [("pairs", "davidson"), ("pairs", "half"), ("plackett_luce", "drop")])
def test_two_without_ties_equal_trl(loss: str, ties: str) -> None:
    """TRL's own `compute_loss` on a model that returns these scores, with the mean over pairs that it takes."""
    from trl import RewardTrainer

    better, worse = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)) * 4
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=None), _tp_size=1,
        accelerator=accelerator, _total_train_tokens=0, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    scores = torch.cat([better, worse]).requires_grad_()
    inputs = {"attention_mask": torch.ones(1)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    (gradient,) = torch.autograd.grad(theirs, scores)

    rankings = ranked(*[[1, 2], [2, 1]] * 3, [1, 2])
    rewards = torch.stack([better, worse], 1)
    rewards[1::2] = rewards[1::2].flip(1)  # every other row has its better response second
    ours, mine = differentiate(_mean(RankingLoss(rankings, loss=loss, ties=ties), rankings, rewards), rewards)
    assert ours == pytest.approx(float(theirs.detach()), abs=1e-6)
    each = tensor(mine).reshape(7, 2)
    each[1::2] = each[1::2].flip(1)
    torch.testing.assert_close(each.T.reshape(-1), gradient, rtol=0, atol=1e-6)


def _mean(loss: RankingLoss, rankings: list[Ranked], rewards: Tensor) -> Tensor:
    total: Tensor = loss(rewards.requires_grad_().reshape(-1), loss.targets(rankings))
    return total / len(rankings)


KINDS = [("pairs", "davidson", 0.1), ("pairs", "half", 0.0), ("pairs", "drop", 0.0), ("plackett_luce", "drop", 0.0)]
MIXED: list[Ranks] = [[2, 1], [1, 2, 2], [3, 1, None, 1], [1, 2, 3, 4, 4]]


@pytest.mark.parametrize(("kind", "ties", "smoothing"), KINDS)
def test_cutting_and_reordering_change_nothing(kind: str, ties: str, smoothing: float) -> None:
    """One batch of all prompts, or prompt by prompt with the responses of each the other way round: one sum."""
    rankings = ranked(*MIXED)
    loss = RankingLoss(rankings, loss=kind, ties=ties, smoothing=smoothing)
    rewards = torch.randn(14, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs = [rewards, *loss.parameters()]
    whole, gradient = differentiate(loss(rewards, loss.targets(rankings)), *inputs)
    parts, start = [], 0
    for ranks in MIXED:
        own = rewards[start : start + len(ranks)].flip(0)
        parts.append(loss(own, loss.targets(ranked([*ranks][::-1]))))
        start += len(ranks)
    cut, mine = differentiate(torch.stack(parts).sum(), *inputs)
    assert cut == pytest.approx(whole, rel=1e-6)
    assert mine == pytest.approx(gradient, rel=1e-5, abs=1e-6)
    assert len(mine) == 14 + (ties == "davidson")


def test_prompts_count_alike_whatever_their_pairs() -> None:
    """Six pairs of one prompt weigh as the one pair of another: log 2 each."""
    pairs = make_pairs(ranked([1, 2, 3, 4], [2, 1]), ties=True)
    assert float(pair_loss(torch.zeros(6), pairs)) == pytest.approx(2 * LOG2)
    assert pairs.weight_P.tolist() == pytest.approx([1 / 6] * 6 + [1.0])
    assert (int(pairs.first_P[-1]), int(pairs.second_P[-1])) == (5, 4)


def test_weights_count_in_proportion_to_their_mean_in_training() -> None:
    """Weights 3 and 1 of mean 2: 3/2 log 4/3 + 1/2 log 4, and the same for 30 and 10."""
    for factor in (1.0, 10.0):
        rankings = [Ranked(ranks=[1, 2], weight=3 * factor), Ranked(ranks=[2, 1], weight=factor)]
        for kind in ({}, {"loss": "plackett_luce", "ties": "drop"}):
            loss, r = RankingLoss(rankings, **kind), tensor([LOG3, 0.0] * 2, requires_grad=True)  # type: ignore[arg-type]
            found = differentiate(loss(r, loss.targets(rankings)), r)
            gradient = [-3 / 8, 3 / 8, 3 / 8, -3 / 8]  # 3/2 of 1/4 and 1/2 of 3/4
            assert found == hand(1.5 * math.log(4 / 3) + 0.5 * math.log(4), gradient)
            alone = loss(r[:2], loss.targets(rankings[:1]))  # an update with the heavy one only: its weight stays
            assert float(alone.detach()) == pytest.approx(1.5 * math.log(4 / 3))


def test_nu_starts_from_weighted_counts() -> None:
    """One tie of weight 3, two strict pairs of weight 1: nu = 2 * 3 / 2."""
    assert RankingLoss([Ranked(ranks=[1, 1], weight=3.0), *ranked([1, 2], [2, 1])]).nu == pytest.approx(3.0)


def test_margin_is_taken_off_the_lead() -> None:
    """Scores 5 and 3 at 1/2 a point: d - 1. With d = 1 + log 3 that is the log 3 of the first test; a tie has none."""
    ranking = Ranked(ranks=[2, None, 1], scores=[3.0, None, 5.0])
    r = tensor([0.0, 7.0, 1 + LOG3], requires_grad=True)
    found = differentiate(pair_loss(r, make_pairs([ranking], ties=True, margin=0.5)), r)
    assert found == hand(math.log(4 / 3), [1 / 4, 0.0, -1 / 4])
    tied = Ranked(ranks=[1, 1, 2], scores=[4.0, 4.0, 0.0])
    assert make_pairs([tied], ties=True, margin=0.5).margin_P.tolist() == [2.0, 2.0, 0.0]
    assert make_pairs(ranked([1, 1, 2]), ties=True, margin=0.5).margin_P.tolist() == [0.0] * 3


def test_nu_starts_where_equal_rewards_have_no_gradient() -> None:
    """Ties weigh 1 + 1/3 and strict pairs 2/3 + 1: nu = 2 (4/3) / (5/3) = 8/5."""
    rankings = ranked([1, 1], [1, 2, 2], [2, 1])
    loss = RankingLoss(rankings)
    assert loss.nu == pytest.approx(8 / 5)
    _, gradient = differentiate(loss(torch.zeros(7), loss.targets(rankings)), *loss.parameters())
    assert gradient == pytest.approx([0.0], abs=1e-6)


def test_what_each_loss_reads() -> None:
    """Without ties in training Davidson's has no parameter, and a held-out tie no likelihood."""
    strict, tied, one = ranked([1, 2], [1, 1], [1, None])
    found = [RankingLoss([strict, tied], ties=ties) for ties in ("davidson", "half", "drop")]
    found += [RankingLoss([strict]), RankingLoss([strict, tied], loss="plackett_luce", ties="drop")]
    assert [loss.reads(tied) for loss in found] == [True, True, False, False, False]
    assert [loss.nu is None for loss in found] == [False, True, True, True, True]
    assert all(loss.reads(strict) and not loss.reads(one) for loss in found)
    assert float(found[3](torch.zeros(2), found[3].targets([tied]))) == 0.0


def test_large_differences_stay_finite() -> None:
    assert bradley_terry([1000.0, -1000.0], [2, 1]) == hand(2000.0, [1.0, -1.0])
    assert plackett_luce([1000.0, -1000.0], [2, 1]) == hand(2000.0, [1.0, -1.0])
    # of a tie: d/2 - log nu
    assert davidson([1000.0, -1000.0], [1, 1]) == hand(1000 - math.log(NU), [1 / 2, -1 / 2, -1.0])


def test_center_penalty_is_the_squared_mean_of_each_prompt() -> None:
    """(1 + 3) / 2 = 2 squared, the unranked 9 left out, plus (-1) squared."""
    assert float(center_penalty(tensor([1.0, 9.0, 3.0, -1.0, -1.0]), ranked([1, None, 2], [1, 2]))) == 5.0
