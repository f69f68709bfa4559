"""From prompts to episodes that can be learned from: draw, sample, score, compare with the reference, estimate.

Shapes: B episodes, T the longest response, N all response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.advantages import gae, group_norm, rloo, shaped_rewards, token_mask
from rlhf.config import Estimator, KlPlace, PpoConfig
from rlhf.engine.ranks import Ranks
from rlhf.logprobs import collate, sequence_logprobs
from rlhf.losses import kl_k1, whiten
from rlhf.ppo.engines import RolloutEngine, checked_responses
from rlhf.ppo.finite import require_finite
from rlhf.ppo.roles import Critic, Roles
from rlhf.ppo.sharing import each, own_groups, shares
from rlhf.render import Renderer
from rlhf.rewards import BuiltReward, Score, checked_scores
from rlhf.rollout import Sampling, seed_of
from rlhf.scoring import micro_batches
from rlhf.types import Prompt


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass(kw_only=True, slots=True)
class Episode:
    """One response and what is known about it; tensors are on the CPU, one number for each response token."""

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    text: str
    place: int = 0  # in the batch of all ranks
    logp: Tensor  # of the policy that sampled it, at the sampling temperature
    reference: Tensor = field(default_factory=_empty)
    values: Tensor = field(default_factory=_empty)
    raw: float = 0.0  # what the reward said, summed over its tokens
    details: dict[str, float] = field(default_factory=dict)  # what it is made of, if it says so
    score: Score = 0.0  # normalised, clipped, with the penalty for having no end
    rewards: Tensor = field(default_factory=_empty)
    advantages: Tensor = field(default_factory=_empty)
    returns: Tensor = field(default_factory=_empty)

    @property
    def name(self) -> str:
        return self.prompt.id or self.prompt.where

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.ids)

    @property
    def kl(self) -> Tensor:
        """log p_policy - log p_reference of each token."""
        return kl_k1(self.logp, self.reference)


def draw(prompts: Sequence[Prompt], seed: int, update: int, batch: int, group: int) -> list[tuple[Prompt, int]]:
    """The prompts of an update (from 1), each `group` times in a row, and the seed of each sample: a function of its
    arguments alone, so that the place in the data needs no state. Each pass over the prompts is a permutation."""
    drawn = []
    order: list[int] = []
    epoch = -1
    for sample in range((update - 1) * batch, update * batch):
        place = sample // group
        if place // len(prompts) != epoch:
            epoch = place // len(prompts)
            generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
            order = torch.randperm(len(prompts), generator=generator).tolist()
        drawn.append((prompts[order[place % len(prompts)]], seed_of(seed, "rollout", update, sample)))
    return drawn


def rollout(
    engine: RolloutEngine, policy: Any, renderer: Renderer, cfg: PpoConfig, drawn: Sequence[tuple[Prompt, int]],
    ranks: Ranks | None = None,
) -> list[Episode]:  # fmt: skip
    """Sample one response for each drawn prompt, on several ranks for this rank's decode groups of them. Its token ids
    are kept as they were sampled."""
    every_ids = [renderer.prompt_ids(prompt.messages) for prompt, _ in drawn]
    own = own_groups([len(ids) for ids in every_ids], cfg.decode_group, ranks or Ranks())
    if not own:
        return []
    prompt_ids = [every_ids[i] for i in own]
    sampling = Sampling(cfg.temperature, cfg.max_new_tokens, renderer.eos_id, cfg.decode_group)
    responses = engine.generate(policy, prompt_ids, [drawn[i][1] for i in own], sampling)
    checked_responses(responses, len(own), sampling)
    dtype = torch.float64 if next(policy.parameters()).dtype == torch.float64 else torch.float32
    return [
        Episode(
            prompt=drawn[i][0], prompt_ids=ids, ids=response.ids, finished=response.finished, place=i,
            text=renderer.decode(response.ids), logp=torch.tensor(response.logprobs, dtype=dtype),
        )
        for i, ids, response in zip(own, prompt_ids, responses, strict=True)
    ]  # fmt: skip


def score(episodes: Sequence[Episode], built: BuiltReward, renderer: Renderer, cfg: PpoConfig) -> None:
    """Fill `raw` and `score`."""
    if not episodes:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = [renderer.prompt_text(e.prompt.messages) for e in episodes]
    rows = [{**e.prompt.tags, "messages": e.prompt.messages} for e in episodes]
    names, lengths = [e.name for e in episodes], [len(e.ids) for e in episodes]
    with torch.autocast(device, enabled=False):  # a reward scores here what it scores alone
        scores = checked_scores(built.reward, texts, [e.text for e in episodes], rows, names, lengths)
    details: Mapping[str, Sequence[float]] = getattr(built.reward, "details", {})
    for i, (episode, raw) in enumerate(zip(episodes, scores, strict=True)):
        episode.raw = sum(raw) if isinstance(raw, list) else raw
        episode.details = {name: float(parts[i]) for name, parts in details.items()}
        episode.score = paid(raw, built, cfg, finished=episode.finished)


def paid(raw: Score, built: BuiltReward, cfg: PpoConfig, *, finished: bool) -> Score:
    """What a response earns for the score `raw`. The penalty for a cut response comes after the clip, which would
    swallow it. Per-token scores are scaled only: a shift of each would pay for length."""
    mean, std = (built.mean, built.std) if cfg.normalize_reward else (None, None)
    bound = float("inf") if cfg.reward_clip is None else cfg.reward_clip
    penalty = 0.0 if finished else cfg.no_eos_penalty
    if isinstance(raw, list):
        each = [max(-bound, min(bound, value / (std or 1.0))) for value in raw]
        return [*each[:-1], each[-1] - penalty]
    return max(-bound, min(bound, (raw - (mean or 0.0)) / (std or 1.0))) - penalty


def compare(episodes: Sequence[Episode], roles: Roles, cfg: PpoConfig, update: int) -> None:
    """Fill `reference`; `values` with zeros, which is what they are without a critic."""
    prompts, responses = [e.prompt_ids for e in episodes], [e.ids for e in episodes]
    reference = sequence_logprobs(roles.reference, prompts, responses, cfg.temperature, cfg.micro_tokens)
    for episode, logp in zip(episodes, reference, strict=True):
        episode.reference, episode.values = logp, torch.zeros_like(logp)
    for field_name in ("logp", "reference"):
        require_finite_rows(episodes, field_name, update)


def require_finite_rows(episodes: Sequence[Episode], field_name: str, update: int) -> None:
    """TrainingError that names the rows whose `field_name` is not finite."""
    bad = [e.name for e in episodes if not torch.isfinite(getattr(e, field_name)).all()]
    require_finite(not bad, f"rollout {field_name}", update, bad)


def dealt(ranks: Ranks, sample: Callable[[], list[Episode]]) -> list[Episode]:
    """This rank's share, by tokens, of the episodes that `sample` gave on all ranks: what a rank decodes is cut by
    groups, which are few and of unlike lengths. Errors as `each` has them."""
    episodes = _in_order(each(ranks, sample))
    return [episodes[i] for i in shares([e.tokens for e in episodes], ranks.size)[ranks.rank]]


def together(ranks: Ranks, episodes: list[Episode]) -> list[Episode]:
    """The episodes of all ranks, in the order of their prompts."""
    return _in_order(ranks.gather(episodes))


def _in_order(parts: Sequence[Sequence[Episode]]) -> list[Episode]:
    return sorted((e for part in parts for e in part), key=lambda e: e.place)


def read_values(critic: Critic, episodes: Sequence[Episode], micro_tokens: int) -> list[Tensor]:
    """The critic's value of each response token of each episode, without gradient."""
    device = critic.head.weight.device
    out: list[Tensor] = [torch.empty(0)] * len(episodes)
    with torch.no_grad():
        for cut in micro_batches([e.tokens for e in episodes], micro_tokens):
            rows = collate([episodes[i].prompt_ids for i in cut], [episodes[i].ids for i in cut], device)
            for i, values in zip(cut, torch.split(critic(rows).cpu(), rows.counts), strict=True):
                out[i] = values.clone()
    return out


