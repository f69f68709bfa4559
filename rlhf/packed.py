"""Linear layers as a CPU multiplies few rows by them fastest: weights side by side, in oneDNN's blocked layout.

The libraries behind torch bring a weight into an order of their own at every product. Over hundreds of rows that costs
nothing; over the few rows of a decode step it costs as much as the product. While a model is sampled from, its weights
stay as they are, so it is done once. Layers that read the same input become one product, and a low-rank adapter is
added into the copy. The price is that copy: as much memory as the weights, while responses are sampled.

Shapes: N rows (all but the last dimension), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.lean_lora import effective_weight

ROWS = 32  # that the layout is made for; from 2 to 128 it is the fastest or next to it
STEPS = (2, 4, 8, 12, 16, 24)  # convenient numbers of rows; then multiples of 32

Product = Callable[[Tensor], Tensor]


def side_by_side(layers: Sequence[nn.Module]) -> Product:
    """The outputs of layers that read the same input, joined: [..., I] to [..., sum of O].

    Packed where that is possible, as the layers' weights are now; elsewhere the layers run one by one.
    """
    packed = _packed(layers)
    if packed is not None:
        return packed
    if len(layers) == 1:
        return layers[0]
    return lambda x: torch.cat([layer(x) for layer in layers], -1)


@torch.no_grad()
def _packed(layers: Sequence[nn.Module]) -> Packed | None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.is_autocast_enabled("cpu"):
        return None
    weights: list[Tensor] = []
    biases: list[Any] = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        stored = getattr(base, "weight", None)
        if stored is None or stored.dtype != torch.float32 or stored.device.type != "cpu":
            return None
        found = effective_weight(layer)
        if found is None or found.dtype != torch.float32:
            return None
        weights.append(found)
        biases.append(base.bias)
    layout = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), ROWS)
    bias_O = None
    if any(bias is not None for bias in biases):
        bias_O = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return Packed(layout, bias_O)


class Packed:
    """One product with weights in oneDNN's layout, and a bias_O or None."""

    def __init__(self, layout: Tensor, bias_O: Tensor | None) -> None:
        self.layout, self.bias_O = layout, bias_O

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.layout, self.bias_O, "none", [], "")
        return out


def convenient(rows: int) -> int:
    """At least `rows`, and one of few numbers: oneDNN keeps a program of half a megabyte for each that it has met, and
    a GPU a recording (`rlhf.recorded`)."""
    return next((step for step in STEPS if step >= rows), -(-rows // ROWS) * ROWS)
