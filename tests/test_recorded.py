"""Recorded steps of decoding give what unrecorded ones give. On a CPU a tape stands for the GPU's graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lora_toys import disturb, roles_of
from pipeline_lab import Lab
from tape import tape
from test_decode_step import SIZES, assert_each_round_has_its_weights, assert_logprobs_of, of_kind
from test_rollout import EOS, PROMPTS, SEEDS, make, sampling
from transformers import FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from rlhf import recorded
from rlhf.errors import ConfigError
from rlhf.kv_cache import BLOCK, RoomyLayer
from rlhf.packed import convenient
from rlhf.rollout import decode_groups, generate, stream
from rlhf.trial import alike

MANY = PROMPTS * 3
SEEDS_OF_MANY = [seed + copy for copy in range(3) for seed in SEEDS]
CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch sees no GPU here: CUDA graphs are not tried, a tape is"
)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of each step that is run to be recorded, with spans of 8 tokens."""
    made: list[tuple[int, int]] = []
    forward = recorded.RecordedSteps._forward

    def noted(self: Any, rows: int, tokens: int) -> Any:
        made.append((rows, tokens))
        return forward(self, rows, tokens)

    monkeypatch.setattr(recorded, "SPAN", 8)
    monkeypatch.setitem(recorded.RECORDERS, "cpu", lambda: tape)
    monkeypatch.setattr(recorded.RecordedSteps, "_forward", noted)
    return made


