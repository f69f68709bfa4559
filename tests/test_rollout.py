"""Sampling and log-probs: what stands beside a row, and how it is padded, must not matter.

In float64, on a Llama shape and a GPT-2 shape: rotary positions forgive a missing `position_ids`, learned ones do not.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.logprobs import collate, logprob_and_entropy, response_logits, sequence_logprobs
from rlhf.rollout import Sampling, generate, seed_of
from rlhf.scoring import micro_batches

VOCABULARY, EOS = 13, 1
PROMPTS = [[3, 4, 5], [7] * 9, [2, 3, 1, 0, 6], [9], [3, 4, 5], [12, 0, 0, 2, 8, 8]]
SEEDS = [seed_of(0, i) for i in range(len(PROMPTS))]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=EOS
            )
        )
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # a random model is nearly uniform: scaled up, its context matters
    return model.train()  # as a trainer may leave it: GPT-2 has dropout .1


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def sampling(**changes: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_new_tokens": 10, "eos_id": EOS, "group": 8, **changes})


def test_batch_equals_singles_and_any_grouping(model: Any) -> None:
    together = generate(model, PROMPTS, SEEDS, sampling())
    singles = [generate(model, [p], [s], sampling())[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    backwards = generate(model, PROMPTS[::-1], SEEDS[::-1], sampling(group=4))[::-1]
    assert len({tuple(r.ids) for r in together}) > 3
    for a, b, c in zip(together, singles, backwards, strict=True):
        assert a.ids == b.ids == c.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)
        assert a.logprobs == pytest.approx(c.logprobs, abs=1e-9)


def test_sampled_logprobs_equal_those_of_one_forward_pass(model: Any) -> None:
    """Left padding with a cache against no padding and no cache, at a temperature that is not 1."""
    responses = generate(model, PROMPTS, SEEDS, sampling(temperature=0.7))
    model.eval()
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response.ids])).logits[0] / 0.7
        plain = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(response.ids).unsqueeze(1))[:, 0]
        assert response.logprobs == pytest.approx(plain.tolist(), abs=1e-9)
    model.train()


@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_sequence_logprobs_do_not_depend_on_the_cut(model: Any, micro_tokens: int) -> None:
    responses = generate(model, PROMPTS, SEEDS, sampling())
    out = sequence_logprobs(model, PROMPTS, [r.ids for r in responses], 1.0, micro_tokens)
    for logp, response in zip(out, responses, strict=True):
        assert logp.tolist() == pytest.approx(response.logprobs, abs=1e-9)


def test_responses_end_at_the_end_token_or_at_the_limit(model: Any) -> None:
    for response in generate(model, PROMPTS * 4, [seed_of(1, i) for i in range(len(PROMPTS) * 4)], sampling()):
        assert EOS not in response.ids[:-1]
        assert response.finished == (response.ids[-1] == EOS)
        assert response.finished or len(response.ids) == 10
        assert len(response.logprobs) == len(response.ids)


def test_greedy_takes_the_likeliest_token_whatever_the_seed(model: Any) -> None:
    a = generate(model, PROMPTS, SEEDS, sampling(temperature=0.0))
    b = generate(model, PROMPTS, SEEDS[::-1], sampling(temperature=0.0))
    assert [r.ids for r in a] == [r.ids for r in b]
    model.eval()
    with torch.no_grad():
        assert a[0].ids[0] == int(model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    model.train()


def test_the_sampler_draws_from_the_models_distribution(model: Any) -> None:
    """2,000 first tokens: each frequency within 5 standard errors of its probability at temperature 2."""
    n = 2000
    drawn = generate(model, [PROMPTS[2]] * n, list(range(n)), sampling(temperature=2.0, max_new_tokens=1, group=n))
    counts = torch.bincount(torch.tensor([r.ids[0] for r in drawn]), minlength=VOCABULARY)
    model.eval()
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([PROMPTS[2]])).logits[0, -1] / 2).softmax(-1)
    model.train()
    assert bool(((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-3).all())


def test_only_response_positions_reach_the_output_layer(model: Any) -> None:
    rows = collate([[3, 4, 5], [7]], [[6, 1], [2, 3, 4, 1]], torch.device("cpu"))
    assert rows.ids_BT.tolist() == [[3, 4, 5, 6, 1], [7, 2, 3, 4, 1]]
    assert rows.take_N.tolist() == [2, 3, 5, 6, 7, 8]  # row 1 begins at 5; its prompt of one token predicts the first
    assert rows.targets_N.tolist() == [6, 1, 2, 3, 4, 1]
    with torch.no_grad():
        assert response_logits(model, rows).shape == (6, VOCABULARY)


def test_logprob_and_entropy_by_hand() -> None:
    """p = (1/2, 1/4, 1/4, 0) at temperature 1; the gradient of log p_t is (onehot_t - p) / temperature."""
    weights = torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    logits = weights.log().expand(2, 4).clone().requires_grad_()
    logp, entropy = logprob_and_entropy(logits, torch.tensor([0, 2]), 1.0)
    assert logp.tolist() == pytest.approx([-math.log(2), -math.log(4)], abs=1e-12)
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 2, abs=1e-12)
    assert not entropy.requires_grad
    (logp * torch.tensor([1.0, 3.0])).sum().backward()
    expected = [[0.5, -0.25, -0.25, 0.0], [-1.5, -0.75, 2.25, 0.0]]
    assert logits.grad is not None
    assert torch.allclose(logits.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_logprob_and_entropy_at_a_temperature() -> None:
    """Squared weights at temperature 1/2: p = (4, 1, 1) / 6, whose gradient is doubled."""
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    logp, entropy = logprob_and_entropy(logits, torch.tensor([1]), 0.5)
    logp.sum().backward()
    assert float(logp.detach()) == pytest.approx(-math.log(6), abs=1e-12)
    assert float(entropy) == pytest.approx(2 / 3 * math.log(1.5) + math.log(6) / 3, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.tolist()[0] == pytest.approx([-4 / 3, 5 / 3, -1 / 3], abs=1e-12)


def test_micro_batches_are_sorted_and_keep_the_budget() -> None:
    # 9 alone is over the budget; 4 x 2 = 8; 3 and 2 pad to 6, which is 1 more than they have and saves a pass of 1.
    assert micro_batches([4, 2, 9, 3, 4], 8) == [[2], [0, 4], [3, 1]]
    assert micro_batches([4, 1, 9, 3, 4], 8) == [[2], [0, 4], [3], [1]]  # here it is 2 more


def test_micro_batches_are_the_cheapest_cut() -> None:
    # With a budget of 240 a pass costs 30: 100 | 60 59 | 10 is 230 + 90 = 320, against 378 for 100 60 | 59 10.
    assert micro_batches([60, 10, 100, 59], 240) == [[2], [0, 3], [1]]
    draw = random.Random(0)
    for _ in range(20):
        lengths, budget = [draw.randint(1, 30) for _ in range(7)], draw.choice([16, 40, 64, 1000])
        groups = micro_batches(lengths, budget)
        assert sorted(i for group in groups for i in group) == list(range(7))
        assert [lengths[i] for group in groups for i in group] == sorted(lengths, reverse=True)
        assert _cost([[lengths[i] for i in group] for group in groups], budget) == min(
            _cost(cut, budget) for cut in _cuts(sorted(lengths, reverse=True))
        )


def _cuts(lengths: list[int]) -> list[list[list[int]]]:
    """Every way to cut a list into parts."""
    if not lengths:
        return [[]]
    return [[lengths[:n], *rest] for n in range(1, len(lengths) + 1) for rest in _cuts(lengths[n:])]


def _cost(cut: list[list[int]], budget: int) -> float:
    if any(part[0] * len(part) > budget and len(part) > 1 for part in cut):
        return math.inf
    return sum(part[0] * len(part) for part in cut) + len(cut) * budget / 8


def test_seeds_are_stable_and_parts_do_not_run_together() -> None:
    assert seed_of(1, 23) != seed_of(12, 3)
    assert seed_of(0, "rollout", 1, 0) == 4101451921967884209  # a change of it would change every run
