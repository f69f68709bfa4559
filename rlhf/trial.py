"""What a short cut through a model needs: it is tried once against the whole way, and used only if both agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# A model whose modules take, give or hold something else than the short cut thought.
UNLIKE = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
PROBE = 6  # tokens of the rows that a step of decoding is tried on
STEPS = 2  # of them sampled: what a first step leaves behind is used by the next


def hooked(modules: Iterable[nn.Module]) -> bool:
    """True if one of them has a forward hook, which a short cut past its call would not run."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class TriedOnce:
    """Whether a model may take a short cut, by a trial of (the model, whatever else it needs) when first asked."""

    def __init__(self, trial: Callable[..., bool]) -> None:
        self.trial, self.passed = trial, WeakKeyDictionary[nn.Module, bool]()

    def __call__(self, model: nn.Module, *others: Any) -> bool:
        if model not in self.passed:
            self.passed[model] = self.trial(model, *others)
        return self.passed[model]

    def trust(self, model: nn.Module) -> None:
        """Do not try this one."""
        self.passed[model] = True


def alike(whole: Tensor, short: Tensor) -> bool:
    """True if two results of the same shape differ by no more than rounding in another order may make them."""
    allowed = min(10 * torch.finfo(whole.dtype).eps ** 0.5, 0.1) * float(whole.abs().max())
    return bool((whole.float() - short.float()).abs().max() <= allowed)


@torch.inference_mode()
def follows_forward(model: Any, cache: Any, steps: Callable[[], Callable[..., Tensor]]) -> bool:
    """True if steps give the logits of the model's own forward pass, with a row that is padded on the left.

    steps: makes logits_B1V of (ids_B1, position_B1, mask_BT, cache), as `rlhf.decode_step.DecodeStep` describes it.
    """
    at = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(2 * PROBE, device=at) % vocabulary).view(2, PROBE)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, : PROBE // 2] = 0
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)

    def forward(end: int, **given: Any) -> Tensor:
        logits_B1V: Tensor = model(
            input_ids=ids_BT[:, :end], attention_mask=mask_BT[:, :end], position_ids=position_BT[:, :end],
            logits_to_keep=1, **given,
        ).logits  # fmt: skip
        return logits_B1V

    try:
        whole_B1V = forward(PROBE, use_cache=False)
        forward(PROBE - STEPS, use_cache=True, past_key_values=cache)
        step = steps()
        for end in range(PROBE - STEPS + 1, PROBE + 1):
            last = slice(end - 1, end)
            step_B1V = step(ids_BT[:, last], position_BT[:, last], mask_BT[:, :end], cache)
    except UNLIKE:
        return False
    return alike(whole_B1V, step_B1V)
