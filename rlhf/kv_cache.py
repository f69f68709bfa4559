"""A key-value cache for a decode batch that rows leave: written in place, in blocks, with holes filled from the end.

The library's own layer joins the new token to the whole cache at every step and copies all rows whenever one ends.

Shapes: B rows, G key-value heads, T tokens, D units of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens that room is made for at a time


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """`keys` and `values`, [B, G, T, D], are views of the first rows and tokens of the two larger tensors of `room`.

    reserve: the least rows and tokens that room is made for. What nothing was written to yet is 0.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, reserve: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.reserve = reserve
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the old ones; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, length = key_states.shape[0], self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self.room or end > self.room[0].shape[-2]:
            self.room = [
                self._grown(old, new, end) for old, new in ((self.keys, key_states), (self.values, value_states))
            ]
        for part, new in zip(self.room, (key_states, value_states), strict=True):
            part[:rows, :, length:end] = new
        self.keys, self.values = (part[:rows, :, :end] for part in self.room)
        return self.keys, self.values

    def _grown(self, old: Tensor, new: Tensor, end: int) -> Tensor:
        (rows, heads, _, width), (least_rows, least_tokens) = new.shape, self.reserve
        tokens = max(-(-end // BLOCK) * BLOCK, least_tokens)
        part = new.new_zeros((max(rows, least_rows), heads, tokens, width))
        if old.numel():
            part[:rows, :, : old.shape[-2]] = old
        return part

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `fill_holes` says: each in its place, or from behind the new end."""
        if not self.room:
            return
        length = self.get_seq_length()
        move_rows([part[:, :, :length] for part in self.room], indices.tolist())
        self.keys, self.values = (part[: len(indices), :, :length] for part in self.room)


def move_rows(room: Sequence[Tensor], places: Sequence[int]) -> None:
    """Write row `places[i]` to place i, as `fill_holes` arranged them."""
    for part in room:
        for place, row in enumerate(places):
            if row != place:
                part[place] = part[row]


def fill_holes(keep: Sequence[int]) -> list[int]:
    """The rows to keep, given in rising order, arranged so that every one that can stays in its place."""
    size = len(keep)
    late = [row for row in keep if row >= size]
    staying = set(keep)
    return [row if row in staying else late.pop() for row in range(size)]


def make_cache(model: Any, reserve: tuple[int, int] = (0, 0)) -> DynamicCache:
    """A cache for `model`, with our layers where it has plain ones; sliding and linear ones stay the library's."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_roomy(model: Any) -> bool:
    """True if all layers of the model's cache are ours: none has a sliding window or a state."""
    return all(type(layer) is RoomyLayer for layer in make_cache(model).layers)
