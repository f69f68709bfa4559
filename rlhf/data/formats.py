"""The forms that rows come in, each a small class behind one protocol.

A format turns a row into prompts, demonstrations or rankings. It raises `Malformed` for a row that cannot be read and
`Dirty` for one that can be read but must not be trained on.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Protocol

from rlhf.data.files import Malformed
from rlhf.types import Demonstration, Messages, Prompt, Ranking

Kind = Literal["demonstration", "ranking", "prompt"]
Parsed = Demonstration | Ranking | Prompt

EMPTY_REPLY, EMPTY_PROMPT = "empty reply", "empty prompt"
IDENTICAL, MISMATCH, NO_LABEL = "identical responses", "prompt mismatch", "no label"
_ROLES = ("system", "user", "assistant")


class Dirty(Exception):
    """A row to drop and count; the message is the kind of dirt."""


class Format(Protocol):
    """What a further format must have. `example` is a correct row, shown in errors; `kinds` is what `parse` gives."""

    name: str
    kinds: ClassVar[tuple[Kind, ...]]
    example: ClassVar[Any]

    def matches(self, row: Any) -> bool:
        """True if a row of these fields is of this format."""

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        """What the row holds; raises Malformed or Dirty."""


def field_of(row: Any, name: str) -> Any:
    """The value of a field; a null counts as missing."""
    if not isinstance(row, dict):
        raise Malformed(f"must be an object with fields, not {_shown(row)}")
    if row.get(name) is None:
        raise Malformed(f"field `{name}` is missing")
    return row[name]


def text_of(row: Any, name: str) -> str:
    value = field_of(row, name)
    if not isinstance(value, str):
        raise Malformed(f"field `{name}` must be text, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def has(row: Any, *names: str) -> bool:
    return isinstance(row, dict) and all(row.get(name) is not None for name in names)


def messages_of(value: Any, name: str) -> Messages:
    """Text, which is one user message, or a list of messages, checked."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise Malformed(f"field `{name}` must be text or a list of messages, not {_shown(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise Malformed(f"{name}[{i}] must have `role` and `content`, not {_shown(message)}")
        if message["role"] not in _ROLES:
            raise Malformed(f"{name}[{i}].role must be one of {', '.join(_ROLES)}, not {_shown(message['role'])}")
        if not isinstance(message["content"], str):
            raise Malformed(f"{name}[{i}].content must be text, not {_shown(message['content'])}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def make_prompt(messages: Messages, row: Any, used: tuple[str, ...], name: str = "prompt") -> Prompt:
    """A prompt, with the row's further fields as tags. `used` are the fields that are not tags."""
    if not messages or messages[-1]["role"] != "user":
        raise Malformed(f"field `{name}`: the prompt must end with a user message")
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


def make_pair(chosen: tuple[Prompt, str], rejected: tuple[Prompt, str], row: Any) -> Ranking:
    """A ranking of two. Checked in this order, so that a row has one kind of dirt: mismatch, empty, identical."""
    (prompt, good), (other, bad) = chosen, rejected
    if prompt.messages != other.messages:
        raise Dirty(MISMATCH)
    if not good.strip() or not bad.strip():
        raise Dirty(EMPTY_REPLY)
    if good.strip() == bad.strip():
        raise Dirty(IDENTICAL)
    return Ranking(
        prompt=prompt, responses=[good, bad], ranks=[1, 2],
        annotator=_label(row, "annotator"), subset=_label(row, "subset"),
    )  # fmt: skip


def _label(row: Any, name: str) -> str | None:
    value = row.get(name)
    return None if value is None else str(value)


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
            raise Malformed(f"field `messages` must be a list of messages, not {_shown(value)}")
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


class HHText:
    """Anthropic HH: two transcripts that differ in the last reply. A demonstration is the chosen one."""

    name = "hh"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "demonstration", "prompt")
    example: ClassVar[Any] = {
        "chosen": "\n\nHuman: Hello\n\nAssistant: Hi, how can I help?",
        "rejected": "\n\nHuman: Hello\n\nAssistant: What?",
    }
    _turn = re.compile(r"(?:^|\n\n)(Human|Assistant):")

    def matches(self, row: Any) -> bool:
        return has(row, "chosen") and isinstance(row["chosen"], str) and row["chosen"].lstrip().startswith("Human:")

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        chosen = self._split(row, "chosen")
        if kind == "prompt":
            return [chosen[0]]
        if kind == "demonstration":
            return [make_demonstration(*chosen)]
        return [make_pair(chosen, self._split(row, "rejected"), row)]

    def _split(self, row: Any, name: str) -> tuple[Prompt, str]:
        """Prompt and last reply. Turns of one speaker that follow each other are one turn."""
        parts = self._turn.split(text_of(row, name).strip())
        if parts[0].strip() or len(parts) < 3:
            raise Malformed(f"field `{name}` must be a transcript that starts with 'Human:', not {_shown(row[name])}")
        messages: Messages = []
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
            role = "user" if speaker == "Human" else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n\n" + text.strip()
            else:
                messages.append({"role": role, "content": text.strip()})
        if messages[-1]["role"] == "user":
            raise Dirty(EMPTY_REPLY)
        return make_prompt(messages[:-1], row, ("chosen", "rejected", "annotator", "subset"), name), messages[-1][
            "content"
        ]


class Preference:
    """chosen and rejected as replies to `prompt`, or as message lists that begin with the prompt."""

    name = "preference"
    kinds: ClassVar[tuple[Kind, ...]] = ("ranking", "demonstration", "prompt")
    example: ClassVar[Any] = {"prompt": "Hello", "chosen": "Hi, how can I help?", "rejected": "What?"}

    def matches(self, row: Any) -> bool:
        return has(row, "chosen", "rejected") and (has(row, "prompt") or isinstance(row["chosen"], list))

    def parse(self, row: Any, kind: Kind) -> list[Parsed]:
        chosen = self._split(row, "chosen")
        if kind == "prompt":
            return [chosen[0]]
        if kind == "demonstration":
            return [make_demonstration(*chosen)]
        return [make_pair(chosen, self._split(row, "rejected"), row)]

    def _split(self, row: Any, name: str) -> tuple[Prompt, str]:
        value = field_of(row, name)
        used = ("prompt", "chosen", "rejected", "annotator", "subset")
        if isinstance(value, str):
            return make_prompt(messages_of(field_of(row, "prompt"), "prompt"), row, used), value
        messages = messages_of(value, name)
        if messages[-1]["role"] != "assistant":
            raise Malformed(f"field `{name}` must end with an assistant message")
        before = messages[:-1] or messages_of(field_of(row, "prompt"), "prompt")
        return make_prompt(before, row, used, name), messages[-1]["content"]


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
        used = ("prompt", "responses", "ranks", "annotator", "subset")
        messages = messages_of(field_of(row, "prompt"), "prompt")
        if kind == "prompt":
            return [make_prompt(messages, row, used)]
        responses, ranks = self._responses(row), self._ranks(row)
        if len(ranks) != len(responses):
            raise Malformed(f"`ranks` has {len(ranks)} entries for {len(responses)} responses")
        prompt = make_prompt(messages, row, used)
        if not all(response.strip() for response in responses):
            raise Dirty(EMPTY_REPLY)
        if sum(rank is not None for rank in ranks) < 2:
            raise Dirty(NO_LABEL)
        responses, ranks = merge_copies(responses, ranks)
        return [
            Ranking(
                prompt=prompt, responses=responses, ranks=ranks,
                annotator=_label(row, "annotator"), subset=_label(row, "subset"),
            )
        ]  # fmt: skip

    def _responses(self, row: Any) -> list[str]:
        value = field_of(row, "responses")
        if not isinstance(value, list):
            raise Malformed(f"field `responses` must be a list of texts, not {_shown(value)}")
        if len(value) < 2:
            raise Malformed(f"field `responses` needs at least 2 entries, not {len(value)}")
        for i, response in enumerate(value):
            if not isinstance(response, str):
                raise Malformed(f"responses[{i}] must be text, not {_shown(response)}")
        return value

    def _ranks(self, row: Any) -> list[int | None]:
        value = field_of(row, "ranks")
        if not isinstance(value, list):
            raise Malformed(f"field `ranks` must be a list of whole numbers, not {_shown(value)}")
        for i, rank in enumerate(value):
            if rank is not None and (type(rank) is not int or rank < 1):
                shown = "NaN" if rank != rank else _shown(rank)
                raise Malformed(f"ranks[{i}] must be a whole number from 1 (best), or null, not {shown}")
        return value


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


FORMATS: tuple[Format, ...] = (ChatMessages(), Alpaca(), HHText(), Preference(), KRanking(), PlainPrompt())
