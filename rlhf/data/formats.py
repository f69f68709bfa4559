"""The forms that rows come in, each a small class behind one protocol.

A format turns a row into prompts, demonstrations or rankings. It raises `Malformed` for a row that cannot be read and
`Dirty` for one that can be read but must not be trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from rlhf.data.published import Comparisons, ShareGPT
from rlhf.data.raters import LabelStudio, Raters
from rlhf.data.rows import (
    NO_QUESTION,
    Dirty,
    Kind,
    Malformed,
    NoQuestion,
    Parsed,
    Split,
    field_of,
    has,
    is_transcript,
    make_demonstration,
    make_pair,
    make_prompt,
    make_ranking,
    messages_of,
    ranks_of,
    scores_of,
    shown,
    split_transcript,
    text_of,
    texts_of,
)
from rlhf.data.scored import Nectar, UltraFeedback


class Format(Protocol):
    """What a further format must have. `example` is a correct row, shown in errors; `kinds` is what `parse` gives."""

    name: str
    kinds: ClassVar[tuple[Kind, ...]]
    example: ClassVar[Any]

    def matches(self, row: Any) -> bool:
        """True if a row of these fields is of this format."""

    def parse(self, row: Any, kind: Kind) -> Sequence[Parsed | Dirty]:
        """What the row holds; raises Malformed or Dirty. A Dirty in the list stands for a part of the row."""


class ChatMessages:
    """OpenAI-style conversations: the last assistant message is the response, what stands before it the prompt."""

    name = "messages"
    kinds: ClassVar[tuple[Kind, ...]] = ("demonstration", "prompt")
    example: ClassVar[Any] = {
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    }

    def matches(self, row: Any) -> bool:
        return has(row, "messages")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        value = field_of(row, "messages")
        if isinstance(value, str):
            raise Malformed(f"field `messages` must be a list of messages, not {shown(value)}")
        messages = messages_of(value, "messages")
        replied = messages[-1]["role"] == "assistant"
        if kind == "demonstration" and not replied:
            raise Malformed("field `messages` must end with an assistant message")
        prompt = make_prompt(messages[:-1] if replied else messages, row, ("messages",), "messages")
        return [prompt if kind == "prompt" else make_demonstration(prompt, messages[-1]["content"])]


class Alpaca:
    """instruction, input (may be absent), output: the prompt is instruction and input, with a blank line between."""

    name = "alpaca"
    kinds: ClassVar[tuple[Kind, ...]] = ("demonstration", "prompt")
    example: ClassVar[Any] = {"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"}

    def matches(self, row: Any) -> bool:
        return has(row, "instruction")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        text = text_of(row, "instruction")
        if has(row, "input") and text_of(row, "input").strip():
            text += "\n\n" + text_of(row, "input")
        prompt = make_prompt(messages_of(text, "instruction"), row, ("instruction", "input", "output"), "instruction")
        return [prompt if kind == "prompt" else make_demonstration(prompt, text_of(row, "output"))]


def parse_pair(row: Any, kind: Kind, split: Callable[[Any, str], Split]) -> Parsed:
    """What a row with `chosen` and `rejected` holds; the demonstration in it is the chosen conversation."""
    used = ("prompt", "chosen", "rejected", "annotator", "subset", "weight", "margin")
    chosen = split(row, "chosen")
    if kind == "ranking":
        return make_pair(chosen, split(row, "rejected"), row, used)
    prompt = make_prompt(chosen[0], row, used)
    return prompt if kind == "prompt" else make_demonstration(prompt, chosen[1])


class HHText:
    """Anthropic HH: two transcripts that differ in the last reply. A demonstration is the chosen one."""

    name = "hh"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "demonstration", "prompt")
    example: ClassVar[Any] = {
        "chosen": "\n\nHuman: Hello\n\nAssistant: Hi, how can I help?",
        "rejected": "\n\nHuman: Hello\n\nAssistant: What?",
    }

    def matches(self, row: Any) -> bool:
        return has(row, "chosen") and is_transcript(row["chosen"])

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        try:
            return [parse_pair(row, kind, self._split)]
        except NoQuestion:
            raise Dirty(NO_QUESTION) from None  # people spoke out of turn; no mistake of the file

    def _split(self, row: Any, name: str) -> Split:
        return split_transcript(text_of(row, name), name)


class Preference:
    """chosen and rejected as replies to `prompt`, or as message lists that begin with the prompt."""

    name = "preference"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "demonstration", "prompt")
    example: ClassVar[Any] = {"prompt": "Hello", "chosen": "Hi, how can I help?", "rejected": "What?"}

    def matches(self, row: Any) -> bool:
        return has(row, "chosen", "rejected") and (has(row, "prompt") or isinstance(row["chosen"], list))

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        return [parse_pair(row, kind, self._split)]

    def _split(self, row: Any, name: str) -> Split:
        value = field_of(row, name)
        if isinstance(value, str):
            return messages_of(field_of(row, "prompt"), "prompt"), value
        messages = messages_of(value, name)
        if messages[-1]["role"] != "assistant":
            raise Malformed(f"field `{name}` must end with an assistant message")
        return messages[:-1] or messages_of(field_of(row, "prompt"), "prompt"), messages[-1]["content"]


class KRanking:
    """Our own: K >= 2 responses and their ranks; 1 is best, equal numbers tie, null is unranked."""

    name = "ranking"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "prompt")
    example: ClassVar[Any] = {
        "prompt": "Hello", "responses": ["Hi, how can I help?", "Hello.", "What?"], "ranks": [1, 1, 2],
        "annotator": "anna", "subset": "greetings",
    }  # fmt: skip

    def matches(self, row: Any) -> bool:
        return has(row, "prompt", "responses")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        used = ("prompt", "responses", "ranks", "annotator", "subset", "weight", "scores")
        messages = messages_of(field_of(row, "prompt"), "prompt")
        if kind == "prompt":
            return [make_prompt(messages, row, used)]
        responses = texts_of(field_of(row, "responses"), "responses")
        ranks = ranks_of(field_of(row, "ranks"), "ranks")
        if len(ranks) != len(responses):
            raise Malformed(f"`ranks` has {len(ranks)} entries for {len(responses)} responses")
        prompt = make_prompt(messages, row, used)
        return [make_ranking(prompt, responses, ranks, row, scores_of(row, ranks))]


class PlainPrompt:
    """A prompt alone: a bare text, or `prompt` (text or messages); the row's further fields are its tags."""

    name = "prompt"
    kinds: ClassVar[tuple[Kind, ...]] = ("prompt",)
    example: ClassVar[Any] = {"prompt": "Hello", "group": "greetings"}

    def matches(self, row: Any) -> bool:
        return isinstance(row, str) or has(row, "prompt")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        value = row if isinstance(row, str) else field_of(row, "prompt")
        return [make_prompt(messages_of(value, "prompt"), row, ("prompt",))]


FORMATS: tuple[Format, ...] = (
    ChatMessages(),
    ShareGPT(),
    UltraFeedback(),
    Alpaca(),
    HHText(),
    Preference(),
    Nectar(),
    Comparisons(),
    Raters(),
    LabelStudio(),
    KRanking(),
    PlainPrompt(),
)  # the first that matches is taken, so the more specific ones stand first
