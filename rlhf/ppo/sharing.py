"""Splitting PPO's work over ranks: each samples, scores and learns from a part; what is found is put together again.

Episodes are small beside weights, so every rank gets all of them. What is then computed of them all together (whitened
advantages, means, the KL controller) is the same arithmetic on every rank and on one: nothing is averaged of averages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf.engine.ranks import Ranks
from rlhf.errors import RLHFError
from rlhf.rollout import decode_groups
from rlhf.scoring import micro_batches

T = TypeVar("T")


def own_groups(lengths: Sequence[int], group: int, ranks: Ranks) -> list[int]:
    """The places of the prompts that this rank decodes, in rising order: whole decode groups of the global batch, in
    turn, so that which rows are decoded together does not depend on the number of ranks."""
    if ranks.size == 1:
        return list(range(len(lengths)))
    return sorted(i for rows in decode_groups(lengths, group)[ranks.rank :: ranks.size] for i in rows)


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in `lengths` for each of `size` ranks, with about the same number of tokens: the longest that is left goes
    to the rank that has least."""
    if size == 1:
        return [list(range(len(lengths)))]
    out: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        out[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(share) for share in out]


def own_passes(lengths: Sequence[int], micro_tokens: int, ranks: Ranks, *, lockstep: bool) -> list[list[int]]:
    """This rank's micro-batches of a minibatch, as places in `lengths`; with `lockstep` as many as any rank has, the
    last ones empty."""

    def cut(share: list[int]) -> list[list[int]]:
        return [[share[i] for i in group] for group in micro_batches([lengths[i] for i in share], micro_tokens)]

    parts = shares(lengths, ranks.size)
    own = cut(parts[ranks.rank])
    if lockstep and ranks.size > 1:
        own += [[]] * (max(len(cut(part)) for part in parts) - len(own))
    return own


def each(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work`, which calls no other rank, gave on every rank. An error of ours on any rank is raised on all, since
    the others would wait for a rank that has stopped."""
    if ranks.size == 1:
        return [work()]
    found: T | None = None
    problem: RLHFError | None = None
    try:
        found = work()
    except RLHFError as error:
        problem = error
    everywhere = ranks.gather((found, None if problem is None else (type(problem), str(problem))))
    if problem is not None:
        raise problem
    kind, message = next((fault for _, fault in everywhere if fault is not None), (RLHFError, ""))
    if message:
        raise kind(message)
    return [part for part, _ in everywhere]  # type: ignore[misc]  # without a problem it is a T


def here(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work` gave on this rank, once it has come to an end on all; errors as `each` has them."""
    if ranks.size == 1:
        return work()
    kept: list[T] = []
    each(ranks, lambda: kept.append(work()))
    return kept[0]
