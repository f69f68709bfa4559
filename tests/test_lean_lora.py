"""The lean adapted layer against peft's own forward pass, which it replaces, and where it must step aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.lean_lora import make_lean


class Net(nn.Module):
    """Two layers, of which peft adapts those that it is told to."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7, bias=bias), nn.Linear(7, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def adapted(*, bias: bool = True, targets: str = "first", **settings: Any) -> Any:
    """A net in fp64 whose adapter changes its output, with every other weight frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    net = Net(bias)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=targets.split(), **settings), net, "a")
    net = net.double()
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(p)
    return net


def lean(net: Any) -> list[int]:
    """Make the net's layers lean; how many calls went past peft's forward is what the list counts."""
    from peft.tuners.lora.layer import Linear

    calls = [0]
    for layer in (module for module in net.modules() if isinstance(module, Linear)):
        make_lean(layer)
        layer.base_layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def outcome(net: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of all adapters."""
    x = x.clone().requires_grad_(True)
    out = net(x)
    out.square().sum().backward()
    return out.detach(), [x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_output_and_gradients_are_pefts(bias: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    want, want_grads = outcome(adapted(bias=bias, targets="first second"), x)
    net = adapted(bias=bias, targets="first second")
    past = lean(net)
    found, grads = outcome(net, x)
    assert past == [0]  # the base layers were not called as modules: it was this code that ran
    assert torch.allclose(found, want, atol=1e-12)
    assert len(grads) == 5
    for mine, theirs in zip(grads, want_grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12) and theirs.abs().max() > 0
    with torch.no_grad():
        assert torch.allclose(net(x), want, atol=1e-12)


def test_an_input_without_gradient_gets_none() -> None:
    net, x = adapted(), torch.randn(4, 5, dtype=torch.float64)
    lean(net)
    net(x).sum().backward()
    assert x.grad is None and net.first.lora_A["a"].weight.grad.abs().max() > 0


def test_the_bare_layer_computes_where_no_adapter_or_another_ones_is_active() -> None:
    net, x = adapted(), torch.randn(4, 5, dtype=torch.float64)
    lean(net)
    bare = nn.functional.linear(x, net.first.base_layer.weight, net.first.base_layer.bias)
    for active in ([], ["elsewhere"]):
        net.first._active_adapter = active
        assert torch.equal(net.first(x), bare)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_else_peft_does_is_left_to_it(settings: dict[str, Any]) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    theirs, net = adapted(**settings), adapted(**settings)
    lean(net)
    torch.manual_seed(1)
    want, want_grads = outcome(theirs, x)
    torch.manual_seed(1)
    found, grads = outcome(net, x)
    assert torch.equal(found, want)
    assert all(torch.equal(left, right) for left, right in zip(grads, want_grads, strict=True))


def test_autocast_merged_and_trained_base_weights_are_left_to_peft() -> None:
    net, x = adapted().float(), torch.randn(4, 5)
    past = lean(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == torch.bfloat16
    assert past == [1]
    net.first.base_layer.weight.requires_grad_(True)
    net(x).sum().backward()
    assert past == [2] and net.first.base_layer.weight.grad is not None
    net.first.base_layer.weight.requires_grad_(False)
    net(x)
    before = net(x)
    net.first.merge()
    assert torch.allclose(net(x), before, atol=1e-5) and past == [3]


def test_making_lean_twice_is_making_lean_once() -> None:
    net = adapted()
    lean(net)
    first = net.first.forward
    make_lean(net.first)
    assert net.first.forward is first
