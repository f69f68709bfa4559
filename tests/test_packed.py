"""Layers side by side in one product: the layers' own outputs, with the weights and adapters of that moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_toys import disturb, roles_of
from test_decode_step import assert_each_round_has_its_weights, assert_logprobs_of, of_kind
from test_lean_lora import adapted
from test_rollout import PROMPTS, SEEDS, sampling
from torch import Tensor, nn

from rlhf.lean_lora import make_lean
from rlhf.packed import convenient, side_by_side
from rlhf.rollout import generate

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this build of torch cannot pack",
)


def layers(*, biases: tuple[bool, ...], dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(5, outputs, bias) for outputs, bias in zip((3, 2, 7), biases, strict=False)]
    return [layer.to(dtype) for layer in made]


def input_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def follows(layer: nn.Linear, product: Any, x: Tensor) -> bool:
    """True if a change of the layer's weight changes what the product gives: it holds no copy."""
    before = product(x)
    with torch.no_grad():
        layer.weight.add_(1)
    return not torch.equal(product(x), before)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(False,), (True, False, True), (False, False)])
@pytest.mark.parametrize("shape", [(1, 5), (3, 1, 5), (40, 1, 5), (2, 3, 5)])
def test_outputs_are_those_of_the_layers_joined(biases: tuple[bool, ...], shape: tuple[int, ...]) -> None:
    made, x = layers(biases=biases), input_of(*shape)
    product = side_by_side(made)
    torch.testing.assert_close(product(x), torch.cat([layer(x) for layer in made], -1), rtol=1e-6, atol=1e-6)
    assert not follows(made[0], product, x)


@pytest.mark.parametrize(
    ("rows", "made"), [(1, 2), (2, 2), (3, 4), (5, 8), (12, 12), (13, 16), (25, 32), (32, 32), (33, 64), (128, 128)]
)
def test_rows_are_rounded_up_to_a_few_numbers(rows: int, made: int) -> None:
    assert convenient(rows) == made


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_active_adapter_is_added_and_no_other(bias: bool) -> None:
    """By hand: x (W + 3 B A)^T + b, of rank 2 at alpha 6."""
    net, x = adapted(bias=bias).float(), input_of(4, 5)
    layer = net.first
    make_lean(layer)
    bare = x @ layer.base_layer.weight.T + (layer.base_layer.bias if bias else 0)
    added = 3 * x @ layer.lora_A["a"].weight.T @ layer.lora_B["a"].weight.T
    assert added.abs().min() > 1e-3
    product = side_by_side([layer])
    torch.testing.assert_close(product(x), bare + added, rtol=1e-5, atol=1e-5)
    assert not follows(layer.base_layer, product, x)
    layer.base_layer.weight.sub_(1)
    layer._active_adapter = []
    torch.testing.assert_close(side_by_side([layer])(x), bare, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("why", ["float64", "hook", "other layer", "subclass", "gathered", "autocast"])
def test_what_is_no_plain_layer_runs_itself(why: str) -> None:
    dtype = torch.float64 if why == "float64" else torch.float32
    made, x = layers(biases=(False, False), dtype=dtype), input_of(2, 1, 5, dtype=dtype)
    first, called = made[0], []
    if why == "hook":
        first.register_forward_pre_hook(lambda *_: called.append(1))
    elif why == "other layer":
        made[1] = nn.Identity()  # type: ignore[call-overload]  # no Linear is the point
    elif why == "subclass":
        first.__class__ = type("Quantised", (nn.Linear,), {})
    elif why == "gathered":
        first.weight.data = first.weight.data[:0]  # as ZeRO-3 leaves it
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        product = side_by_side(made)
    if why == "gathered":
        first.weight.data = torch.ones(3, 5)
    assert torch.equal(product(x), torch.cat([layer(x) for layer in made], -1))
    assert follows(first, product, x)
    assert bool(called) == (why == "hook")


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_an_adapter_that_is_more_than_a_product_runs_itself(settings: dict[str, Any]) -> None:
    net = adapted(**settings).float()
    make_lean(net.first)
    assert side_by_side([net.first]) is net.first


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_each_round_of_sampling_has_the_weights_of_its_time(kind: str) -> None:
    assert_each_round_has_its_weights(of_kind(kind, torch.float32), atol=2e-5)


def test_a_role_on_a_shared_base_is_sampled_with_its_adapter() -> None:
    roles = roles_of("llama")
    roles.policy.base.model.float()
    disturb(roles.policy, by=0.3)
    for role in (roles.policy, roles.reference):
        assert_logprobs_of(role, generate(role, PROMPTS, SEEDS, sampling()), atol=2e-5)
