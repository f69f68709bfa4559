"""One step of decoding, one new token a row, without the library's glue between a model's linear layers.

At a few rows a step's products are small, and on a CPU half of its time is Python: masks made anew, attention looked up
by name, keyword arguments handed down. Here the same products are made in the same order with what they need and no
more, and layers that read the same input are multiplied at once (`rlhf.packed`). Only models whose layers are known to
be just this are decoded so, and each is tried once against its own forward pass; all others run as always.

Shapes: B rows, P rows of which the first B count, T tokens of the cache, H query heads, G key-value heads, D units of a
head, E of a state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf.kv_cache import is_roomy, make_cache
from rlhf.packed import Packed, Product, convenient, side_by_side
from rlhf.trial import TriedOnce, follows_forward, hooked

PLAIN = ("LlamaAttention", "MistralAttention", "Qwen2Attention")  # rotary positions, one softmax, nothing else
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP")  # down(act(gate(x)) * up(x))


class DecodeStep:
    """The next-token logits of a causal model whose cache holds all tokens but the last.

    It may hold the weights as they were when it was made: one step serves one round of sampling.
    ready: called before each step; it makes the role on a shared base the one that computes.
    """

    def __init__(self, model: Any, ready: Callable[[], None] | None = None) -> None:
        self.ready = ready
        self.head = side_by_side([model.get_output_embeddings()])
        self.body = getattr(model, model.base_model_prefix)
        self.layers = [_Layer(layer) for layer in self.body.layers]
        self.norm = _norm(self.body.norm)

    def __call__(self, ids_B1: Tensor, position_B1: Tensor, mask_BT: Tensor | None, cache: Any) -> Tensor:
        """logits_B1V. mask_BT: 1 where a token is, 0 where padding is, the new place included; None: no padding."""
        if self.ready is not None:
            self.ready()
        rows = len(ids_B1)
        spare = convenient(rows) - rows if isinstance(self.head, Packed) else 0
        x_P1E = self.body.embed_tokens(functional.pad(ids_B1, (0, 0, 0, spare)) if spare else ids_B1)
        cos_B1D, sin_B1D = self.body.rotary_emb(x_P1E, position_ids=position_B1)
        cos_B11D, sin_B11D = cos_B1D.unsqueeze(1), sin_B1D.unsqueeze(1)
        bias_B11T = None
        if mask_BT is not None:
            bias_BT = torch.zeros_like(mask_BT, dtype=x_P1E.dtype).masked_fill_(mask_BT == 0, -torch.inf)
            bias_B11T = bias_BT[:, None, None]
        for layer, store in zip(self.layers, cache.layers, strict=True):
            x_P1E = layer(x_P1E, cos_B11D, sin_B11D, bias_B11T, store)
        logits_P1V: Tensor = self.head(self.norm(x_P1E))
        return logits_P1V[:rows]


class _Layer:
    def __init__(self, layer: Any) -> None:
        a = layer.self_attn
        self.qkv, self.out = side_by_side([a.q_proj, a.k_proj, a.v_proj]), side_by_side([a.o_proj])
        self.groups, self.scaling = a.num_key_value_groups, a.scaling
        self.mlp = _mlp(layer.mlp)
        self.norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)

    def __call__(
        self, x_P1E: Tensor, cos_B11D: Tensor, sin_B11D: Tensor, bias_B11T: Tensor | None, store: Any
    ) -> Tensor:
        rows, _, _, width = cos_B11D.shape
        # Queries and keys turn together; then H, G and G heads are told apart.
        qkv_BH1D = self.qkv(self.norms[0](x_P1E))[:rows].view(rows, -1, 1, width)
        turning = qkv_BH1D.shape[1] * (self.groups + 1) // (self.groups + 2)
        heads = turning * self.groups // (self.groups + 1)
        qk_BH1D, values_BG1D = qkv_BH1D[:, :turning], qkv_BH1D[:, turning:]
        low, high = qk_BH1D.chunk(2, -1)
        qk_BH1D = qk_BH1D * cos_B11D + torch.cat((-high, low), -1) * sin_B11D
        keys_BGTD, values_BGTD = store.update(qk_BH1D[:, heads:], values_BG1D)
        # The heads that share keys stand where a sequence's queries would: no key is repeated.
        q_BGHD = qk_BH1D[:, :heads].reshape(rows, -1, self.groups, width)
        z_BGHD = functional.scaled_dot_product_attention(q_BGHD, keys_BGTD, values_BGTD, bias_B11T, scale=self.scaling)
        z_P1E = z_BGHD.reshape(rows, 1, -1)
        if len(x_P1E) > rows:
            z_P1E = functional.pad(z_P1E, (0, 0, 0, 0, 0, len(x_P1E) - rows))
        x_P1E = x_P1E + self.out(z_P1E)
        out_P1E: Tensor = x_P1E + self.mlp(self.norms[1](x_P1E))
        return out_P1E


def _mlp(mlp: Any) -> Product:
    """The feed-forward block in two products where it is known to be gated and can be packed, else as it is."""
    gate_up = side_by_side([mlp.gate_proj, mlp.up_proj]) if type(mlp).__name__ in GATED else None
    if not isinstance(gate_up, Packed):
        return mlp  # type: ignore[no-any-return]  # a module
    down, act = side_by_side([mlp.down_proj]), mlp.act_fn

    def run(x_P1E: Tensor) -> Tensor:
        gate, up = gate_up(x_P1E).chunk(2, -1)
        return down(act(gate) * up)

    return run


def _norm(norm: Any) -> Any:
    """The norm in one operation where that is the same arithmetic: fp32."""
    if type(norm).__name__ not in NORMS or norm.weight.dtype != torch.float32:
        return norm
    return lambda x: functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def decode_step(model: Any) -> DecodeStep | None:
    """A step for `model` over a cache of `make_cache`, or None where its own forward pass has to be used."""
    ready = getattr(model, "ready", None)  # of a role on a shared base
    inner = getattr(model, "inner", model)
    if not _is_plain(inner) or not is_roomy(inner):
        return None
    if ready is not None:
        ready()
    return DecodeStep(inner, ready) if _usable(inner) else None


def _is_plain(model: Any) -> bool:
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not type(model).__module__.startswith("transformers.models."):
        return False
    blocks = [getattr(layer, name) for layer in layers for name in ("self_attn", "mlp") if hasattr(layer, name)]
    skipped = [model, body, *layers, *blocks]
    if hooked(skipped):
        return False
    return all(type(getattr(layer, "self_attn", None)).__name__ in PLAIN for layer in layers)


def _same_as_forward(model: Any) -> bool:
    return follows_forward(model, make_cache(model), partial(DecodeStep, model))


_usable = TriedOnce(_same_as_forward)
