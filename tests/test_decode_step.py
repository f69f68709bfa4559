"""A step of decoding without the library's glue gives the model's own logits; where it could not, it is not taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_toys import disturb, roles_of
from test_rollout import EOS, PROMPTS, SEEDS, VOCABULARY, make, sampling
from transformers import AutoConfig, AutoModelForCausalLM

import rlhf.rollout
from rlhf import decode_step as module
from rlhf.decode_step import DecodeStep, decode_step
from rlhf.kv_cache import make_cache
from rlhf.logprobs import sequence_logprobs
from rlhf.rollout import generate

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip


def of_kind(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases start at 0 and norms at 1
            p.copy_(p * 4 + 0.1 * torch.randn_like(p))
    return model


def steps_taken(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], int]:
    """What is sampled, and how many steps went by DecodeStep."""
    count = 0
    step = DecodeStep.__call__

    def counted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        return step(self, *args)

    decode_step(model)  # the trial is not counted
    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return generate(model, PROMPTS, SEEDS, sampling()), count


def assert_logprobs_of(model: Any, responses: list[Any], atol: float) -> None:
    """What was noted while sampling is what one pass over the whole sequences gives."""
    given = sequence_logprobs(model, PROMPTS, [r.ids for r in responses])
    for response, logp in zip(responses, given, strict=True):
        torch.testing.assert_close(torch.tensor(response.logprobs, dtype=logp.dtype), logp, rtol=0, atol=atol)


def assert_each_round_has_its_weights(model: Any, atol: float) -> None:
    """Other responses once the weights have changed, and those that the new weights give."""
    first = generate(model, PROMPTS, SEEDS, sampling())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    second = generate(model, PROMPTS, SEEDS, sampling())
    assert [r.ids for r in first] != [r.ids for r in second]
    assert_logprobs_of(model, second, atol)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_what_is_sampled_is_what_the_forward_pass_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads on two key-value heads, prompts of several lengths, rows that leave. Qwen2 has biases."""
    model = of_kind(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    responses, taken = steps_taken(model, monkeypatch)
    assert taken == max(len(r.ids) for r in responses) - 1 > 5  # all but the one over the prompts
    assert len({len(r.ids) for r in responses}) > 2
    assert_logprobs_of(model, responses, atol=1e-6)
    monkeypatch.setattr(rlhf.rollout, "decode_step", lambda *_: None)
    assert [r.ids for r in generate(model, PROMPTS, SEEDS, sampling())] == [r.ids for r in responses]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_norm_in_one_operation_is_the_same_arithmetic(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_kind(kind, torch.float32)
    responses, taken = steps_taken(model, monkeypatch)
    assert taken
    assert_logprobs_of(model, responses, atol=2e-5)


def test_a_role_on_a_shared_base_decodes_with_its_own_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_of("llama")
    disturb(roles.policy, by=0.3)
    responses, taken = steps_taken(roles.policy, monkeypatch)
    assert taken
    assert_logprobs_of(roles.policy, responses, atol=1e-6)
    own, bare = (sequence_logprobs(m, PROMPTS, [r.ids for r in responses]) for m in (roles.policy, roles.reference))
    assert max(float((a - b).abs().max()) for a, b in zip(own, bare, strict=True)) > 0.1
    decode = decode_step(roles.policy)
    assert decode is not None
    roles.reference.ready()  # another role computes in between
    cache = make_cache(roles.policy)
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    position_BT = torch.arange(4)[None]
    with torch.no_grad():
        whole_BV = roles.policy(input_ids=ids_BT, use_cache=False).logits[:, -1]
        roles.policy(input_ids=ids_BT[:, :-1], past_key_values=cache, use_cache=True)
        roles.reference.ready()
        step_BV = decode(ids_BT[:, -1:], position_BT[:, -1:], None, cache)[:, -1]
    torch.testing.assert_close(step_BV, whole_BV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("why", ["gpt2", "window", "hook", "other", "wrong"])
def test_other_models_run_as_always(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "gpt2":
        model = make("gpt2")
    elif why == "window":
        model = of_kind("mistral", sliding_window=4)
    elif why == "other":
        model = of_kind("gemma", head_dim=4)  # scales its embeddings
    else:
        model = of_kind("llama")
    if why == "hook":
        model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    if why == "wrong":
        monkeypatch.setattr(module._Layer, "__call__", lambda _self, x_B1E, *_: x_B1E)
    assert decode_step(model) is None
    responses, taken = steps_taken(model, monkeypatch)
    assert taken == 0 and len(responses) == len(PROMPTS)
