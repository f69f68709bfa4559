"""From rows of token ids to one score each: padding, cutting into passes of alike lengths, reading the last token.

Shapes: B sequences, T tokens, D hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.encoders import is_encoder
from rlhf.last_layer import last_layer_at


def pad_right(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists as ids_BT and their lengths_B. What stands in the padding never reaches a causal model's output."""
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return ids_BT, lengths_B


def micro_batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Places in `lengths`, longest first, in groups of at most `micro_tokens` tokens when padded; a longer row makes a
    group of its own. Longest first, so that memory runs out early or never.

    Of all such cuts of the sorted rows the one that costs least, by a shortest path: a group costs its padded tokens
    and an eighth of `micro_tokens`, for what a pass takes however few its tokens are.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    pass_cost = micro_tokens / 8
    cost, start = [0.0], [0]  # of the cheapest cut of the first `end` rows, and where its last group begins
    for end in range(1, len(order) + 1):
        options = []
        for first in reversed(range(end)):
            padded = lengths[order[first]] * (end - first)
            if padded > micro_tokens and first < end - 1:
                break
            options.append((cost[first] + padded + pass_cost, first))
        best, first = min(options)
        cost.append(best)
        start.append(first)
    groups = []
    end = len(order)
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def read_scores(model: Any, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """The reward of each right-padded sequence, scores_B in float32, read at its last token by its length.

    No attention mask is passed: to the right of what a causal model reads, padding changes nothing, and the unmasked
    path is the fast one. An encoder looks both ways, so it is given one.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_encoder(inner):
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        logits_B1: Tensor = inner(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
        return logits_B1[:, 0].float()
    body = getattr(inner, inner.base_model_prefix)
    last_B = torch.arange(len(lengths_B), device=ids_BT.device) * ids_BT.shape[1] + lengths_B - 1
    with last_layer_at(body, last_B):
        hidden_BTD = body(input_ids=ids_BT, use_cache=False).last_hidden_state
    scores_B: Tensor = inner.score(hidden_BTD.flatten(0, 1)[last_B])[:, 0].float()
    return scores_B


@torch.no_grad()
def score_ids(model: Any, rows: Sequence[list[int]], micro_tokens: int) -> list[float]:
    """The reward of each row of token ids, in length-sorted forward passes of at most `micro_tokens` tokens."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    scores = [0.0] * len(rows)
    for places in micro_batches([len(row) for row in rows], micro_tokens):
        found = read_scores(model, *pad_right([rows[place] for place in places], 0, device)).tolist()
        for place, score in zip(places, found, strict=True):
            scores[place] = score
    model.train(training)
    return scores