def estimate(episodes: Sequence[Episode], cfg: PpoConfig, kl_coef: float) -> None:
    """Fill `rewards`, `advantages` (whitened over all of them if so configured) and `returns`."""
    paid_kl = kl_coef if cfg.kl.place is KlPlace.reward else 0.0
    for episode in episodes:
        episode.rewards = shaped_rewards(episode.score, episode.kl, paid_kl)
    rewards_BT = pad_sequence([e.rewards for e in episodes], batch_first=True)
    values_BT = pad_sequence([e.values for e in episodes], batch_first=True)
    mask_BT = token_mask(torch.tensor([len(e.ids) for e in episodes]), rewards_BT.shape[1])
    advantages_BT, returns_BT = estimated(rewards_BT, values_BT, mask_BT, cfg)
    if cfg.whiten_advantages:
        advantages_BT = torch.zeros_like(advantages_BT).masked_scatter(mask_BT, whiten(advantages_BT[mask_BT]))
    for b, episode in enumerate(episodes):
        episode.advantages = advantages_BT[b, : len(episode.ids)].clone()
        episode.returns = returns_BT[b, : len(episode.ids)].clone()


def estimated(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, cfg: PpoConfig) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT) by the configured estimator."""
    match cfg.estimator:
        case Estimator.gae:
            return gae(rewards_BT, values_BT, mask_BT, cfg.gamma, cfg.lam)
        case Estimator.rloo:
            return rloo(rewards_BT, mask_BT, cfg.group)
        case Estimator.group_norm:
            return group_norm(rewards_BT, mask_BT, cfg.group)
