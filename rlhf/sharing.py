"""Which rows each rank of a supervised stage reads: every update is the same set of rows, however many ranks share it.

Inside an update the long rows come first, so that what runs at the same time on all ranks is of like length. Where a
pass pads its rows to the longest of them, a rank has neighbours, and who has the longer half changes from pass to pass;
where it does not, rows are dealt out in turn. Each rank makes the same number of passes in an update, since a pass may
hold collectives: where an update has fewer rows than ranks, a rank reads a row that does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, Sampler

from rlhf.engine.ranks import Ranks

T = TypeVar("T")
Blank = Callable[[Any], Any]  # a row as one that does not count


def micro_steps(rows: Sequence[int], micro: int, ranks: Ranks, *, padded: bool) -> Iterator[list[int]]:
    """This rank's parts of an update's `rows`, at most `micro` at a time. A row that does not count is `~row`.

    rows: sorted by length. padded: that a pass takes as long as so many rows of its longest, not as all its tokens.
    """
    size = ranks.size
    for number, start in enumerate(range(0, len(rows), micro * size)):
        step = rows[start : start + micro * size]
        place = size - 1 - ranks.rank if number % 2 else ranks.rank
        if padded:
            first, end = (len(step) * at // size for at in (place, place + 1))
            own = list(step[first:end])
        else:  # 0, 1, 2, 2, 1, 0, 0, ... have as many tokens
            own = [row for at, row in enumerate(step) if min(at % (2 * size), -(at + 1) % (2 * size)) == place]
        yield own or [~step[-1]]


class SharedRows(Sampler[list[int]]):
    """The micro-batches of an epoch on this rank: a new permutation of the rows for each epoch, a function of seed and
    epoch alone, so that a resume finds it."""

    def __init__(
        self, lengths: list[int], batch: int, micro: int, ranks: Ranks, draw: Callable[[], int], *, padded: bool
    ) -> None:
        """lengths: of the rows, in tokens; draw: the seed of the epoch that begins; padded: as `micro_steps` has it."""
        self.lengths, self.batch, self.micro, self.ranks, self.draw = lengths, batch, micro, ranks, draw
        self.padded = padded

    def __len__(self) -> int:
        width = self.micro * self.ranks.size
        whole, rest = divmod(len(self.lengths), self.batch)
        return whole * -(-self.batch // width) + -(-rest // width)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.draw())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.batch):
            update = sorted(order[start : start + self.batch], key=lambda row: -self.lengths[row])
            yield from micro_steps(update, self.micro, self.ranks, padded=self.padded)


class Rows(Dataset[Any]):
    """Rows by number; `~number` gives the row blanked."""

    def __init__(self, rows: Any, blank: Blank) -> None:
        self.rows, self.blank = rows, blank

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number] if number >= 0 else self.blank(self.rows[~number])


def own_share(items: Sequence[T], ranks: Ranks) -> tuple[list[T], int]:
    """This rank's items of a list that all ranks have, as many on each, and how many of them count: the last one may be
    another rank's, read for company."""
    own = list(items[ranks.rank :: ranks.size])
    count = len(own)
    if ranks.rank >= len(items) % ranks.size > 0:
        own.append(items[0])
    return own, count
