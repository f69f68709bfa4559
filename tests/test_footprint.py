"""Bytes that a plan counts: by hand for roles and caches, and on tensors without data for passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import footprint
from rlhf.config import Config, DataConfig, LaunchConfig, LoraConfig, OptimConfig, PpoConfig, RmConfig, SftConfig
from rlhf.errors import ConfigError
from rlhf.footprint import (
    Role,
    Shapes,
    cache_bytes,
    largest_shapes,
    loss_pass,
    noise_bytes,
    policy_pass,
    reading_pass,
    reading_shapes,
    score_pass,
)
from rlhf.lora import add_lora
from rlhf.memory import peak_of
from rlhf.plan_memory import ranks_asked


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer", "sent", "gathered"),
    [
        ("single", 4000, 2000, 4000, 0, 0), ("ddp", 4000, 2000, 4000, 2000, 0), ("zero1", 4000, 2000, 1500, 2000, 0),
        ("zero2", 4000, 500, 1500, 2000, 0), ("zero3", 1000, 500, 1000, 2000, 4000),
        ("zero3_offload", 1000, 500, 0, 2000, 4000),
    ],
)  # fmt: skip
def test_bytes_of_a_role_on_one_of_four_ranks(
    engine: str, weights: int, gradients: int, optimizer: int, sent: int, gathered: int
) -> None:
    """1,000 weights, 500 trained. ZeRO's share: 500 * (moments 8 + copy 4) / 4 = 1,500, ZeRO-3's 500 * 8 / 4."""
    role = Role("policy", 1000, 500)
    assert (role.weights(engine, 4), role.gradients(engine, 4), role.optimizer(engine, 4)) == (
        weights, gradients, optimizer,
    )  # fmt: skip
    assert (role.sent(engine), role.gathered(engine), role.checkpoint) == (sent, gathered, 6000)


def test_what_is_sent_and_gathered_of_a_large_model_is_bounded() -> None:
    """Buckets of 20 million numbers; 100 million weights at a time."""
    role = Role("policy", 10**9, 10**9)
    assert (role.sent("zero3"), role.gathered("zero3"), role.sent("ddp")) == (80e6, 400e6, 4e9)


def settings() -> Config:
    return Config(
        data=DataConfig(max_length=100, max_prompt_length=60),
        sft=SftConfig(optim=OptimConfig(batch=16, micro_batch=4)),
        rm=RmConfig(optim=OptimConfig(batch=8, micro_batch=8)),
        ppo=PpoConfig(batch=16, minibatch=8, micro_tokens=250, max_new_tokens=40, decode_group=3),
    )  # fmt: skip


def test_the_shapes_of_training_passes() -> None:
    cfg = settings()
    assert [largest_shapes(cfg, "sft", ranks) for ranks in (1, 2, 4, 8)] == [
        Shapes(4, 100, 2), Shapes(4, 100, 2), Shapes(4, 100, 1), Shapes(2, 100, 1),
    ]  # fmt: skip
    assert [largest_shapes(cfg, "rm", ranks, 3) for ranks in (1, 2)] == [Shapes(24, 100, 1), Shapes(12, 100, 1)]
    assert [largest_shapes(cfg, "ppo", ranks) for ranks in (1, 4, 8)] == [
        Shapes(2, 100, 2, 80), Shapes(2, 100, 1, 80), Shapes(1, 100, 1, 40),
    ]  # fmt: skip


def test_the_shapes_of_reading_passes() -> None:
    """2^24 numbers of logits over a vocabulary of 2^14 are 1,024 tokens, which are ten rows of 100."""
    config = LlamaConfig(vocab_size=1 << 14)
    assert reading_shapes(settings(), "sft", config) == Shapes(10, 100, take=1000)
    assert reading_shapes(settings(), "ppo", config) == Shapes(3, 60, take=3)
    source = (Path(__file__).parent.parent / "stages" / "sft.py").read_text(encoding="utf-8")

    assert "EVAL_LOGITS = 1 << 24" in source and footprint.HELDOUT_NUMBERS == 1 << 24


def test_decoding_holds_a_cache_in_blocks_of_64_tokens_and_noise() -> None:
    """60 + 40 tokens of 3 rows: keys and values * 4 bytes * 2 layers * 1 head * 4 units * 3 rows * 128 tokens. Eight
    steps of noise, twice in float64 and once in float32. Recorded: the room of 4 rows and 256 tokens."""
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, head_dim=4, vocab_size=50
    )
    assert cache_bytes(config, settings(), recorded=False) == 2 * 4 * 2 * 1 * 4 * 3 * 128
    assert cache_bytes(config, settings(), recorded=True) == 2 * 4 * 2 * 1 * 4 * 4 * 256
    assert noise_bytes(config, settings()) == 3 * 8 * 50 * 20


def test_the_peak_is_of_what_lives_at_the_same_time() -> None:
    """Two tensors of 400 bytes at once, never three; views and what was there before are free."""

    def work(_model: torch.nn.Module) -> None:
        x = torch.zeros(100)
        y = x + 1
        del x
        z = y.view(10, 10) * 2
        del y, z

    assert peak_of(linear(), work) == 800


def linear() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Linear(1000, 1000, bias=False)


def test_a_backward_pass_holds_the_gradient_too() -> None:
    """At the end: the gradient, 4 * 1000 * 1000 bytes, and little beside; twice as many passes hold a second one."""

    def work(passes: int) -> Any:
        def run(model: torch.nn.Module) -> None:
            for _ in range(passes):
                model(torch.zeros(1, 1000)).sum().backward()

        return run

    assert 4_000_000 < peak_of(linear(), work(1)) < 4_020_000
    assert 8_000_000 < peak_of(linear(), work(2)) < 8_020_000, "the second gradient is added to the first"


def test_weights_are_counted_as_float32_and_shared_ones_stay_shared() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(10, 10, dtype=torch.float16, device="meta")
            self.two = torch.nn.Linear(10, 10, dtype=torch.float16, device="meta")
            self.two.weight = self.one.weight
            self.one.bias.requires_grad_(False)

    model = Tied()
    assert peak_of(model, lambda _: None) == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.one.weight is model.two.weight
    assert [p.requires_grad for p in model.parameters()] == [True, False, True]


def tiny(vocabulary: int = 1000) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).train()


def test_logits_of_the_places_that_are_read_are_what_passes_differ_by() -> None:
    """Logits of 8 rows of 64 tokens: 8 * 64 * 1000 * 4 = 2 MB. PPO holds them, their log-softmax, softmax and the
    product of both for the entropy; held-out losses the logits, a copy and its softmax; scores none."""
    logits = 8 * 64 * 1000 * 4
    every = peak_of(tiny(), lambda model: policy_pass(model, Shapes(8, 64, take=8 * 64)))
    some = peak_of(tiny(), lambda model: policy_pass(model, Shapes(8, 64, take=8 * 16)))
    read = peak_of(tiny(), lambda model: reading_pass(model, Shapes(8, 64, take=8 * 64)))
    none = peak_of(tiny(), lambda model: score_pass(model, Shapes(8, 64)))
    assert every - some == pytest.approx(4 * 0.75 * logits, rel=0.1)  # and the last layer at more places
    assert 3 * logits < read < 3.2 * logits
    assert none < logits


def test_sfts_pass_holds_the_tiles_of_trls_output_layer() -> None:
    """On the CPU as much as TRL's own code does; on a GPU a tile of the tokens by 32,768 numbers, and no copy."""
    from trl.kernels import chunked_logprob

    shapes, tile = Shapes(4, 64), 4 * 63 * 32768 * 4

    def trls(model: Any) -> None:
        ids_BT = torch.zeros(4, 64, dtype=torch.long)
        mask_BT = torch.ones_like(ids_BT)
        hidden_BTD = model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        hidden_ND, labels_N = hidden_BTD[:, :-1].reshape(-1, 16), ids_BT[:, 1:].reshape(-1)
        weight_VD, fields = model.lm_head.weight, ("log_probs", "entropy", "is_top1")
        applied = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden_ND, weight_VD, None, labels_N, 1.0, len(weight_VD), None, 1.0, fields
        )
        applied[0].sum().backward()

    cpu = peak_of(tiny(2000), lambda model: loss_pass(model, shapes))
    assert cpu == pytest.approx(peak_of(tiny(2000), trls), rel=0.03)
    gpu = peak_of(tiny(2000), lambda model: loss_pass(model, replace(shapes, on_cpu=False)))
    assert 0 < gpu - tile < 0.3 * cpu


