"""Reading one row's fields and making rows of them, shared by all formats."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from rlhf.types import Demonstration, Messages, Prompt, Ranking

Kind = Literal["demonstration", "ranking", "prompt"]
Parsed = Demonstration | Ranking | Prompt

EMPTY_REPLY, EMPTY_PROMPT, NO_QUESTION = "empty reply", "empty prompt", "reply to no question"
IDENTICAL, MISMATCH, NO_LABEL = "identical responses", "prompt mismatch", "no label"
INTRANSITIVE = "intransitive"
REPEATED = "repeated ranking"  # not dirt: kept, counted and named
_ROLES = ("system", "user", "assistant")


Split = tuple[Messages, str]  # a conversation: what stands before its last reply, and that reply


class Malformed(ValueError):
    """A row that cannot be read; the message names the field. Collected, and raised as one DataError a file."""


class NoQuestion(Malformed):
    """A prompt that does not end with a user message."""


class Dirty(Exception):
    """A row to drop and count; the message is the kind of dirt."""


class Contradiction(Dirty):
    """Comparisons that no ranking agrees with; `instead` is the nearest one, for data.intransitive=keep."""

    def __init__(self, instead: Ranking) -> None:
        super().__init__(INTRANSITIVE)
        self.instead = instead


def field_of(row: Any, name: str) -> Any:
    """The value of a field; a null counts as missing."""
    if not isinstance(row, dict):
        raise Malformed(f"must be an object with fields, not {shown(row)}")
    if row.get(name) is None:
        raise Malformed(f"field `{name}` is missing")
    return row[name]


def text_of(row: Any, name: str) -> str:
    value = field_of(row, name)
    if not isinstance(value, str):
        raise Malformed(f"field `{name}` must be text, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def has(row: Any, *names: str) -> bool:
    return isinstance(row, dict) and all(row.get(name) is not None for name in names)


def messages_of(value: Any, name: str) -> Messages:
    """Text, which is one user message, or a list of messages, checked."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise Malformed(f"field `{name}` must be text or a list of messages, not {shown(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise Malformed(f"{name}[{i}] must have `role` and `content`, not {shown(message)}")
        if message["role"] not in _ROLES:
            raise Malformed(f"{name}[{i}].role must be one of {', '.join(_ROLES)}, not {shown(message['role'])}")
        if not isinstance(message["content"], str):
            raise Malformed(f"{name}[{i}].content must be text, not {shown(message['content'])}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def split_transcript(text: str, name: str) -> Split:
    """The turns of an HH transcript before the last reply, and that reply. Turns of one speaker that follow each other
    become one, but a last reply stays apart: what stands before it in only one of two transcripts is a mismatch."""
    parts = _TURN.split(text.strip())
    if parts[0].strip() or len(parts) < 3:
        raise Malformed(f"field `{name}` must be a transcript that starts with 'Human:', not {shown(text)}")
    speakers, texts = parts[1::2], [part.strip() for part in parts[2::2]]
    reply = texts.pop() if speakers[-1] == "Assistant" else ""
    messages: Messages = []
    for speaker, said in zip(speakers, texts, strict=False):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + said
        else:
            messages.append({"role": role, "content": said})
    return messages, reply


def make_prompt(messages: Messages, row: Any, used: tuple[str, ...], name: str = "prompt") -> Prompt:
    """A prompt, with the row's further fields as tags. `used` are the fields that are not tags."""
    if not messages or messages[-1]["role"] != "user":
        raise NoQuestion(f"field `{name}`: the prompt must end with a user message")
    if not messages[-1]["content"].strip():
        raise Dirty(EMPTY_PROMPT)
    fields = row if isinstance(row, dict) else {}
    tags = {k: v for k, v in fields.items() if k not in (*used, "id") and v is not None}
    given = fields.get("id")
    return Prompt(messages=messages, id="" if given is None else str(given), tags=tags)


def make_demonstration(prompt: Prompt, response: str) -> Demonstration:
    if not response.strip():
        raise Dirty(EMPTY_REPLY)
    return Demonstration(prompt=prompt, response=response)


def make_pair(chosen: Split, rejected: Split, row: Any, used: tuple[str, ...]) -> Ranking:
    """A ranking of two. Checked in this order, so that a row has one kind of dirt: mismatch, empty, identical."""
    (messages, good), (other, bad) = chosen, rejected
    annotator, subset, weight = label_of(row, "annotator"), label_of(row, "subset"), weight_of(row)
    margin = margin_of(row)
    if messages != other:
        raise Dirty(MISMATCH)
    prompt = make_prompt(messages, row, used)
    if not good.strip() or not bad.strip():
        raise Dirty(EMPTY_REPLY)
    if good.strip() == bad.strip():
        raise Dirty(IDENTICAL)
    return Ranking(
        prompt=prompt, responses=[good, bad], ranks=[1, 2], annotator=annotator, subset=subset,
        scores=None if margin is None else [margin, 0.0], weight=weight,
    )  # fmt: skip


def label_of(row: Any, name: str) -> str | None:
    """An optional label, as text. A boolean or an object is no name of an annotator."""
    value = row.get(name)
    if value is not None and type(value) not in (str, int):
        raise Malformed(f"field `{name}` must be text or a whole number, not {shown(value)}")
    return None if value is None else str(value)


def weight_of(row: Any, place: str = "weight") -> float:
    """The optional weight of a ranking, 1 if absent."""
    value = row.get("weight")
    if value is None:
        return 1.0
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise Malformed(f"field `{place}` must be a finite number above 0, not {shown(value)}")
    return float(value)


def margin_of(row: Any) -> float | None:
    """By how much the chosen response of a pair is better, if the row says so."""
    value = row.get("margin")
    if value is not None and (type(value) not in (int, float) or not 0 <= value < math.inf):
        raise Malformed(f"field `margin` must be a finite number and not negative, not {shown(value)}")
    return None if value is None else float(value)


def scores_of(row: Any, ranks: Sequence[int | None]) -> list[float | None] | None:
    """The optional scores of a row with ranks. A better rank must have a higher score, a tie an equal one, and an
    unranked response none."""
    value = row.get("scores")
    if value is None:
        return None
    if not isinstance(value, list):
        raise Malformed(f"field `scores` must be a list of numbers, not {shown(value)}")
    for i, score in enumerate(value):
        if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
            raise Malformed(f"scores[{i}] must be a finite number or null, not {shown(score)}")
    if len(value) != len(ranks):
        raise Malformed(f"`scores` has {len(value)} entries for {len(ranks)} responses")
    scores = [None if score is None else float(score) for score in value]
    places = sorted({rank for rank in ranks if rank is not None})
    if places_of(scores) != [None if rank is None else places.index(rank) + 1 for rank in ranks]:
        raise Malformed(f"`scores` order the responses otherwise than `ranks`: {shown(value)} and {shown([*ranks])}")
    return scores


def texts_of(value: Any, name: str) -> list[str]:
    """A list of two or more texts, checked."""
    if not isinstance(value, list):
        raise Malformed(f"field `{name}` must be a list of texts, not {shown(value)}")
    if len(value) < 2:
        raise Malformed(f"field `{name}` needs at least 2 entries, not {len(value)}")
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise Malformed(f"{name}[{i}] must be text, not {shown(text)}")
    return value


def ranks_of(value: Any, name: str) -> list[int | None]:
    """A list of ranks, checked."""
    if not isinstance(value, list):
        raise Malformed(f"field `{name}` must be a list of whole numbers, not {shown(value)}")
    return [rank_of(rank, f"{name}[{i}]") for i, rank in enumerate(value)]


def rank_of(value: Any, place: str) -> int | None:
    """A rank, checked. 2.0 is 2, since columns with nulls are often stored as floats."""
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if value is not None and not (whole and value >= 1):
        found = "NaN" if value != value else shown(value)
        raise Malformed(f"{place} must be a whole number from 1 (best), or null, not {found}")
    return None if value is None else int(value)


def make_ranking(
    prompt: Prompt, responses: list[str], ranks: list[int | None], row: Any, scores: list[float | None] | None = None
) -> Ranking:
    """A ranking with the row's labels. Raises Dirty for an empty reply, too few ranks and copies, in this order."""
    annotator, subset, weight = label_of(row, "annotator"), label_of(row, "subset"), weight_of(row)
    if not all(response.strip() for response in responses):
        raise Dirty(EMPTY_REPLY)
    if sum(rank is not None for rank in ranks) < 2:
        raise Dirty(NO_LABEL)
    score_of = None if scores is None else dict(zip(ranks, scores, strict=True))  # equal ranks have equal scores
    responses, ranks = merge_copies(responses, ranks)
    return Ranking(
        prompt=prompt, responses=responses, ranks=ranks, annotator=annotator, subset=subset,
        scores=None if score_of is None else [score_of[rank] for rank in ranks], weight=weight,
    )  # fmt: skip


def places_of(scores: Sequence[float | None]) -> list[int | None]:
    """Ranks from scores: the highest is 1, equal scores tie, None stays unranked."""
    found = sorted({score for score in scores if score is not None}, reverse=True)
    return [None if score is None else found.index(score) + 1 for score in scores]


def merge_copies(responses: list[str], ranks: list[int | None]) -> tuple[list[str], list[int | None]]:
    """One entry for each text: with its rank if its copies agree, none at all if they contradict each other.

    Raises Dirty if copies leave fewer than two ranked texts. A pair of copies can teach a reward model nothing (it
    scores them alike), and a contradiction says that the annotator did not compare the texts.
    """
    by_text: dict[str, tuple[str, set[int | None]]] = {}
    for response, rank in zip(responses, ranks, strict=True):
        by_text.setdefault(response.strip(), (response, set()))[1].add(rank)
    if len(by_text) == len(responses):
        return responses, ranks
    single = [(text, next(iter(found))) for text, found in by_text.values() if len(found) == 1]
    if sum(rank is not None for _, rank in single) < 2:
        raise Dirty(IDENTICAL)
    return [text for text, _ in single], [rank for _, rank in single]
