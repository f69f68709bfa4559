"""The parts of an update: how a batch is cut cannot matter, and each number is what the definition says."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ppo_tiny import ppo_config, prompts
from test_rollout import make

from rlhf.advantages import gae, rloo, shaped_rewards
from rlhf.config import KlConfig, PpoConfig, Schedule
from rlhf.errors import TrainingError
from rlhf.logprobs import collate
from rlhf.ppo.checks import check_action_tokens, check_first_rollout, check_placement
from rlhf.ppo.episodes import Episode, compare, draw, estimate, paid, read_values
from rlhf.ppo.evaluate import distinct, repeated
from rlhf.ppo.roles import Roles, assemble
from rlhf.ppo.update import Learner, rate_factor
from rlhf.rewards import BuiltReward
from rlhf.rollout import Sampling, generate
from rlhf.types import Prompt

SHAPES = [([3, 4, 5], 1.0), ([7] * 9, -1.0), ([2, 3, 0, 0, 6], 0.5), ([9], 2.0), ([12, 2, 8, 8], 0.0)]


def roles_of(kind: str, *, checkpointing: bool = False) -> Roles:
    policy = make(kind)
    with torch.no_grad():
        for p in policy.parameters():
            p.div_(2)
    return assemble(policy, copy.deepcopy(policy.base_model), activation_checkpointing=checkpointing)


def episodes_of(roles: Roles, cfg: PpoConfig) -> list[Episode]:
    ids = [p for p, _ in SHAPES]
    sampled = generate(roles.policy, ids, list(range(len(ids))), Sampling(cfg.temperature, 7, 1))
    episodes = [
        Episode(
            prompt=Prompt(messages=[], id=f"row {i}"), prompt_ids=ids[i], ids=r.ids, finished=r.finished, text="",
            logp=torch.tensor(r.logprobs, dtype=torch.float64), score=SHAPES[i][1],
        )
        for i, r in enumerate(sampled)
    ]  # fmt: skip
    compare(episodes, roles, cfg, 1)
    estimate(episodes, cfg, cfg.kl.coef)
    return episodes


def gradients(kind: str, micro_tokens: int, *, checkpointing: bool = False) -> tuple[dict[str, float], Any]:
    """Sums and gradients of one minibatch, after the policy and the critic have moved off the old ones."""
    roles = roles_of(kind, checkpointing=checkpointing)
    cfg = ppo_config(micro_tokens=micro_tokens, temperature=0.8)
    episodes = episodes_of(roles, ppo_config(temperature=0.8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*roles.policy.parameters(), *roles.critic.parameters()]:
            p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    sums: defaultdict[str, float] = defaultdict(float)
    for role in ("policy", "critic"):
        Learner(roles, cfg, 0).accumulate(role, episodes, 1, sums)
    named = [*roles.policy.named_parameters(), *roles.critic.named_parameters()]
    return dict(sums), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("micro_tokens", "checkpointing"), [(1, False), (20, False), (4096, True)])
def test_the_micro_batch_changes_neither_losses_nor_gradients(
    kind: str, micro_tokens: int, checkpointing: bool
) -> None:
    whole, whole_gradients = gradients(kind, 4096)
    cut, cut_gradients = gradients(kind, micro_tokens, checkpointing=checkpointing)
    assert whole["policy/clip_fraction"] > 0 and whole["policy/kl_old_new"] > 0
    assert cut == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert cut_gradients.keys() == whole_gradients.keys() and len(whole_gradients) > 20
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("micro_tokens", [1, 20, 4096])
def test_the_first_rollout_passes_the_start_up_checks_for_any_cut(kind: str, micro_tokens: int) -> None:
    """And one response, the last of the last minibatch, whose log-probabilities are others does not."""
    cfg = ppo_config(micro_tokens=micro_tokens)
    roles = roles_of(kind)
    episodes = episodes_of(roles, cfg)
    minibatches = [episodes[:2], episodes[2:]]
    check_first_rollout(roles.policy, episodes, minibatches, cfg)
    for noted in (episodes[-1].logp, episodes[-1].reference):
        noted += 2e-4
    with pytest.raises(TrainingError, match="`ratio == 1`"):
        check_first_rollout(roles.policy, episodes, minibatches, cfg)


def test_each_start_up_check_names_itself() -> None:
    cfg = ppo_config()
    roles = roles_of("llama")
    episodes = episodes_of(roles, cfg)
    episodes[2].reference += 2e-4
    with pytest.raises(TrainingError, match=r"`KL\(policy, reference\) == 0`"):
        check_first_rollout(roles.policy, episodes, [episodes], cfg)
    episodes[2].reference -= 2e-4
    other = ppo_config(temperature=1.1)  # sampled at another temperature than trained at
    with pytest.raises(TrainingError, match="`ratio == 1`"):
        check_first_rollout(roles.policy, episodes, [episodes], other)
    rows = collate([e.prompt_ids for e in episodes], [e.ids for e in episodes], torch.device("cpu"))
    with pytest.raises(TrainingError, match="exactly the response tokens"):
        check_action_tokens(rows.ids_BT, rows.take_N - 1, episodes)


def test_placement_is_checked() -> None:
    episodes = episodes_of(roles_of("llama"), ppo_config())

    def early(score: float, kl_T: torch.Tensor, coef: float) -> torch.Tensor:
        rewards = -coef * kl_T
        rewards[0] += score
        return rewards

    def sound(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)[0]

    check_placement(episodes, shaped_rewards, sound)
    check_placement(episodes[:4], shaped_rewards, lambda rewards, mask: rloo(rewards, mask, 2)[0])
    with pytest.raises(TrainingError, match="score on the last real token"):
        check_placement(episodes, early, sound)
    with pytest.raises(TrainingError, match="advantages on exactly the response tokens"):
        check_placement(episodes, shaped_rewards, lambda rewards, mask: torch.ones_like(rewards))
    with pytest.raises(TrainingError, match="advantages on exactly the response tokens"):
        check_placement(episodes, shaped_rewards, lambda rewards, mask: rewards)


def lone(score: Any, kl: Sequence[float], values: Sequence[float]) -> Episode:
    n = len(kl)
    return Episode(
        prompt=Prompt(messages=[]), prompt_ids=[1], ids=[2] * n, finished=True, text="", score=score,
        logp=torch.tensor(kl, dtype=torch.float64), reference=torch.zeros(n, dtype=torch.float64),
        values=torch.tensor(values, dtype=torch.float64),
    )  # fmt: skip


def test_advantages_are_whitened_over_all_episodes_together() -> None:
    """At lambda = gamma = 1 and values 0, a token's return is what is still to come: row 0 gets 1, 1, 1, row 1 gets
    -3; mean 0, variance 3, so 1 / sqrt(3) and -sqrt(3)."""
    cfg = ppo_config(lam=1.0, kl=KlConfig(coef=0.0))
    episodes = [lone(1.0, [0, 0, 0], [0, 0, 0]), lone(-3.0, [0], [0])]
    estimate(episodes, cfg, cfg.kl.coef)
    assert episodes[0].advantages.tolist() == pytest.approx([3**-0.5] * 3)
    assert episodes[1].advantages.tolist() == pytest.approx([-(3**0.5)])
    assert episodes[0].returns.tolist() == [1, 1, 1]
    plain = ppo_config(lam=1.0, kl=KlConfig(coef=0.5), whiten_advantages=False)
    episodes = [lone(1.0, [2, 0], [0, 0.25])]
    estimate(episodes, plain, plain.kl.coef)
    assert episodes[0].rewards.tolist() == [-1.0, 1.0]
    assert episodes[0].advantages.tolist() == [0.0, 0.75]


def test_what_a_response_is_paid() -> None:
    cfg = ppo_config(reward_clip=2.0, no_eos_penalty=1.5)
    known, unknown = (BuiltReward(reward=None, mean=m, std=s) for m, s in ((1.0, 2.0), (None, None)))  # type: ignore[arg-type]
    assert paid(4.0, known, cfg, finished=True) == 1.5
    assert paid(4.0, known, cfg, finished=False) == 0.0
    assert paid(99.0, known, cfg, finished=False) == 0.5  # the clip comes before the penalty
    assert paid(1.5, unknown, cfg, finished=True) == 1.5
    assert paid(1.5, known, ppo_config(normalize_reward=False), finished=True) == 1.5
    assert paid([2.0, -8.0], known, cfg, finished=False) == [1.0, -3.5]


def test_each_pass_draws_every_prompt_once_and_no_seed_twice() -> None:
    rows = prompts(5)
    drawn = [pair for update in (1, 2, 3, 4, 5) for pair in draw(rows, 0, update, 3, 1)]
    for start in (0, 5, 10):
        assert sorted(p.id for p, _ in drawn[start : start + 5]) == sorted(p.id for p in rows)
    assert [p.id for p, _ in drawn[:5]] != [p.id for p, _ in drawn[5:10]]
    assert len({seed for _, seed in drawn}) == 15
    assert draw(rows, 0, 2, 3, 1) == drawn[3:6] != draw(rows, 1, 2, 3, 1)


def test_the_responses_of_a_group_share_a_prompt_and_no_seed() -> None:
    rows = prompts(5)
    drawn = [pair for update in (1, 2, 3, 4, 5) for pair in draw(rows, 0, update, 6, 3)]
    assert [p.id for p, _ in drawn[::3]] == [p.id for p, _ in drawn[1::3]] == [p.id for p, _ in drawn[2::3]]
    assert sorted(p.id for p, _ in drawn[:15:3]) == sorted(p.id for p in rows)
    assert len({seed for _, seed in drawn}) == 30


def test_learning_rates_by_hand() -> None:
    linear, cosine, constant = Schedule.linear, Schedule.cosine, Schedule.constant
    shares = [rate_factor(linear, 0.2, done, 10) for done in (0, 1, 2, 6, 9)]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0.125])
    assert [rate_factor(cosine, 0, done, 4) for done in (0, 2)] == pytest.approx([1, 0.5])
    assert rate_factor(constant, 0, 3, 4) == 1
    assert rate_factor(constant, 0, -1, 4) == 0  # a policy that waits for its critic


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_scale_of_one_roles_loss_does_not_move_the_other(role: str) -> None:
    """Advantages (policy) or returns (critic) times 100: the other role's weights end the same to the bit."""
    ends = []
    for scale in (1.0, 100.0):
        cfg = ppo_config(minibatch=5, batch=5)
        roles = roles_of("llama")
        episodes = episodes_of(roles, cfg)
        for episode in episodes:
            name = "advantages" if role == "policy" else "returns"
            setattr(episode, name, getattr(episode, name) * scale)
        Learner(roles, cfg, 0).learn(episodes, 1)
        other = roles.critic if role == "policy" else roles.policy
        ends.append([p.detach().clone() for p in other.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_update_is_left_when_the_policy_has_moved_past_target_kl() -> None:
    roles = roles_of("llama")
    changes = {"minibatch": 5, "batch": 5, "epochs": 4}
    episodes = episodes_of(roles, ppo_config(**changes))
    free = Learner(copy.deepcopy(roles), ppo_config(**changes), 0).learn(episodes, 1)
    held = Learner(copy.deepcopy(roles), ppo_config(**changes, target_kl=1e-6), 0).learn(episodes, 1)
    assert (free["policy/steps"], held["policy/steps"]) == (4, 1)


@pytest.mark.parametrize("minibatch", [2, 5])
@pytest.mark.parametrize("estimator", ["fresh", "clipped"])
def test_the_pass_that_reads_the_values_is_the_critics_first_step(minibatch: int, estimator: str) -> None:
    """The same update as from values that were read beforehand, whatever part of the batch the first step is."""
    roles = roles_of("llama")
    cfg = ppo_config(minibatch=minibatch, batch=5, epochs=2, value_clip=None if estimator == "fresh" else 0.01)
    with torch.no_grad():
        roles.critic.head.weight.fill_(0.05)
        for p in roles.reference.parameters():
            p.mul_(1.1)  # so that there is a KL to pay
    episodes = episodes_of(roles, cfg)
    twin, again = copy.deepcopy(roles), copy.deepcopy(episodes)
    for episode, values in zip(again, read_values(twin.critic, again, cfg.micro_tokens), strict=True):
        episode.values = values
    estimate(again, cfg, cfg.kl.coef)
    apart = Learner(twin, cfg, 0)
    expected = apart.learn(again, 1)

    learner = Learner(roles, cfg, 0)
    learner.kl_coef = cfg.kl.coef
    learner.appraise(episodes, 1)
    assert all(e.values.abs().min() > 0 for e in episodes)
    estimate(episodes, cfg, cfg.kl.coef)
    for ours, theirs in zip(episodes, again, strict=True):
        torch.testing.assert_close(ours.returns, theirs.returns, rtol=1e-12, atol=1e-14)
    assert learner.learn(episodes, 1) == pytest.approx(expected, rel=1e-9)
    for ours, theirs in zip(roles.critic.parameters(), twin.critic.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_repetition_measures() -> None:
    assert distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert repeated([1, 2, 1, 2, 1], 2) == 0.5
    assert repeated([1], 4) == 0
