"""Recorded steps of decoding give what unrecorded ones give. On a CPU a tape stands for the GPU's graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lora_toys import disturb, roles_of
from tape import tape
from test_decode_step import SIZES, assert_logprobs_of, of_kind
from test_rollout import PROMPTS, SEEDS, make, sampling
from transformers import OPTConfig, OPTForCausalLM

from rlhf import recorded
from rlhf.kv_cache import BLOCK, RoomyLayer
from rlhf.packed import convenient
from rlhf.ppo.engines import HfRollout
from rlhf.rollout import generate

MANY = PROMPTS * 3
SEED_OF_MANY = [seed + copy for copy in range(3) for seed in SEEDS]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of each recording that is made, with spans of 8 tokens."""
    made: list[tuple[int, int]] = []
    forward = recorded.RecordedSteps._forward

    def noted(self: Any, rows: int, tokens: int) -> Any:
        made.append((rows, tokens))
        return forward(self, rows, tokens)

    monkeypatch.setattr(recorded, "SPAN", 8)
    monkeypatch.setitem(recorded.RECORDERS, "cpu", tape)
    monkeypatch.setattr(recorded.RecordedSteps, "_forward", noted)
    return made


def opt() -> Any:
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=SIZES["vocab_size"], hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        init_std=0.3,
    )  # fmt: skip
    return OPTForCausalLM(shape).double()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "gemma"])
def test_what_is_sampled_is_what_unrecorded_steps_give(kind: str, shapes: list[tuple[int, int]]) -> None:
    """Groups of five rows of several lengths, one group after another in the same room. Rows leave; spans are passed.
    Llama's and Qwen2's steps are the short ones, the others' their own forward passes."""
    gemma = {"head_dim": 4} if kind == "gemma" else {}
    model = {"gpt2": make, "opt": lambda _: opt()}.get(kind, lambda kind: of_kind(kind, **gemma))(kind)
    how = sampling(group=5, max_new_tokens=20)
    plain = generate(model, MANY, SEED_OF_MANY, dataclasses.replace(how, recorded=False))
    assert not shapes and len({len(r.ids) for r in plain}) > 4
    given = generate(model, MANY, SEED_OF_MANY, how)
    assert [r.ids for r in given] == [r.ids for r in plain]
    for a, b in zip(given, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)
    trial, met = shapes[:2], shapes[2:]  # each is run through once before it is recorded
    assert trial == [(2, 8), (2, 8)] and len(met) == 2 * len(set(met))
    assert {rows for rows, _ in met} == {2, 4, 8} and len({tokens for _, tokens in met}) > 2


def test_each_round_has_the_weights_of_its_time(shapes: list[tuple[int, int]]) -> None:
    model = of_kind("llama", torch.float32)
    first = generate(model, PROMPTS, SEEDS, sampling())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    second = generate(model, PROMPTS, SEEDS, sampling())
    assert shapes and [r.ids for r in first] != [r.ids for r in second]
    assert_logprobs_of(model, second, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_role_on_a_shared_base_is_recorded_with_its_adapter(kind: str, shapes: list[tuple[int, int]]) -> None:
    roles = roles_of(kind)
    disturb(roles.policy, by=0.3)
    for role in (roles.policy, roles.reference):
        shapes.clear()
        assert_logprobs_of(role, generate(role, PROMPTS, SEEDS, sampling()), atol=1e-6)
        assert shapes


@pytest.mark.parametrize("why", ["waits", "other result", "window"])
def test_what_cannot_be_recorded_is_decoded_as_always(
    why: str, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = of_kind("mistral", sliding_window=4) if why == "window" else make("gpt2")
    plain = generate(model, PROMPTS, SEEDS, sampling(recorded=False))
    if why == "waits":
        model.transformer.ln_f.register_forward_pre_hook(lambda _, args: (args[0] * float(args[0].new_ones(())),))
    if why == "other result":
        update = recorded._FixedLayer.update
        monkeypatch.setattr(recorded._FixedLayer, "update", lambda self, k, v, *rest: update(self, k, v * 2, *rest))
    shapes.clear()
    for _ in range(2):
        assert [r.ids for r in generate(model, PROMPTS, SEEDS, sampling())] == [r.ids for r in plain]
    assert len(shapes) == (0 if why == "window" else 2)  # the trial's, once
    said = capsys.readouterr().out
    assert said.count("GPT2LMHeadModel cannot be recorded") == (0 if why == "window" else 1)


def test_recording_can_be_switched_off(shapes: list[tuple[int, int]]) -> None:
    model = make("gpt2")
    off = HfRollout(recorded=False).generate(model, PROMPTS, SEEDS, sampling())
    assert not shapes
    on = HfRollout().generate(model, PROMPTS, SEEDS, sampling())
    assert shapes and [r.ids for r in on] == [r.ids for r in off]


def test_room_is_made_at_once_and_holds_nothing_that_is_no_number() -> None:
    """What attention reads under the mask is multiplied by 0, and 0 times NaN is NaN."""
    layer = RoomyLayer((convenient(5), 3 * BLOCK))
    new = torch.ones(3, 2, 4, 6)
    for _ in range(2):
        layer.update(new, new)
        assert [part.shape for part in layer.room] == [(8, 2, 3 * BLOCK, 6)] * 2
    assert layer.keys.shape == (3, 2, 8, 6)
    assert all(float(part.sum()) == 3 * 2 * 8 * 6 for part in layer.room)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here: CUDA graphs are not tried")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cuda_graphs_give_what_started_kernels_give(kind: str) -> None:
    model = make(kind).cuda()
    plain = generate(model, MANY, SEED_OF_MANY, sampling(group=5, recorded=False))
    given = generate(model, MANY, SEED_OF_MANY, sampling(group=5))
    assert recorded._usable[model]
    assert [r.ids for r in given] == [r.ids for r in plain]
    for a, b in zip(given, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)
