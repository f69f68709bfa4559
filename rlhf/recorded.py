"""Steps of decoding recorded once and replayed: CUDA graphs.

On a GPU a step at a few rows is some hundred small kernels, and starting them takes longer than running them. A
recording starts them all at once, with every tensor where it was. So nothing in it may change its shape: the cache is
as large as it will ever be, attention reads it up to a multiple of `SPAN` tokens under a mask, and rows that have
finished stay until the rest fits the next smaller number of rows. Each of these shapes is recorded when it is first
met. A model is tried once against its own forward pass; one that cannot be recorded is decoded as always.

Shapes: B rows, R rows of a recording of which the first B count, S tokens of a recording, G key-value heads, D units of
a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf.console import say
from rlhf.decode_step import DecodeStep
from rlhf.kv_cache import RoomyLayer, make_cache, move_rows
from rlhf.packed import convenient
from rlhf.trial import PROBE, follows_forward

SPAN = 256  # tokens; a multiple of it is what attention reads

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]

_usable: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def cuda_graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What does `work` again, in place, and where its result is after that.

    `work` must only queue kernels, and may be done twice. https://docs.pytorch.org/docs/stable/notes/cuda.html
    """
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has not typed it
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()  # what libraries set up on their first call on a stream cannot be recorded
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog is a thread that asks CUDA questions; only this thread's may spoil a recording.
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}  # by type of device


class _FixedLayer(DynamicLayer):  # type: ignore[misc]  # transformers ships no types
    """A cache layer of R rows and S tokens, whose next token goes where `place_1` points when it is replayed."""

    def __init__(self, room: Sequence[Tensor], rows: int, tokens: int, place_1: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (part[:rows, :, :tokens] for part in room)
        self.place_1, self.is_initialized = place_1, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place_1, key_states)
        self.values.index_copy_(2, self.place_1, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """For what a model does with it beside the positions and the mask that it is given: the most there can be."""
        return int(self.keys.shape[-2]) - 1


class RecordedSteps:
    """The steps of one round of sampling: recordings hold the addresses of weights and cache.

    rows, tokens: the most that a decode group of the round will have.
    """

    def __init__(self, model: Any, step: DecodeStep | None, rows: int, tokens: int, record: Recorder) -> None:
        self.model, self.step, self.record = model, step, record
        self.most = convenient(rows), spanned(tokens)
        device = next(model.parameters()).device
        self.ids_R1, self.start_R1 = torch.zeros(2, self.most[0], 1, dtype=torch.long, device=device)
        self.place_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.rooms: list[list[Tensor]] = []  # of each layer: keys and values, the memory of all groups' caches
        self.recordings: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    def cache(self) -> Any:
        """A cache for the prompts of a group. Once they are in it, it is this object's to write and to thin out."""
        cache = make_cache(self.model, self.most)
        for layer, room in zip(cache.layers, self.rooms, strict=bool(self.rooms)):
            layer.room = room
        return cache

    def __call__(self, ids_B1: Tensor, position_B1: Tensor, length: int, cache: Any) -> Tensor:
        """logits_BV for tokens that go to place `length` of `cache`; they are overwritten by the next step."""
        self.rooms = self.rooms or [layer.room for layer in cache.layers]
        rows = len(ids_B1)
        self.ids_R1[:rows], self.start_R1[:rows] = ids_B1, length - position_B1
        self.place_1.fill_(length)
        shape = convenient(rows), spanned(length + 1)
        if shape not in self.recordings:
            self.recordings[shape] = self.record(partial(self._forward, *shape))
        replay, logits_RV = self.recordings[shape]
        replay()
        return logits_RV[:rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that `fill_holes` says."""
        for room in self.rooms:
            move_rows(room, indices.tolist())

    def _forward(self, rows: int, tokens: int) -> Tensor:
        start_R1 = self.start_R1[:rows]
        place_S = torch.arange(tokens, device=start_R1.device)
        mask_RS = (place_S >= start_R1) & (place_S <= self.place_1)
        position_R1 = self.place_1 - start_R1
        cache = DynamicCache()
        cache.layers = [_FixedLayer(room, rows, tokens, self.place_1) for room in self.rooms]
        if self.step is not None:
            return self.step(self.ids_R1[:rows], position_R1, mask_RS, cache)[:, -1]
        logits_R1V: Tensor = self.model(
            input_ids=self.ids_R1[:rows], attention_mask=mask_RS[:, None, None], position_ids=position_R1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return logits_R1V[:, -1]


def recorded_steps(model: Any, step: DecodeStep | None, rows: int, tokens: int) -> RecordedSteps | None:
    """Recorded steps for a round of sampling from `model`, or None where there is no recorder or no trust in it."""
    record = RECORDERS.get(next(model.parameters()).device.type)
    inner = getattr(model, "inner", model)
    if record is None or not all(type(layer) is RoomyLayer for layer in make_cache(inner).layers):
        return None  # a sliding window would need a layer of its own
    if inner not in _usable:
        _usable[inner] = _same_as_forward(model, step, record)
        if not _usable[inner]:
            say(f"{type(inner).__name__} cannot be recorded: each of its steps of decoding is started kernel by kernel")
    return RecordedSteps(model, step, rows, tokens, record) if _usable[inner] else None


def _same_as_forward(model: Any, step: DecodeStep | None, record: Recorder) -> bool:
    steps = RecordedSteps(model, step, 2, PROBE, record)

    def by_recording(ids_B1: Tensor, position_B1: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        return steps(ids_B1, position_B1, mask_BT.shape[1] - 1, cache).unsqueeze(1)

    return follows_forward(model, steps.cache, by_recording)


def spanned(tokens: int) -> int:
    """At least `tokens`, and a multiple of SPAN."""
    return -(-tokens // SPAN) * SPAN
