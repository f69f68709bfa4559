"""Shaped rewards and GAE against values worked by hand."""

from __future__ import annotations

import torch

from rlhf.advantages import gae, shaped_rewards, token_mask


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_score_lands_on_the_last_token_and_kl_on_each() -> None:
    torch.testing.assert_close(shaped_rewards(3.0, tensor(1, 2, -1), 0.1), tensor(-0.1, -0.2, 3.1))


def test_token_scores_land_on_their_tokens() -> None:
    torch.testing.assert_close(shaped_rewards([1.0, 0.0, 2.0], tensor(1, 2, -1), 0.1), tensor(0.9, -0.2, 2.1))


def test_gae_by_hand_with_padding() -> None:
    """gamma = .9, lambda = .5, so each advantage is its delta + .45 of the next one.

    Row 0: r = 0, 0, 1; V = .5, .4, .2. delta = .36 - .5 = -.14; .18 - .4 = -.22; 1 - .2 = .8.
           A_2 = .8; A_1 = -.22 + .36 = .14; A_0 = -.14 + .063 = -.077.
    Row 1: two tokens, r = 1, 2; V = 1, 1. delta = 1 + .9 - 1 = .9; 2 - 1 = 1. A_1 = 1; A_0 = .9 + .45 = 1.35.
    What stands in the padding (7, 9) counts nowhere.
    """
    rewards = torch.stack([tensor(0, 0, 1), tensor(1, 2, 7)])
    values = torch.stack([tensor(0.5, 0.4, 0.2), tensor(1, 1, 9)])
    mask = token_mask(torch.tensor([3, 2]), 3)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.stack([tensor(-0.077, 0.14, 0.8), tensor(1.35, 1, 0)]))
    torch.testing.assert_close(returns, torch.stack([tensor(0.423, 0.54, 1), tensor(2.35, 2, 0)]))


def test_gae_at_lambda_one_is_the_discounted_sum_less_the_value() -> None:
    # Rewards 1, 2, 4 at gamma = .5: 1 + 1 + 1 = 3, 2 + 2 = 4, 4.
    rewards, values = tensor(1, 2, 4).unsqueeze(0), tensor(10, 20, 30).unsqueeze(0)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    torch.testing.assert_close(advantages[0], tensor(-7, -16, -26))
    torch.testing.assert_close(returns[0], tensor(3, 4, 4))
