"""Responses that each carry their own score or rank: UltraFeedback and Nectar."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

from rlhf.data.rows import (
    NO_LABEL,
    NO_QUESTION,
    Dirty,
    Kind,
    Malformed,
    NoQuestion,
    Parsed,
    field_of,
    has,
    is_transcript,
    make_prompt,
    make_ranking,
    messages_of,
    places_of,
    rank_of,
    shown,
    split_transcript,
    text_of,
)
from rlhf.types import Messages


class UltraFeedback:
    """`completions` with scores (Cui et al. 2310.01377): the highest is best, equal ones tie.

    The score is the mean of the aspects that `annotations` rates, or else `fine-grained_score`, or else
    `overall_score`; one and the same for all completions of a row.
    """

    name = "ultrafeedback"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "instruction": "Hello",
        "completions": [
            {"response": "Hi.", "annotations": {"helpfulness": {"Rating": "5"}, "honesty": {"Rating": "N/A"}}},
            {"response": "What?", "annotations": {"helpfulness": {"Rating": "2"}, "honesty": {"Rating": "3"}}},
        ],
    }

    def matches(self, row: Any) -> bool:
        return has(row, "instruction", "completions")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        messages = messages_of(text_of(row, "instruction"), "instruction")
        used = ("instruction", "completions", "annotator", "subset", "weight")
        if kind == "prompt":
            return [make_prompt(messages, row, used, "instruction")]
        completions = _objects(row, "completions")
        responses = [_text(c, "response", f"completions[{i}]") for i, c in enumerate(completions)]
        scores = self._scores(completions)
        prompt = make_prompt(messages, row, used, "instruction")
        return [make_ranking(prompt, responses, places_of(scores), row, scores)]

    def _scores(self, completions: list[dict[str, Any]]) -> list[float | None]:
        """One score for each completion; None is unrated."""
        for name in ("annotations", "fine-grained_score", "overall_score"):
            if any(has(completion, name) for completion in completions):
                break
        else:
            raise Malformed(
                "completions[0] has no score: `annotations` with ratings, `fine-grained_score` or `overall_score`"
            )
        for i, completion in enumerate(completions):
            if not has(completion, name):
                raise Malformed(f"completions[{i}].{name} is missing")
        if name != "annotations":
            return [_number(c[name], f"completions[{i}].{name}") for i, c in enumerate(completions)]
        ratings = [self._ratings(c["annotations"], f"completions[{i}].annotations") for i, c in enumerate(completions)]
        rated = [set(found) for found in ratings if found]
        # Only aspects rated for all of them compare like with like; fsum gives equal sums, and so equal means, for
        # equal ratings in any order.
        aspects = set.intersection(*rated) if rated else set()
        return [math.fsum(found[a] for a in aspects) / len(aspects) if found and aspects else None for found in ratings]

    def _ratings(self, value: Any, place: str) -> dict[str, float]:
        """The ratings of one completion by aspect; an aspect is a number, or an object with `Rating`."""
        if not isinstance(value, dict):
            raise Malformed(f"{place} must be an object of aspects, not {shown(value)}")
        found = {}
        for aspect, rating in value.items():
            where = f"{place}.{aspect}"
            if isinstance(rating, dict):
                if "Rating" not in rating:
                    raise Malformed(f"{where}.Rating is missing")
                rating, where = rating["Rating"], f"{where}.Rating"
            number = _number(rating, where)
            if number is not None:
                found[aspect] = number
        return found


class Nectar:
    """`answers` with their `rank`, 1 is best (Zhu et al. 2023); the prompt is an HH transcript, text or messages."""

    name = "nectar"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "prompt": "\n\nHuman: Hello\n\nAssistant: ",
        "answers": [{"answer": "Hi.", "rank": 1}, {"answer": "What?", "rank": 2}],
    }

    def matches(self, row: Any) -> bool:
        return has(row, "prompt", "answers")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        messages, used = self._messages(row), ("prompt", "answers", "annotator", "subset", "weight")
        if kind == "ranking":
            answers = _objects(row, "answers")
            responses = [_text(a, "answer", f"answers[{i}]") for i, a in enumerate(answers)]
            for i, answer in enumerate(answers):
                if "rank" not in answer:
                    raise Malformed(f"answers[{i}].rank is missing")
            ranks = [rank_of(answer["rank"], f"answers[{i}].rank") for i, answer in enumerate(answers)]
        try:
            prompt = make_prompt(messages, row, used)
        except NoQuestion:
            raise Dirty(NO_QUESTION) from None  # as in HH, whose transcripts these are
        return [prompt if kind == "prompt" else make_ranking(prompt, responses, ranks, row)]

    def _messages(self, row: Any) -> Messages:
        value = field_of(row, "prompt")
        if not is_transcript(value):
            return messages_of(value, "prompt")
        messages, reply = split_transcript(value, "prompt")
        return [*messages, {"role": "assistant", "content": reply}] if reply else messages


def _objects(row: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects. Fewer than two are dirt and not malformed: sets sampled from models hold such rows."""
    value = field_of(row, name)
    if not isinstance(value, list):
        raise Malformed(f"field `{name}` must be a list of objects, not {shown(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise Malformed(f"{name}[{i}] must be an object, not {shown(item)}")
    if len(value) < 2:
        raise Dirty(NO_LABEL)
    return value


def _text(item: dict[str, Any], name: str, place: str) -> str:
    if item.get(name) is None:
        raise Malformed(f"{place}.{name} is missing")
    if not isinstance(item[name], str):
        raise Malformed(f"{place}.{name} must be text, not {shown(item[name])}")
    text: str = item[name]
    return text


_NUMERAL = re.compile(r"-?\d+(\.\d+)?")


def _number(value: Any, place: str) -> float | None:
    """A score: a finite number, also spelt out ("4"). Null and "N/A" are no score."""
    if value is None or value == "N/A":
        return None
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and _NUMERAL.fullmatch(value.strip()):
        return float(value)
    found = "NaN" if value != value else shown(value)
    raise Malformed(f"{place} must be a number, not {found}")
