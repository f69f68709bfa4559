"""The ranking loss against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.ranking_loss import center_penalty, comparable_pairs, make_pairs, pair_loss


def loss_and_gradient(
    rewards: list[float], ranks: list[int | None], tie_weight: float = 1.0
) -> tuple[float, list[float]]:
    r = torch.tensor(rewards, requires_grad=True)
    loss = pair_loss(r, make_pairs([ranks], tie_weight))
    (gradient,) = torch.autograd.grad(loss, r)
    return float(loss.detach()), gradient.tolist()


LOG2, LOG3 = math.log(2), math.log(3)


def test_two_responses_are_minus_logsigmoid() -> None:
    """d = log 3: sigmoid = 3/4, loss = log 4/3, gradient = 1/4 apart."""
    assert loss_and_gradient([LOG3, 0.0], [1, 2]) == (pytest.approx(math.log(4 / 3)), pytest.approx([-0.25, 0.25]))
    assert loss_and_gradient([LOG3, 0.0], [2, 1]) == (pytest.approx(math.log(4)), pytest.approx([0.75, -0.75]))


def test_tie_pulls_together() -> None:
    """Target 1/2 at sigmoid 3/4: loss = -(log 3/4 + log 1/4) / 2 = log 4 - log(3)/2, gradient = 3/4 - 1/2."""
    loss, gradient = loss_and_gradient([LOG3, 0.0], [1, 1])
    assert loss == pytest.approx(math.log(4) - LOG3 / 2)
    assert gradient == pytest.approx([0.25, -0.25])
    assert loss_and_gradient([5.0, 5.0], [1, 1]) == (pytest.approx(LOG2), [0.0, 0.0])


def test_three_with_a_tie_and_its_weight() -> None:
    """All rewards 0: two strict pairs of log 2 and one tie of log 2 over three pairs; the tie has no gradient."""
    loss, gradient = loss_and_gradient([0.0, 0.0, 0.0], [1, 2, 2])
    assert loss == pytest.approx(LOG2)
    assert gradient == pytest.approx([-1 / 3, 1 / 6, 1 / 6])
    assert loss_and_gradient([0.0, 0.0, 0.0], [1, 2, 2], 0.5)[0] == pytest.approx(2.5 / 3 * LOG2)
    loss, gradient = loss_and_gradient([0.0, 0.0, 0.0], [1, 2, 2], 0.0)  # not counted either
    assert (loss, gradient) == (pytest.approx(LOG2), pytest.approx([-0.5, 0.25, 0.25]))


def test_four_with_one_unranked() -> None:
    """Three ranked ones make three pairs; each strict one at zero has gradient 1/2."""
    loss, gradient = loss_and_gradient([0.0, 9.0, 0.0, 0.0], [3, None, 1, 2])
    assert loss == pytest.approx(LOG2)
    assert gradient == pytest.approx([1 / 3, 0.0, -1 / 3, 0.0])


def test_four_strict_are_six_pairs() -> None:
    assert len(comparable_pairs([4, 3, 2, 1])[0]) == 6
    _, gradient = loss_and_gradient([0.0] * 4, [1, 2, 3, 4])
    assert gradient == pytest.approx([-3 / 12, -1 / 12, 1 / 12, 3 / 12])


def test_prompts_count_alike_whatever_their_pairs() -> None:
    """Six pairs of one prompt weigh as the one pair of another: log 2 each."""
    pairs = make_pairs([[1, 2, 3, 4], [2, 1]], 1.0)
    assert float(pair_loss(torch.zeros(6), pairs)) == pytest.approx(2 * LOG2)
    assert pairs.weight_P.tolist() == pytest.approx([1 / 6] * 6 + [1.0])
    assert (int(pairs.first_P[-1]), int(pairs.second_P[-1])) == (5, 4)


def test_large_differences_stay_finite() -> None:
    assert loss_and_gradient([1000.0, -1000.0], [2, 1])[0] == pytest.approx(2000.0)


def test_center_penalty_is_the_squared_mean_of_each_prompt() -> None:
    """(1 + 3) / 2 = 2 squared, the unranked 9 left out, plus (-1) squared."""
    assert float(center_penalty(torch.tensor([1.0, 9.0, 3.0, -1.0, -1.0]), [[1, None, 2], [1, 2]])) == 5.0
