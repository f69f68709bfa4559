"""What must hold before the first update: each check stops the run and names itself.

Between them they find what otherwise shows as "PPO does not learn": masks or positions that differ between sampling and
training, a reference that is not the start of the policy, dropout, a score or an advantage on the wrong token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.advantages import shaped_rewards, token_mask
from rlhf.config import PpoConfig
from rlhf.errors import TrainingError
from rlhf.logprobs import collate, evaluating, response_logits, token_logprobs
from rlhf.ppo.episodes import Episode, estimated
from rlhf.scoring import micro_batches

FULL_PRECISION = 1e-4  # max |ratio - 1| in fp32; two orders above what padding and summation order do
HALF_PRECISION = (1e-2, 0.1)  # mean and 99th percentile of |ratio - 1| in bf16
DISTINCT = 32  # probe scores before they repeat; beyond a group's responses, and exact in float64


def check_first_rollout(
    policy: Any, episodes: Sequence[Episode], minibatches: Sequence[Sequence[Episode]], cfg: PpoConfig
) -> None:
    """All start-up checks on the episodes of the first update, cut as they will be trained on."""
    at = next(policy.parameters())
    exact = at.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(at.device.type)
    logp = torch.cat([e.logp for e in episodes])
    _near_one("KL(policy, reference) == 0", logp - torch.cat([e.reference for e in episodes]), exact)
    for minibatch in minibatches:
        _near_one("ratio == 1", _retold(policy, minibatch, cfg) - torch.cat([e.logp for e in minibatch]), exact)
    whole = dataclasses.replace(cfg, gamma=1.0, lam=1.0)
    check_placement(episodes, shaped_rewards, lambda rewards, mask: estimated(rewards, mask * 0.0, mask, whole)[0])


def _retold(policy: Any, minibatch: Sequence[Episode], cfg: PpoConfig) -> Tensor:
    """log p of the minibatch's tokens through the micro-batches of training, in the minibatch's order."""
    device = next(policy.parameters()).device
    out: list[Tensor] = [torch.empty(0)] * len(minibatch)
    with torch.no_grad(), evaluating(policy):
        for cut in micro_batches([e.tokens for e in minibatch], cfg.micro_tokens):
            rows = collate([minibatch[i].prompt_ids for i in cut], [minibatch[i].ids for i in cut], device)
            check_action_tokens(rows.ids_BT, rows.take_N, [minibatch[i] for i in cut])
            logp_N = token_logprobs(response_logits(policy, rows), rows.targets_N, cfg.temperature).cpu()
            for i, part in zip(cut, torch.split(logp_N, rows.counts), strict=True):
                out[i] = part
    return torch.cat(out)


def _near_one(name: str, log_ratio: Tensor, exact: bool) -> None:
    error = log_ratio.float().expm1().abs()
    if exact:
        worst, limit = float(error.max()), FULL_PRECISION
        broken, seen = not worst <= limit, f"max |ratio - 1| = {worst:.2g}, allowed {limit:g}"
    else:
        mean, p99 = float(error.mean()), float(error.sort().values[int(0.99 * (len(error) - 1))])
        broken = not (mean <= HALF_PRECISION[0] and p99 <= HALF_PRECISION[1])
        seen = f"|ratio - 1| has mean {mean:.2g} and 99th percentile {p99:.2g}, allowed {HALF_PRECISION}"
    if broken:
        raise TrainingError(f"start-up check `{name}` failed before any update: {seen}")


def check_action_tokens(ids_BT: Tensor, take_N: Tensor, chosen: Sequence[Episode]) -> None:
    """Every trained place of a micro-batch predicts exactly the next sampled token, and all of them are there."""
    predicted = ids_BT.flatten()[take_N + 1].tolist()
    if predicted != [token for e in chosen for token in e.ids]:
        raise TrainingError("start-up check `losses on exactly the response tokens` failed before any update")


def check_placement(
    episodes: Sequence[Episode], shape: Callable[..., Tensor], estimate: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """With a score and nothing else, on responses of these lengths: the reward is the score on the last real token and
    0 elsewhere, and (at gamma = lambda = 1) the advantage is not 0 exactly on the response tokens.

    The scores are 1, 2, 4, ..., no two alike and none the mean of its neighbours, so that no baseline cancels one.
    """
    lengths_B = torch.tensor([len(e.ids) for e in episodes])
    longest = int(lengths_B.max())
    rewards_BT = torch.zeros(len(episodes), longest, dtype=torch.float64)
    scores_B = 2.0 ** (torch.arange(len(episodes)) % DISTINCT)
    for b, episode in enumerate(episodes):
        no_kl_T = torch.zeros(len(episode.ids), dtype=torch.float64)
        rewards_BT[b, : len(episode.ids)] = shape(float(scores_B[b]), no_kl_T, 1.0)
    last_BT = torch.arange(longest) == (lengths_B - 1).unsqueeze(1)
    if not torch.equal(rewards_BT, last_BT * scores_B.double().unsqueeze(1)):
        raise TrainingError("start-up check `score on the last real token` failed before any update")
    mask_BT = token_mask(lengths_B, longest)
    used = all(len(e.advantages) == len(e.ids) for e in episodes)
    if not (used and torch.equal(estimate(rewards_BT, mask_BT) != 0, mask_BT)):
        raise TrainingError("start-up check `advantages on exactly the response tokens` failed before any update")
