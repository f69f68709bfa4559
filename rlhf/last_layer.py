"""Leaving out the part of the last layer whose output nobody reads.

A loss on response tokens, a score at the last token and the first step of decoding read few places of the last hidden
states. The last layer's keys and values are needed everywhere, but its queries, its attention's output projection and
its feed-forward block act on each place by itself: here they run at the places that are read, and give zeros elsewhere.
Whether that is so for a model is tried once, on the model as a whole.

Shapes: B rows, T tokens of a padded row, D units of a module's input, N places that are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.trial import UNLIKE, TriedOnce, alike

BLOCKS = ("mlp", "self_attn.q_proj", "self_attn.o_proj")  # of a layer, by the library's usual names
PROBE = 8  # tokens of the row that a model is tried on


@contextmanager
def last_layer_at(model: Any, take_N: Tensor) -> Iterator[None]:
    """Inside, the last layer of `model` is whole only at `take_N`, places in the flattened [B*T].

    A model that is built otherwise, or recomputes its activations (long after this context has ended), runs as always.
    """
    with _picked(usable_blocks(model), take_N):
        yield


def usable_blocks(model: Any) -> list[nn.Module]:
    """The blocks of the last layer that may run at some places only. A model is tried when this is first asked, which
    on several ranks has to be before its weights are cut up: not all ranks come to read it at the same time."""
    inner = getattr(model, "inner", model)  # of a role on a shared base
    body = getattr(inner, "base_model", inner)
    blocks = _blocks(body)
    return blocks if blocks and _usable(body, blocks) else []


def trust_blocks(model: Any) -> None:
    """Do not try a model that has no data to be tried with: its blocks, if it has them, may run at some places only."""
    _usable.trust(model)


@contextmanager
def _picked(blocks: list[nn.Module], take_N: Tensor) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            before, after = _hooks(take_N)
            stack.enter_context(block.register_forward_pre_hook(before))
            stack.enter_context(block.register_forward_hook(after))
        yield


def _hooks(take_N: Tensor) -> tuple[Any, Any]:
    shape = torch.Size(())

    def pick(_block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal shape
        shape = args[0].shape
        return (args[0].flatten(0, 1)[take_N].unsqueeze(0), *args[1:])

    def put(_block: nn.Module, _args: tuple[Tensor, ...], out_1ND: Tensor) -> Tensor:
        full = out_1ND.new_zeros(shape[0] * shape[1], out_1ND.shape[-1])
        return full.index_copy(0, take_N, out_1ND[0]).view(shape[0], shape[1], -1)

    return pick, put


def _blocks(body: Any) -> list[nn.Module]:
    """The blocks of the last layer that are to run at some places only."""
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    if not isinstance(layers, nn.ModuleList) or getattr(layers[-1], "gradient_checkpointing", False):
        return []
    found = []
    for name in BLOCKS:
        block: Any = layers[-1]
        for part in name.split("."):
            block = getattr(block, part, None)
        if isinstance(block, nn.Module):
            found.append(block)
    return found


@torch.no_grad()
def _same_as_whole(body: Any, blocks: list[nn.Module]) -> bool:
    """True if the hidden states at some places do not change when the blocks run at these places alone."""
    at = next(body.parameters())
    take_N = torch.tensor([1, 4, PROBE - 1], device=at.device)
    was_training = body.training
    body.eval()
    try:
        vocabulary = body.get_input_embeddings().weight.shape[0]
        ids_BT = (torch.arange(PROBE, device=at.device) % vocabulary).unsqueeze(0)
        whole_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
        with _picked(blocks, take_N):
            some_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
    except UNLIKE:
        return False  # a block takes or gives something else than one tensor
    finally:
        body.train(was_training)
    return alike(whole_BTD[0, take_N], some_BTD[0, take_N])


_usable = TriedOnce(_same_as_whole)