def unrecorded(*arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(recorded.SWITCH, "0")
        return generate(*arguments)


def same(given: Any, plain: Any) -> bool:
    near = [a.logprobs == pytest.approx(b.logprobs, abs=1e-9) for a, b in zip(given, plain, strict=True)]
    return [r.ids for r in given] == [r.ids for r in plain] and all(near)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "opt":
        shape = OPTConfig(
            vocab_size=SIZES["vocab_size"], hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
            init_std=0.3,
        )  # fmt: skip
        return OPTForCausalLM(shape).double()
    if kind == "alibi":
        small = {"vocab_size": SIZES["vocab_size"], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return FalconForCausalLM(FalconConfig(**small, alibi=True))
    if kind == "window":
        return of_kind("mistral", sliding_window=4)
    return make(kind) if kind == "gpt2" else of_kind(kind, **({"head_dim": 4} if kind == "gemma" else {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "gemma"])
def test_what_is_sampled_is_what_unrecorded_steps_give(kind: str, shapes: list[tuple[int, int]]) -> None:
    """Groups of five rows of several lengths, one group after another in the same room; rows leave, spans are passed.
    Llama's and Qwen2's steps are the short ones, the others' their own forward passes."""
    model = model_of(kind)
    how = sampling(group=5, max_new_tokens=20)
    plain = unrecorded(model, MANY, SEEDS_OF_MANY, how)
    assert not shapes and len({len(r.ids) for r in plain}) > 4
    assert same(generate(model, MANY, SEEDS_OF_MANY, how), plain)
    trial, met = shapes[:2], shapes[2:]  # each is run through once before it is recorded
    assert trial == [(2, 8), (2, 8)] and len(met) == 2 * len(set(met))
    assert {rows for rows, _ in met} == {2, 4, 8} and len({tokens for _, tokens in met}) > 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_may_leave_before_anything_is_recorded(kind: str, shapes: list[tuple[int, int]]) -> None:
    """A response of the first group, not of its last row, is the end token alone."""
    model = model_of(kind)
    first = decode_groups([len(p) for p in PROMPTS], 5)[0]
    for copy in range(99):
        seeds = [seed + copy for seed in SEEDS]
        plain = unrecorded(model, PROMPTS, seeds, sampling(group=5))
        ended = [plain[i].ids == [EOS] for i in first]
        if any(ended[:-1]) and not ended[-1]:
            break
    assert any(ended[:-1]) and not ended[-1]
    assert same(generate(model, PROMPTS, seeds, sampling(group=5)), plain) and shapes


def test_each_round_has_the_weights_of_its_time(shapes: list[tuple[int, int]]) -> None:
    assert_each_round_has_its_weights(of_kind("llama", torch.float32), atol=2e-5)
    assert shapes


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_role_on_a_shared_base_is_recorded_with_its_adapter(kind: str, shapes: list[tuple[int, int]]) -> None:
    roles = roles_of(kind)
    disturb(roles.policy, by=0.3)
    for role in (roles.policy, roles.reference):
        shapes.clear()
        assert_logprobs_of(role, generate(role, PROMPTS, SEEDS, sampling()), atol=1e-6)
        assert shapes


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_half_precision_is_recorded_as_it_is_computed(kind: str, shapes: list[tuple[int, int]]) -> None:
    """As the stage has it: the same operations on the same numbers, read from a cache of another length."""
    model = model_of(kind).float()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert_logprobs_of(model, generate(model, PROMPTS, SEEDS, sampling()), atol=0.1)
    assert len(shapes) > 2


def test_a_stream_is_of_the_same_tokens(shapes: list[tuple[int, int]]) -> None:
    model = model_of("gpt2")
    (whole,) = unrecorded(model, PROMPTS[:1], SEEDS[:1], sampling())
    assert list(stream(model, PROMPTS[0], SEEDS[0], sampling())) == whole.ids
    assert len(whole.ids) > 2 and len(shapes) > 2


@pytest.mark.parametrize("why", ["waits", "other result", "written out", "mask of two dimensions"])
def test_what_cannot_be_recorded_is_decoded_as_always(
    why: str, shapes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of("alibi" if why == "mask of two dimensions" else "gpt2")
    plain = unrecorded(model, PROMPTS, SEEDS, sampling())
    if why == "waits":
        norm = model.transformer.ln_f.forward
        monkeypatch.setattr(model.transformer.ln_f, "forward", lambda x: norm(x * float(x.new_ones(()))))
    if why == "other result":
        update = recorded._FixedLayer.update
        monkeypatch.setattr(recorded._FixedLayer, "update", lambda self, k, v, *rest: update(self, k, v * 2, *rest))
    if why == "written out":
        model.set_attn_implementation("eager")
        plain = unrecorded(model, PROMPTS, SEEDS, sampling())
    for _ in range(2):
        assert same(generate(model, PROMPTS, SEEDS, sampling()), plain)
    assert len(shapes) == {"written out": 0, "mask of two dimensions": 1}.get(why, 2)  # the trial's, once
    assert capsys.readouterr().out.count(f"{type(model).__name__} cannot be recorded") == 1


@pytest.mark.parametrize("why", ["window", "hook", "pre-hook"])
def test_what_recordings_are_not_made_for_is_not_tried(why: str, shapes: list[tuple[int, int]]) -> None:
    model = model_of("window" if why == "window" else "gpt2")
    if why == "hook":
        model.transformer.ln_f.register_forward_hook(lambda *_: None)
    if why == "pre-hook":
        model.transformer.ln_f.register_forward_pre_hook(lambda *_: None)
    generate(model, PROMPTS, SEEDS, sampling())
    assert not shapes


def test_the_switch_says_what_it_takes_before_anything_trains(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recorded.SWITCH, "off")
    with pytest.raises(ConfigError, match=r"RLHF_CUDA_GRAPHS=off: it is 0 .* or 1"):
        lab.run()
    assert not lab.trained


def test_what_passes_a_trial_in_half_precision() -> None:
    whole = torch.ones(4, dtype=torch.bfloat16)
    assert alike(whole, 0.98 * whole) and not alike(whole, 0.8 * whole)


def test_room_is_made_at_once_and_holds_nothing_that_is_no_number() -> None:
    """What attention reads under the mask is multiplied by 0, and 0 times NaN is NaN."""
    layer = RoomyLayer((convenient(5), 3 * BLOCK))
    new = torch.ones(3, 2, 4, 6)
    for _ in range(2):
        layer.update(new, new)
        assert [part.shape for part in layer.room] == [(8, 2, 3 * BLOCK, 6)] * 2
    assert layer.keys.shape == (3, 2, 8, 6)
    assert all(float(part.sum()) == 3 * 2 * 8 * 6 for part in layer.room)


@CUDA
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_cuda_graphs_give_what_started_kernels_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama has groups of heads; in float64, and twice, the second time with other weights."""
    monkeypatch.setattr(recorded, "SPAN", 8)
    model = model_of(kind).cuda()
    for _ in range(2):
        plain = unrecorded(model, MANY, SEEDS_OF_MANY, sampling(group=5))
        assert same(generate(model, MANY, SEEDS_OF_MANY, sampling(group=5)), plain)
        assert recorded._usable.passed[model]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.8)


@CUDA
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_cuda_graphs_in_half_precision(kind: str) -> None:
    model = model_of(kind).float().cuda()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        assert_logprobs_of(model, generate(model, PROMPTS, SEEDS, sampling()), atol=0.1)
    assert recorded._usable.passed[model]


@CUDA
@pytest.mark.parametrize("checked", [True, False])
def test_a_step_that_waits_leaves_nothing_in_disorder(checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before it is recorded, or, where the check does not see it, while it is."""
    model = model_of("gpt2").cuda()
    norm = model.transformer.ln_f.forward
    monkeypatch.setattr(model.transformer.ln_f, "forward", lambda x: norm(x * float(x.new_ones(()))))
    if not checked:
        monkeypatch.setattr(recorded, "_no_waiting", nullcontext)
    plain = unrecorded(model, PROMPTS, SEEDS, sampling())
    assert same(generate(model, PROMPTS, SEEDS, sampling()), plain)
    assert not recorded._usable.passed[model]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0 and torch.rand(2, device="cuda").numel() == 2
