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

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf.console import say
from rlhf.decode_step import DecodeStep
from rlhf.errors import ConfigError
from rlhf.kv_cache import is_roomy, make_cache, move_rows
from rlhf.packed import convenient
from rlhf.trial import PROBE, TriedOnce, follows_forward, hooked

SPAN = 256  # tokens; a multiple of it is what attention reads
SWITCH = "RLHF_CUDA_GRAPHS"  # 0: record nothing


class Recorder(Protocol):
    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does `work` again, in place, and where its result is after that. `work` may be done more than once."""


class CudaGraphs:
    """Recordings that share their memory, so that the result of one may be lost when another is replayed.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has not typed it

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        try:
            with torch.cuda.stream(self.stream):
                work()  # what libraries set up on their first call on a stream cannot be recorded
                with _no_waiting():  # a recording that fails leaves torch's allocator in disorder
                    work()
        finally:
            before.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # NCCL's watchdog is a thread that asks CUDA questions; only this thread's may spoil a recording.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        finally:
            torch.cuda.set_stream(before)  # a recording that fails to end does not go back by itself
        return graph.replay, result


@contextmanager
def _no_waiting() -> Iterator[None]:
    """RuntimeError where the CPU would wait for the GPU, as a copy from memory or the reading of a value does."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this does not see all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaGraphs}  # by type of device


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
        self.layers: list[Any] = []  # of the latest cache
        self.recordings: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    def cache(self) -> Any:
        """A cache for the prompts of a group. Once they are in it, it is this object's to write and to thin out."""
        cache = make_cache(self.model, self.most)
        for layer, before in zip(cache.layers, self.layers, strict=False):
            layer.room = before.room  # recordings hold its address
        self.layers = cache.layers
        self.start_R1.zero_()  # spare rows read at least the place that they write
        return cache

    def __call__(self, ids_B1: Tensor, position_B1: Tensor, length: int) -> Tensor:
        """logits_BV for tokens that go to place `length` of the latest cache; the next step overwrites them."""
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
        places = indices.tolist()
        for layer in self.layers:
            move_rows(layer.room, places)

    def _forward(self, rows: int, tokens: int) -> Tensor:
        start_R1 = self.start_R1[:rows]
        place_S = torch.arange(tokens, device=start_R1.device)
        mask_RS = (place_S >= start_R1) & (place_S <= self.place_1)
        position_R1 = self.place_1 - start_R1
        cache = DynamicCache()
        cache.layers = [_FixedLayer(layer.room, rows, tokens, self.place_1) for layer in self.layers]
        if self.step is not None:
            return self.step(self.ids_R1[:rows], position_R1, mask_RS, cache)[:, -1]
        logits_R1V: Tensor = self.model(
            input_ids=self.ids_R1[:rows], attention_mask=mask_RS[:, None, None], position_ids=position_R1,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return logits_R1V[:, -1]


def recorded_steps(model: Any, step: DecodeStep | None, rows: int, tokens: int) -> RecordedSteps | None:
    """Recorded steps for a round of sampling from `model`, or None where there is no recorder or no trust in it."""
    recorder = RECORDERS.get(next(model.parameters()).device.type)
    inner = getattr(model, "inner", model)
    if switched_off() or recorder is None or not is_roomy(inner):
        return None
    if hooked(inner.modules()):
        return None  # they would run while a step is recorded and never again
    return RecordedSteps(model, step, rows, tokens, recorder()) if _usable(inner, model, step, recorder) else None


def switched_off() -> bool:
    """True if the environment says so; ConfigError if it says anything but 0 or 1."""
    said = os.environ.get(SWITCH, "1")
    if said not in ("0", "1"):
        raise ConfigError(f"{SWITCH}={said}: it is 0 (start each kernel of a decode step) or 1 (replay recorded steps)")
    return said == "0"


def _same_as_forward(inner: Any, model: Any, step: DecodeStep | None, recorder: Callable[[], Recorder]) -> bool:
    """`model` is `inner`, or a role on it as a shared base."""
    steps = RecordedSteps(model, step, 2, PROBE, recorder())

    def by_recording(ids_B1: Tensor, position_B1: Tensor, mask_BT: Tensor, _cache: Any) -> Tensor:
        return steps(ids_B1, position_B1, mask_BT.shape[1] - 1).unsqueeze(1)

    # Only SDPA takes a mask of truth values as one: written out, attention adds it.
    by_sdpa = step is not None or inner.config._attn_implementation == "sdpa"
    usable = by_sdpa and follows_forward(model, steps.cache(), lambda: by_recording)
    if not usable:
        say(f"{type(inner).__name__} cannot be recorded: each of its steps of decoding is started kernel by kernel")
    return usable


_usable = TriedOnce(_same_as_forward)


def spanned(tokens: int) -> int:
    """At least `tokens`, and a multiple of SPAN."""
    return -(-tokens // SPAN) * SPAN
