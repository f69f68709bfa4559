"""Three people who rank the model's responses: all want the same, each with noise of their own.

Utility plus Gumbel noise makes pairwise choices follow Bradley–Terry at that scale. Neighbours closer than `TIE` tie.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.artifacts import write_text
from rlhf.errors import DataError
from rlhf.quickstart import gold
from rlhf.quickstart.world import Case, Shop

ANNOTATORS = {"careful": 0.7, "ordinary": 1.0, "careless": 2.0}  # scale of the Gumbel noise
TIE = 0.4


def ranks_of(perceived: Sequence[float], tie: float = TIE) -> list[int]:
    """Ranks, 1 for the best; neighbours in value that are closer than `tie` share one: [2, 1.7, 0] -> 1, 1, 2."""
    order = sorted(range(len(perceived)), key=lambda i: -perceived[i])
    ranks = [1] * len(perceived)
    for above, below in itertools.pairwise(order):
        ranks[below] = ranks[above] + (perceived[above] - perceived[below] >= tie)
    return ranks


def gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))


def judge(shop: Shop, case: Case, responses: Sequence[str]) -> tuple[str, list[int]]:
    """The annotator that a prompt falls to, and their ranks. The same inputs always give the same answer."""
    rng = random.Random(f"annotator/{shop.seed}/{case.id}")
    name = rng.choice(list(ANNOTATORS))
    perceived = [gold.utility(shop, case, text) + ANNOTATORS[name] * gumbel(rng) for text in responses]
    return name, ranks_of(perceived)


def case_of(shop: Shop, prompt: Any, where: str) -> Case:
    """The case behind a prompt, given as text or as messages; DataError if nobody in this world says that."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    case = shop.by_text.get(prompt.strip()) if isinstance(prompt, str) else None
    if case is None:
        raise DataError(f"{where}: the quickstart's annotators only know its own prompts, not {str(prompt)[:80]!r}")
    return case


def rank_file(shop: Shop, samples: Path, out: Path) -> None:
    """Read `{"prompt", "responses", ...}` lines, write them again with `ranks`, `annotator` and `subset`."""
    lines = []
    for number, line in enumerate(samples.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        where = f"{samples}:{number}"
        try:
            row = json.loads(line)
            prompt, responses = row["prompt"], list(row["responses"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{where}: wants {{"prompt": ..., "responses": [...]}}, one object a line') from error
        case = case_of(shop, prompt, where)
        annotator, ranks = judge(shop, case, responses)
        row |= {"ranks": ranks, "annotator": annotator, "subset": str(case.kind)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(out, "".join(lines))
