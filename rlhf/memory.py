"""What a pass through a model takes in memory, found without weights: the pass is made on tensors that have shapes but
no data, and the bytes that are alive are counted, forward and backward.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    peak_of(model, lambda model: model(input_ids=ids, labels=ids).loss.backward())
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    """Counts the bytes of the storages that operations make inside, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def known(self, tensors: Any) -> None:
        """Storages that are not counted: they were there before."""
        for tensor in tensors:
            self._seen.add(self._key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_of(model: nn.Module, work: Callable[[Any], Any]) -> int:
    """The most bytes that `work(model)` holds at once above the model's own. `model` was made on the meta device; its
    tensors are replaced by ones that have no data either, but count as float32 on the CPU, where kernels are chosen."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(model)
        alive = Alive()
        alive.known([*model.parameters(), *model.buffers()])
        with alive:
            work(model)
    return alive.peak


def _without_data(model: nn.Module) -> None:
    """Inside a FakeTensorMode. The library's own moves of modules (`Module.to`) fail there."""
    made: dict[int, Tensor] = {}  # weights may be shared

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=dtype)
            weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if weight else empty
        return made[id(tensor)]

    kept = [*model.parameters(), *model.buffers()]  # so that no address is given twice
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = like(tensor)  # type: ignore[assignment]  # a parameter for a parameter
    del kept
