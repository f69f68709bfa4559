"""From scores to advantages: per-token rewards with a KL penalty and its controller, and the estimators. Pure.

An estimator takes (rewards_BT, values_BT, mask_BT) and gives (advantages_BT, returns_BT), both zero outside the mask.

Shapes: B episodes, T the longest response of them; row b counts up to `lengths_B[b]`, the rest is padding on the right.
A mask is True where a token counts. Sources: GAE, Schulman et al. 1506.02438; KL in the reward and the adaptive
coefficient, Ziegler et al. 1909.08593; RLOO, Ahmadian et al. 2402.14740; group normalisation, Shao et al. 2402.03300.
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


def rloo(rewards_BT: Tensor, mask_BT: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Each response is one action: its advantage, the same on every token, is its return minus the mean return of the
    other responses to its prompt. Rows are ordered by prompt, `group` >= 2 rows each."""
    returns_PG = _returns(rewards_BT, mask_BT, group)
    others_PG = (returns_PG.sum(1, keepdim=True) - returns_PG) / (group - 1)
    return _on_tokens(returns_PG - others_PG, mask_BT), _on_tokens(returns_PG, mask_BT)


def group_norm(rewards_BT: Tensor, mask_BT: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """As `rloo`, with (return - mean) / (std + 1e-4) over the responses to a prompt; the std has `group` - 1 below."""
    returns_PG = _returns(rewards_BT, mask_BT, group)
    advantages_PG = (returns_PG - returns_PG.mean(1, keepdim=True)) / (returns_PG.std(1, keepdim=True) + 1e-4)
    return _on_tokens(advantages_PG, mask_BT), _on_tokens(returns_PG, mask_BT)


def _returns(rewards_BT: Tensor, mask_BT: Tensor, group: int) -> Tensor:
    return (rewards_BT * mask_BT).sum(1).reshape(-1, group)


def _on_tokens(each_PG: Tensor, mask_BT: Tensor) -> Tensor:
    return each_PG.flatten().unsqueeze(1) * mask_BT


def adapted_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL coefficient after `episodes` episodes with mean KL `kl`: it grows by their share of the horizon times the
    relative error, which counts for at most a fifth either way."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)
