"""The forms of published data sets: ShareGPT conversations, and pairwise comparisons as qa-feedback has them."""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import Any, ClassVar

from rlhf.data.rows import (
    EMPTY_PROMPT,
    NO_QUESTION,
    Contradiction,
    Dirty,
    Kind,
    Malformed,
    NoQuestion,
    Parsed,
    field_of,
    has,
    make_demonstration,
    make_prompt,
    make_ranking,
    messages_of,
    places_of,
    shown,
    text_of,
    texts_of,
)
from rlhf.types import Messages


class ShareGPT:
    """Turns of `from` and `value`: the last reply is the response, what stands before it the prompt."""

    name = "sharegpt"
    kinds: ClassVar[tuple[Kind, ...]] = ("demonstration", "prompt")
    example: ClassVar[Any] = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}
    _roles: ClassVar[dict[str, str]] = {
        "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    }  # fmt: skip

    def matches(self, row: Any) -> bool:
        return has(row, "conversations")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        messages = self._messages(field_of(row, "conversations"))
        if has(row, "system") and text_of(row, "system").strip():
            messages = [{"role": "system", "content": text_of(row, "system")}, *messages]
        if not messages:
            raise Dirty(EMPTY_PROMPT)
        reply = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        try:
            prompt = make_prompt(messages, row, ("conversations", "system"), "conversations")
        except NoQuestion:
            raise Dirty(NO_QUESTION) from None  # people share what they like; no mistake of the file
        return [prompt if kind == "prompt" else make_demonstration(prompt, reply)]

    def _messages(self, value: Any) -> Messages:
        if not isinstance(value, list):
            raise Malformed(f"field `conversations` must be a list of turns, not {shown(value)}")
        for i, turn in enumerate(value):
            if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
                raise Malformed(f"conversations[{i}] must have `from` and `value`, not {shown(turn)}")
            if not isinstance(turn["from"], str) or turn["from"] not in self._roles:
                known = ", ".join(self._roles)
                raise Malformed(f"conversations[{i}].from must be one of {known}, not {shown(turn['from'])}")
            if not isinstance(turn["value"], str):
                raise Malformed(f"conversations[{i}].value must be text, not {shown(turn['value'])}")
        return [{"role": self._roles[turn["from"]], "content": turn["value"]} for turn in value]


class Comparisons:
    """Every pair of K responses compared, as in qa-feedback (Wu et al. 2306.01693): `preference` lists the verdicts in
    the order 1 against 2, 1 against 3, ..., K-1 against K; 1 is for the first, 2 for the second, 0 is a tie."""

    name = "comparisons"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "question": "Hello", "prediction 1": "What?", "prediction 2": "Hi.", "prediction 3": "Hello.",
        "preference": [2, 2, 0],
    }  # fmt: skip
    _prediction = re.compile(r"prediction \d+")
    _sign: ClassVar[dict[int, int]] = {0: 0, 1: 1, 2: -1}  # of the first response's margin over the second

    def matches(self, row: Any) -> bool:
        return has(row, "preference") and (has(row, "question") or has(row, "prompt", "responses"))

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        asked = "question" if has(row, "question") else "prompt"
        messages = messages_of(field_of(row, asked), asked)
        predictions = [name for name in row if self._prediction.fullmatch(name)]
        used = (asked, "responses", "preference", "annotator", "subset", "weight", *predictions)
        if kind == "prompt":
            return [make_prompt(messages, row, used, asked)]
        verdicts = self._verdicts(row)
        if asked == "prompt":
            responses = texts_of(field_of(row, "responses"), "responses")
        else:
            count = (1 + math.isqrt(1 + 8 * len(verdicts))) // 2  # the K with K (K - 1) / 2 pairs
            responses = [text_of(row, f"prediction {k}") for k in range(1, max(count, len(predictions)) + 1)]
        pairs = list(combinations(range(len(responses)), 2))
        if len(pairs) != len(verdicts):
            raise Malformed(f"`preference` has {len(verdicts)} entries for the {len(pairs)} pairs of responses")
        margins = [0] * len(responses)
        for (i, j), verdict in zip(pairs, verdicts, strict=True):
            margins[i] += self._sign[verdict]
            margins[j] -= self._sign[verdict]
        ranking = make_ranking(make_prompt(messages, row, used, asked), responses, places_of(margins), row)
        # If any ranking agrees with all verdicts, ties too, then that by wins minus losses does.
        if any(_sign(margins[i] - margins[j]) != self._sign[v] for (i, j), v in zip(pairs, verdicts, strict=True)):
            raise Contradiction(ranking)
        return [ranking]

    def _verdicts(self, row: Any) -> list[int]:
        value = field_of(row, "preference")
        if not isinstance(value, list) or not value:
            raise Malformed(f"field `preference` must be a list of verdicts, not {shown(value)}")
        for n, verdict in enumerate(value):
            if type(verdict) is not int or verdict not in self._sign:
                found = "NaN" if verdict != verdict else shown(verdict)
                raise Malformed(f"preference[{n}] must be 1 (the first), 2 (the second) or 0 (a tie), not {found}")
        return value


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
