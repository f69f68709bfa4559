"""Shaped rewards and GAE against values worked by hand."""

from __future__ import annotations

import torch

from rlhf.advantages import adapted_coef, gae, group_norm, rloo, shaped_rewards, token_mask


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


GROUPED = torch.tensor([[0.0, 1, 7], [2, 1, 1], [0, 5, 0], [3, 7, 7]], dtype=torch.float64)  # returns 1, 4, 5, 3
GROUPED_MASK = token_mask(torch.tensor([2, 3, 2, 1]), 3)


def test_rloo_compares_a_response_with_the_others_to_its_prompt() -> None:
    """Groups of two: 1 against 4, 5 against 3. One group of four: 1 - 12/3, 4 - 9/3, 5 - 8/3, 3 - 10/3."""
    advantages, returns = rloo(GROUPED, GROUPED_MASK, 2)
    torch.testing.assert_close(
        advantages, torch.stack([tensor(-3, -3, 0), tensor(3, 3, 3), tensor(2, 2, 0), tensor(-2, 0, 0)])
    )
    torch.testing.assert_close(
        returns, torch.stack([tensor(1, 1, 0), tensor(4, 4, 4), tensor(5, 5, 0), tensor(3, 0, 0)])
    )
    torch.testing.assert_close(rloo(GROUPED, GROUPED_MASK, 4)[0][:, 0], tensor(-3, 1, 7 / 3, -1 / 3))


def test_group_norm_is_in_standard_deviations_of_the_group() -> None:
    # Of two numbers at distance d, the std with one below is d / sqrt(2): +-(d/2) / (d / sqrt(2) + 1e-4).
    advantages, _ = group_norm(GROUPED, GROUPED_MASK, 2)
    a, b = 1.5 / (3 / 2**0.5 + 1e-4), 1 / (2 / 2**0.5 + 1e-4)
    torch.testing.assert_close(
        advantages, torch.stack([tensor(-a, -a, 0), tensor(a, a, a), tensor(b, b, 0), tensor(-b, 0, 0)])
    )
    # A group of equals teaches nothing.
    assert not group_norm(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool), 2)[0].any()


def test_the_coefficient_follows_the_kl() -> None:
    # 10 % over the target, 100 of 1,000 episodes: 1 + .1 * .1. Far off either way counts as a fifth.
    assert adapted_coef(0.5, 6.6, 6.0, 100, 1000) == 0.5 * (1 + (6.6 / 6.0 - 1) * 0.1)
    assert adapted_coef(0.5, 600.0, 6.0, 100, 1000) == 0.5 * 1.02
    assert adapted_coef(0.5, 0.0, 6.0, 100, 1000) == 0.5 * 0.98
    assert adapted_coef(0.5, 6.0, 6.0, 100, 1000) == 0.5
