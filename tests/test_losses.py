"""PPO's losses against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.losses import clipped_policy_loss, clipped_value_loss, explained_variance, kl_k1, kl_k3, whiten


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # a gain is cut at ratio 1.2
        (0.5, 2.0, -1.0),  # a loss of a good token is not cut
        (0.5, -2.0, 1.6),  # less of a bad token is cut at ratio .8
        (1.5, -2.0, 3.0),  # more of a bad token is not cut
    ],
)
def test_policy_loss_is_cut_on_the_side_of_gain_only(ratio: float, advantage: float, loss: float) -> None:
    old = tensor(-1.0)
    out = clipped_policy_loss(old + math.log(ratio), old, tensor(advantage), 0.2)
    torch.testing.assert_close(out, tensor(loss), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("ratio", "slope"), [(1.1, -2.2), (1.5, 0.0)])
def test_policy_gradient_is_minus_ratio_times_advantage_inside_the_clip_and_zero_outside(
    ratio: float, slope: float
) -> None:
    logp = tensor(math.log(ratio)).requires_grad_()
    clipped_policy_loss(logp, tensor(0.0), tensor(2.0), 0.2).sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, tensor(slope))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (4.0, -2.0, 6.0, 0.0),  # 8 would count: cut at 3 * 2, where nothing pulls any more
        (2.5, -2.0, 5.0, 5.0),  # below the bound: as without it
        (4.0, 2.0, -2.4, 0.0),  # a positive advantage knows only the first clip
    ],
)
def test_dual_clip_bounds_the_loss_of_a_bad_token(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logp = tensor(math.log(ratio)).requires_grad_()
    out = clipped_policy_loss(logp, tensor(0.0), tensor(advantage), 0.2, 3.0)
    out.sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(out.detach(), tensor(loss))
    torch.testing.assert_close(logp.grad, tensor(slope))


def test_value_loss_takes_the_larger_error() -> None:
    # Old value 0, return 1: moving to .9 is counted from .2, half of .8 squared; moving away to -.5 counts in full.
    out = clipped_value_loss(tensor(0.9, -0.5, 0.1), tensor(0, 0, 0), tensor(1, 1, 1), 0.2)
    torch.testing.assert_close(out, tensor(0.32, 1.125, 0.405))


def test_value_loss_without_clip_is_half_the_square() -> None:
    torch.testing.assert_close(clipped_value_loss(tensor(0.9), tensor(0), tensor(1), None), tensor(0.005))


def test_kl_estimates() -> None:
    # p = .5, q = .25: k1 = log 2; k3 = q/p - 1 - log(q/p) = .5 - 1 + log 2.
    p, q = tensor(0.5).log(), tensor(0.25).log()
    torch.testing.assert_close(kl_k1(p, q), tensor(math.log(2)))
    torch.testing.assert_close(kl_k3(p, q), tensor(math.log(2) - 0.5))
    # Both have the expectation KL(p || q) = .5 log(.5/.25) + .5 log(.5/.75) on a coin.
    p, q = tensor(0.5, 0.5).log(), tensor(0.25, 0.75).log()
    exact = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float((p.exp() * kl_k1(p, q)).sum()) == pytest.approx(exact)
    assert float((p.exp() * kl_k3(p, q)).sum()) == pytest.approx(exact)


def test_whiten() -> None:
    torch.testing.assert_close(whiten(tensor(1, 3)), tensor(-1, 1), rtol=1e-7, atol=0)
    assert float(whiten(tensor(2, 2)).abs().max()) == 0


def test_explained_variance() -> None:
    assert explained_variance(tensor(1, 2, 3), tensor(1, 2, 3)) == 1
    assert explained_variance(tensor(2, 2, 2), tensor(1, 2, 3)) == 0
    assert explained_variance(tensor(0, 0), tensor(1, 1)) == 0