def test_an_adapters_pass_holds_no_gradient_of_the_base() -> None:
    """The adapters of rank 2 on all linear layers, and the same activations."""
    shapes = Shapes(2, 8, take=2)
    model = add_lora(tiny(), LoraConfig(enabled=True, r=2, alpha=4), 0)
    adapted = peak_of(model, lambda model: policy_pass(model, shapes))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    whole = peak_of(tiny(), lambda model: policy_pass(model, shapes))
    assert whole - adapted > 4 * 0.8 * sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize("work", [policy_pass, score_pass, reading_pass])
def test_a_pass_grows_with_its_rows(work: Any) -> None:
    small, large = (peak_of(tiny(), lambda model, n=rows: work(model, Shapes(n, 64, take=n * 32))) for rows in (8, 16))
    assert 1.7 < large / small < 2.05


def test_a_later_pass_finds_the_gradients_of_the_first() -> None:
    first, later = (peak_of(tiny(), lambda model, n=n: score_pass(model, Shapes(1, 2, passes=n))) for n in (1, 2))
    weights = 4 * sum(p.numel() for p in tiny().parameters())
    assert weights < first < 1.1 * weights
    assert 0 < later - (weights + 4 * 1000 * 16) < 1000, "that of the embeddings is added to the one that is there"


def test_ranks_are_counted_in_the_host_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb  slots = 4  # c slots=2\n#d slots=9\n", encoding="utf-8")
    assert ranks_asked(Config(launch=LaunchConfig(hostfile=str(hosts)))) == 12
    assert ranks_asked(Config(launch=LaunchConfig(gpus=3))) == 3
    hosts.write_text("worker-1\nworker-2\n")
    with pytest.raises(ConfigError, match=r"launch\.hostfile: no line of .* gives a machine its ranks"):
        ranks_asked(Config(launch=LaunchConfig(hostfile=str(hosts))))
    with pytest.raises(ConfigError, match=r"launch\.hostfile: there is no file"):
        ranks_asked(Config(launch=LaunchConfig(hostfile=str(tmp_path / "none"))))
