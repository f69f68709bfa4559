"""A low-rank adapter on a frozen linear layer in as few operations as its arithmetic takes.

peft's layer makes five tensors as large as the layer's output in a forward pass, and as many in a backward one: the
product's parts are scaled, cast and added one by one. Here the adapter's product is added into the layer's own output,
forward and backward. What peft does beyond that (dropout, DoRA, biases, quantised or sharded layers, autocast) goes
peft's way.

Shapes: N rows (all but the last dimension), I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf.trial import hooked


def make_lean(layer: Any) -> None:
    """Let a layer that peft has adapted run as here wherever that is the same arithmetic; once is enough."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is Linear and type(layer.base_layer) is nn.Linear and "forward" not in vars(layer):
        layer.forward = functools.partial(_forward, layer)


def effective_weight(layer: Any) -> Tensor | None:
    """weight_OI that a linear layer multiplies by now, its active adapter's product added if it has one; None where it
    does anything else (another kind of layer, hooks, a quantised or sharded weight, DoRA, an adapter's own bias)."""
    from_peft = hasattr(layer, "base_layer")
    base = layer.base_layer if from_peft else layer
    if type(base) is not nn.Linear or hooked((layer, base)):
        return None
    weight_OI: Tensor = base.weight
    if weight_OI.shape != (base.out_features, base.in_features):
        return None  # ZeRO-3 has it elsewhere
    if not from_peft:
        return weight_OI if "forward" not in vars(layer) else None
    if "forward" not in vars(layer):
        return None  # not one that `make_lean` knows
    names = [] if layer.disable_adapters or layer.merged else [n for n in layer._active_adapter if n in layer.lora_A]
    for name in names:
        if not _is_product(layer, name):
            return None
        weight_OI = weight_OI + layer.get_delta_weight(name)
    return weight_OI


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, active = layer.base_layer, layer._active_adapter
    if len(active) == 1 and not args and not kwargs and not layer.merged and not layer.disable_adapters:
        name = active[0]
        if name not in layer.lora_A:
            out: Tensor = base(x)
            return out
        down_RI, up_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
        if _is_plain(layer, name, x, base.weight, down_RI, up_OR):
            given = (x, base, down_RI, up_OR, layer.scaling[name])
            if not torch.is_grad_enabled():
                return _adapted(*given)[0]
            learnt: Tensor = _Adapted.apply(*given)  # type: ignore[no-untyped-call]  # torch has it so
            return learnt
    normal: Tensor = type(layer).forward(layer, x, *args, **kwargs)
    return normal


def _is_plain(layer: Any, name: str, x: Tensor, weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor) -> bool:
    return (
        x.dtype == weight_OI.dtype == down_RI.dtype == up_OR.dtype
        and not torch.is_autocast_enabled(x.device.type)
        and not weight_OI.requires_grad
        and _is_product(layer, name)
        and not hasattr(weight_OI, "ds_id")  # ZeRO-3 gathers it where its module is called
    )


def _is_product(layer: Any, name: str) -> bool:
    """True if the adapter does nothing but add a multiple of B A to the weight."""
    plain = isinstance(layer.lora_dropout[name], nn.Identity) and layer.lora_B[name].bias is None
    return plain and name not in layer.lora_variant


def _adapted(x: Tensor, base: nn.Linear, down_RI: Tensor, up_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x W^T + b + scale (x A^T) B^T, in the shape of x, and h_NR = x A^T."""
    out = functional.linear(x, base.weight, base.bias)
    h_NR = functional.linear(x.flatten(0, -2), down_RI)
    out.view(-1, out.shape[-1]).addmm_(h_NR, up_OR.T, alpha=scale)
    return out, h_NR


class _Adapted(torch.autograd.Function):
    """`_adapted` for a frozen base. With G the gradient of the output and P = scale G B: dx = G W + P A, dA = P^T x,
    dB = scale G^T h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
        out, h_NR = _adapted(x, base, down_RI, up_OR, scale)
        ctx.save_for_backward(x, base.weight, down_RI, up_OR, h_NR)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, weight_OI, down_RI, up_OR, h_NR = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        part_NR = (grad_NO @ up_OR).mul_(ctx.scale)
        dx = down = up = None
        if ctx.needs_input_grad[0]:
            dx = (grad_NO @ weight_OI).addmm_(part_NR, down_RI).view_as(x)
        if ctx.needs_input_grad[2]:
            down = part_NR.T @ x.flatten(0, -2)
        if ctx.needs_input_grad[3]:
            up = (grad_NO.T @ h_NR).mul_(ctx.scale)
        return dx, None, down, up, None
