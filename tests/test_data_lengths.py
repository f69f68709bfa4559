"""Over-long rows, counted with a renderer whose tokens can be counted by eye."""

from __future__ import annotations

import pytest

from rlhf.config import DataConfig, Overlong
from rlhf.data import DataReport, FileReport, Loaded, fit_lengths, fit_prompts
from rlhf.errors import DataError
from rlhf.types import Demonstration, Prompt


class Letters:
    """A renderer of one token a character and two a message, that needs turns to alternate."""

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        turns = [m["role"] for m in messages if m["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        return [0] * sum(len(m["content"]) + 2 for m in messages)

    def full_ids(self, messages: list[dict[str, str]], response: str) -> tuple[list[int], int]:
        prompt = self.prompt_ids(messages)
        return prompt + [0] * (len(response) + 1), len(prompt)


def one_long(messages: list[dict[str, str]], response: str) -> Loaded[Demonstration]:
    rows = [
        Demonstration(prompt=Prompt(messages=m, where=f"f:{i}"), response=r)
        for i, (m, r) in enumerate([(messages, response), ([{"role": "user", "content": "a"}], "b")], 1)
    ]
    report = DataReport(key="data.demonstrations", files=[FileReport(file="f", format="x", digest="", rows=3, kept=3)])
    return Loaded(rows, rows[1:], report)


TALK = [
    {"role": "system", "content": "ssss"},
    {"role": "user", "content": "old old"},
    {"role": "assistant", "content": "mm"},
    {"role": "user", "content": "abcdefgh"},
]  # 6 + 9 + 4 + 10 = 29 tokens


@pytest.mark.parametrize(
    ("limit", "response", "left"),
    [
        (34, "rrrr", TALK),  # 29 + 5: fits
        (33, "rrrr", [TALK[0], TALK[3]]),  # 21 after the oldest turns go
        (20, "rrrr", [TALK[0], {"role": "user", "content": "bcdefgh"}]),  # one character too many
        (13, "rrrr", [{"role": "user", "content": "cdefgh"}]),  # 6 + 2 + 5 leave nothing beside the system message
    ],
)
def test_the_old_end_of_a_prompt_goes(limit: int, response: str, left: list[dict[str, str]]) -> None:
    loaded = one_long(TALK, response)
    data = DataConfig(max_length=limit, max_prompt_length=5, on_overlong=Overlong.truncate_prompt)
    fit_lengths(loaded, Letters(), data, response_too=True)  # type: ignore[arg-type]  # has the two methods it calls
    assert loaded.train[0].prompt.messages == left
    assert loaded.train[0].response == response
    assert loaded.report.total("cut") == (left != TALK)


def test_too_long_a_response_is_dropped_and_counted() -> None:
    loaded = one_long(TALK, "r" * 40)
    data = DataConfig(max_length=34, max_prompt_length=5, on_overlong=Overlong.truncate_prompt)
    fit_lengths(loaded, Letters(), data, response_too=True)  # type: ignore[arg-type]  # has the two methods it calls
    assert (len(loaded.train), loaded.report.total("overlong"), loaded.report.total("kept")) == (1, 1, 2)
    assert loaded.report.files[0].samples == {"over-long": ["f:1"]}


def test_over_long_error_names_row_length_limit_and_ways_on() -> None:
    data = DataConfig(max_length=33, max_prompt_length=5)
    with pytest.raises(DataError, match=r"f:1: .* has 34 tokens, over data.max_length=33.*=drop.*=truncate_prompt"):
        fit_lengths(one_long(TALK, "rrrr"), Letters(), data, response_too=True)  # type: ignore[arg-type]  # as above
    with pytest.raises(DataError, match=r"f:1: the prompt has 29 tokens, over data.max_prompt_length=5"):
        fit_lengths(one_long(TALK, "rrrr"), Letters(), data, response_too=False)  # type: ignore[arg-type]  # as above


def test_gate_prompts_are_fitted_alike() -> None:
    prompts = [Prompt(messages=TALK, where="g:1"), Prompt(messages=TALK[3:], where="g:2")]
    data = DataConfig(max_length=40, max_prompt_length=12, on_overlong=Overlong.drop)
    assert fit_prompts(prompts, Letters(), data) == prompts[1:]  # type: ignore[arg-type]  # as above
