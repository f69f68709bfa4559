"""What a short cut through a model needs: it is tried once against the whole way, and used only if both agree."""

from __future__ import annotations

import torch
from torch import Tensor

# A model whose modules take, give or hold something else than the short cut thought.
UNLIKE = (TypeError, RuntimeError, AttributeError, IndexError)


def alike(whole: Tensor, short: Tensor) -> bool:
    """True if two results of the same shape differ by no more than rounding in another order may make them."""
    allowed = 10 * torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
    return bool((whole.float() - short.float()).abs().max() <= allowed)
