"""PPO's losses for each token, and what is computed from log-probabilities alone. Pure functions of tensors.

All tensors are flat [N]: the N response tokens of some episodes laid end to end, so nothing is padded and nothing is
masked. A loss of a minibatch is the sum over its tokens divided by the number of its tokens, however it is cut.
Sources: clipped objective and value clip, Schulman et al. 1707.06347 and its reference code; k1 and k3, Schulman,
"Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A) for each token, with ratio = exp(logp - old_logp).

    With `dual_clip` the loss of a negative advantage is at most dual_clip * |A| (Ye et al. 1912.09729): a ratio that
    has run away gives no gradient.
    """
    ratio = (logp - old_logp).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error for each token: the larger of that of `values` and that of `values` kept within `clip` of
    `old_values`. `clip` None: plain."""
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns).square())


def kl_k1(logp: Tensor, other_logp: Tensor) -> Tensor:
    """log p - log q for each token sampled from p: an unbiased estimate of KL(p || q) that can be negative."""
    return logp - other_logp


def kl_k3(logp: Tensor, other_logp: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) for each token sampled from p: an unbiased estimate of KL(p || q) that is never negative."""
    log_ratio = other_logp - logp
    return log_ratio.expm1() - log_ratio


def whiten(x: Tensor) -> Tensor:
    """`x` shifted to mean 0 and scaled to (population) variance 1."""
    return (x - x.mean()) * (x.var(correction=0) + 1e-8).rsqrt()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 when the returns do not vary."""
    spread = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0
