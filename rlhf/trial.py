"""What a short cut through a model needs: it is tried once against the whole way, and used only if both agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A model whose modules take, give or hold something else than the short cut thought.
UNLIKE = (TypeError, RuntimeError, AttributeError, IndexError)
PROBE = 6  # tokens of the rows that a step of decoding is tried on
STEPS = 2  # of them sampled: what a first step leaves behind is used by the next


def alike(whole: Tensor, short: Tensor) -> bool:
    """True if two results of the same shape differ by no more than rounding in another order may make them."""
    allowed = 10 * torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    return bool((whole.float() - short.float()).abs().max() <= allowed)


@torch.inference_mode()
def follows_forward(
    model: Any, caches: Callable[[], Any], step: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
) -> bool:
    """True if a step gives the logits of the model's own forward pass, with a row that is padded on the left.

    step: logits_B1V of (ids_B1, position_B1, mask_BT, cache), as `rlhf.decode_step.DecodeStep` describes it.
    """
    at = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(2 * PROBE, device=at) % vocabulary).view(2, PROBE)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : PROBE // 2] = 0
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)

    def forward(cache: Any, end: int) -> Tensor:
        logits_B1V: Tensor = model(
            input_ids=ids_BT[:, :end], attention_mask=mask_BT[:, :end], position_ids=position_BT[:, :end],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return logits_B1V

    try:
        cache = caches()
        whole_B1V = forward(caches(), PROBE)
        forward(cache, PROBE - STEPS)
        for end in range(PROBE - STEPS + 1, PROBE + 1):
            last = slice(end - 1, end)
            step_B1V = step(ids_BT[:, last], position_BT[:, last], mask_BT[:, :end], cache)
    except UNLIKE:
        return False
    return alike(whole_B1V, step_B1V)
