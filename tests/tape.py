"""A CUDA graph's rules on a CPU: operations are noted as they run, and run again on the very same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError("a graph cannot wait for a value")
        out = func(*args, **(kwargs or {}))
        self.taken.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.taken:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def tape(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As `rlhf.recorded.CudaGraphs`."""
    work()
    with Tape() as taken:
        result = work()
    return taken.replay, result
