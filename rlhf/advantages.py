"""From scores to advantages: per-token rewards with a KL penalty, and generalised advantage estimation. Pure.

Shapes: B episodes, T the longest response of them; row b counts up to `lengths_B[b]`, the rest is padding on the right.
A mask is True where a token counts. Sources: GAE, Schulman et al. 1506.02438; KL in the
reward, Ziegler et al. 1909.08593.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_mask(lengths_B: Tensor, longest: int) -> Tensor:
    """mask_BT, True on the first `lengths_B[b]` tokens of row b."""
    return torch.arange(longest, device=lengths_B.device) < lengths_B.unsqueeze(1)


def shaped_rewards(score: float | Sequence[float], kl_T: Tensor, coef: float) -> Tensor:
    """rewards_T of one episode: -coef * KL on every token, plus the score on the last one, or one score on each."""
    rewards_T = -coef * kl_T
    if isinstance(score, Sequence):
        return rewards_T + torch.tensor(score, dtype=kl_T.dtype)
    rewards_T[-1] += score
    return rewards_T


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT), zero outside the mask.

    values_BT[b, t] is the value of the state in which token t is chosen. What follows the last token is worth 0: a
    response ends there, and one that was cut is paid for that in its score.
    """
    rewards_BT, values_BT = rewards_BT * mask_BT, values_BT * mask_BT
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = torch.zeros_like(rewards_BT[:, 0])
    running_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        # In the padding rewards and values are 0, so `running` is still 0 when the last real token is reached.
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        running_B = delta_B + gamma * lam * running_B
        advantages_BT[:, t] = running_B
        next_value_B = values_BT[:, t]
    return advantages_BT, (advantages_BT + values_BT) * mask_BT
