"""Over-long rows, in tokens of the model that is trained: an error, a drop, or a prompt cut at its old end."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.config import DataConfig, Overlong
from rlhf.data.loading import Loaded, T, prompt_of
from rlhf.data.report import DataReport, FileReport
from rlhf.errors import DataError
from rlhf.render import Renderer
from rlhf.types import Demonstration, Messages, Prompt, Ranking

OVERLONG = "over-long"


def fit_lengths(loaded: Loaded[T], renderer: Renderer, data: DataConfig, response_too: bool) -> None:
    """Apply data.on_overlong to both sides, in place, and count in the report.

    response_too: limit prompt and response together to data.max_length; otherwise the prompt to
    data.max_prompt_length. Raises DataError for the first over-long row under `error`, for a row whose ids cannot be
    split into prompt and response, and when no row is left.
    """
    loaded.train = _fit(loaded.train, renderer, data, loaded.report, response_too)
    loaded.heldout = _fit(loaded.heldout, renderer, data, loaded.report, response_too)
    loaded.report.train, loaded.report.heldout = len(loaded.train), len(loaded.heldout)
    if not (loaded.train and loaded.heldout):
        limit = data.max_length if response_too else data.max_prompt_length
        raise DataError(f"{loaded.report.key}: no row is left on one side of the split within {limit} tokens")


def fit_prompts(prompts: list[Prompt], renderer: Renderer, data: DataConfig) -> list[Prompt]:
    """The same for prompts alone, for those of the gates."""
    names = dict.fromkeys(prompt.where.rpartition(":")[0] for prompt in prompts)
    files = [FileReport(file=name, format="prompt", digest="") for name in names]
    return _fit(prompts, renderer, data, DataReport(key="data.gate_prompts", files=files), response_too=False)


def _fit(rows: list[T], renderer: Renderer, data: DataConfig, report: DataReport, response_too: bool) -> list[T]:
    limit = data.max_length if response_too else data.max_prompt_length
    kept = []
    for row in rows:
        prompt = prompt_of(row)
        try:
            length = row_length(row, prompt.messages, renderer, response_too)
        except DataError as error:
            raise DataError(f"{report.key}: {prompt.where}: {error}") from error
        if length > limit:
            if data.on_overlong is Overlong.error:
                raise DataError(_message(report.key, prompt.where, length, limit, response_too))
            file = report.of(prompt.where)
            cut = None
            if data.on_overlong is Overlong.truncate_prompt:
                cut = cut_prompt(row, renderer, limit, response_too)
            file.note("cut" if cut else OVERLONG, prompt.where)
            if cut is None:
                file.kept, file.overlong = file.kept - 1, file.overlong + 1
                continue
            prompt.messages, file.cut = cut, file.cut + 1
        kept.append(row)
    return kept


def _message(key: str, where: str, length: int, limit: int, response_too: bool) -> str:
    name, what = ("data.max_length", "row") if response_too else ("data.max_prompt_length", "prompt")
    return (
        f"{key}: {where}: the {what} has {length} tokens, over {name}={limit}. Raise {name}, or drop such rows with "
        "data.on_overlong=drop, or cut the old end of their prompts with data.on_overlong=truncate_prompt "
        "(now data.on_overlong=error)."
    )


def row_length(
    row: Demonstration | Ranking | Prompt, messages: Messages, renderer: Renderer, response_too: bool
) -> int:
    """Tokens of the row under the prompt `messages`: with its longest response, or of the prompt alone."""
    if isinstance(row, Prompt) or not response_too:
        return len(renderer.prompt_ids(messages))
    responses = [row.response] if isinstance(row, Demonstration) else row.responses
    return max(len(renderer.full_ids(messages, response)[0]) for response in responses)


def cut_prompt(
    row: Demonstration | Ranking | Prompt, renderer: Renderer, limit: int, response_too: bool
) -> Messages | None:
    """The longest recent part of the prompt with which the row fits, or None if the response alone does not.

    Whole oldest turns go first, then the head of the last user message, so that what is left is a valid conversation
    for the chat template: an optional system message, then user and assistant in turn. Ids are never cut.
    """

    def fits(messages: Messages) -> bool:
        return row_length(row, messages, renderer, response_too) <= limit

    messages = prompt_of(row).messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
    for start in starts:
        if fits(system + turns[start:]):
            return system + turns[start:]
    text = turns[-1]["content"]
    for kept in (system, []):  # the system message goes only if not even a word of the user fits beside it
        tail = _longest_tail(text, lambda tail, kept=kept: fits([*kept, {"role": "user", "content": tail}]))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        if tail:
            return [*kept, {"role": "user", "content": tail}]
    return None


def _longest_tail(text: str, fits: Callable[[str], bool]) -> str:
    """The longest end of `text` that fits, found by bisection: a longer end never has fewer tokens, give or take one
    merge, and only an end that was seen to fit is returned. Empty if none fits."""
    low, high = 0, len(text)  # an end of `low` characters fits, one of `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[-middle:]) else (low, middle)
    return text[-low:].strip() if low else ""
