"""Our cache holds what the library's holds, whatever leaves it and whenever it grows."""

from __future__ import annotations

import torch
from test_rollout import make
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.kv_cache import BLOCK, RoomyLayer, fill_holes, make_cache


def test_holes_are_filled_from_the_end() -> None:
    assert fill_holes([0, 1, 2]) == [0, 1, 2]
    assert fill_holes([1, 3, 4]) == [4, 1, 3]
    assert fill_holes([2]) == [2]
    assert fill_holes([]) == []


def test_it_holds_what_the_librarys_layer_holds() -> None:
    """Rows leave in the middle and at the ends, before and after the room has grown twice."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs, rows = RoomyLayer(), DynamicLayer(), 7
    for step in range(2 * BLOCK + 3):
        width = 5 if step == 0 else 1
        new = [torch.randn(rows, 2, width, 3, generator=generator) for _ in range(2)]
        for a, b in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + step
        leave = {1: [0, 3], BLOCK: [4], BLOCK + 9: [1]}.get(step, [])
        if leave:
            keep = torch.tensor(fill_holes([i for i in range(rows) if i not in leave]))
            ours.batch_select_indices(keep)
            theirs.batch_select_indices(keep)
            rows -= len(leave)
    assert rows == 3 and ours.keys.shape == (3, 2, 2 * BLOCK + 7, 3)


def test_only_plain_layers_are_replaced() -> None:
    model = make("llama")
    assert [type(layer) for layer in make_cache(model).layers] == [RoomyLayer, RoomyLayer]
    model.config.sliding_window, model.config.layer_types = 4, ["sliding_attention", "full_attention"]
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    assert [type(layer) for layer in make_cache(model).layers] == [kinds[0], RoomyLayer] and kinds[
        0
    ] is not DynamicLayer
