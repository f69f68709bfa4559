"""Each format: the documented rows, the fields that make a row malformed, and the dirt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf.data.formats import FORMATS, ChatMessages, HHText, KRanking, PlainPrompt, Preference
from rlhf.data.rows import Dirty, Malformed, merge_copies
from rlhf.types import Demonstration, Prompt, Ranking

BY_NAME = {f.name: f for f in FORMATS}
OF_KIND = {"demonstration": Demonstration, "ranking": Ranking, "prompt": Prompt}
DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
SECTIONS = re.findall(r"### `(\w+)`: ([\w, ]+)\n.*?```json\n(.*?)```", DOCS, re.DOTALL)


def test_the_docs_name_every_format() -> None:
    assert [name for name, _, _ in SECTIONS] == [f.name for f in FORMATS]


@pytest.mark.parametrize(("name", "kinds", "block"), SECTIONS)
def test_documented_rows_are_read(name: str, kinds: str, block: str) -> None:
    format_ = BY_NAME[name]
    documented = {kind.strip().removesuffix("s") for kind in kinds.split(",")}
    assert documented == set(format_.kinds)
    for row in [*map(json.loads, block.splitlines()), format_.example]:
        for kind in format_.kinds:
            first = next(f for f in FORMATS if kind in f.kinds and f.matches(row))
            assert first.name == name
            parsed = format_.parse(row, kind)
            assert parsed and {type(part) for part in parsed} == {OF_KIND[kind]}
            assert len(parsed) == 1 or name == "raters"


def test_messages_split_before_the_last_reply() -> None:
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    (row,) = ChatMessages().parse({"messages": turns, "id": 7, "group": "luna"}, "demonstration")
    assert row == Demonstration(prompt=Prompt(messages=turns[:3], id="7", tags={"group": "luna"}), response="d")


def test_hh_transcript_becomes_messages() -> None:
    head = "\n\nHuman: a\n\nAssistant: b\n\nb2\n\nHuman: c\n\nHuman: c2\n\nAssistant:"
    (row,) = HHText().parse({"chosen": head + " d", "rejected": head + " e"}, "ranking")
    assert isinstance(row, Ranking)
    assert row.prompt.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n\nb2"},
        {"role": "user", "content": "c\n\nc2"},
    ]
    assert (row.responses, row.ranks) == (["d", "e"], [1, 2])


H = "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize(
    ("format_", "row", "kind"),
    [
        (HHText(), {"chosen": H + " b", "rejected": "\n\nHuman: x\n\nAssistant: c"}, "prompt mismatch"),
        (HHText(), {"chosen": H + " b" + H[10:] + " c", "rejected": H + " b"}, "prompt mismatch"),
        (HHText(), {"chosen": H + " x" + H + " b", "rejected": H + " y" + H + " c"}, "prompt mismatch"),
        (HHText(), {"chosen": H + " b", "rejected": H}, "empty reply"),
        (HHText(), {"chosen": H + " b", "rejected": H + " b "}, "identical responses"),
        (HHText(), {"chosen": H + " x\n\nAssistant: b", "rejected": H + " x\n\nAssistant: c"}, "reply to no question"),
        (Preference(), {"prompt": "a", "chosen": "b", "rejected": "b"}, "identical responses"),
        (KRanking(), {"prompt": "a", "responses": ["b", " "], "ranks": [1, 2]}, "empty reply"),
        (KRanking(), {"prompt": "a", "responses": ["b", "c"], "ranks": [1, None]}, "no label"),
        (KRanking(), {"prompt": "a", "responses": ["b", "b "], "ranks": [1, 1]}, "identical responses"),
        (KRanking(), {"prompt": " ", "responses": ["b", "c"], "ranks": [1, 2]}, "empty prompt"),
    ],
)
def test_dirt_has_one_kind(format_: HHText, row: dict[str, object], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        format_.parse(row, "ranking")


GOOD = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 2, 3]}, "`ranks` has 3 entries for 2 responses"),
        ({"ranks": [1, float("nan")]}, r"ranks\[1\] must be a whole number from 1 \(best\), or null, not NaN"),
        ({"ranks": [True, 2]}, r"ranks\[0\] must be a whole number .* not bool True"),
        ({"ranks": [1, 2.5]}, r"ranks\[1\] must be a whole number .* not float 2.5"),
        ({"ranks": [0, 1]}, r"ranks\[0\] must be a whole number from 1"),
        ({"ranks": None}, "field `ranks` is missing"),
        ({"ranks": "12"}, "field `ranks` must be a list"),
        ({"responses": ["b"]}, "field `responses` needs at least 2 entries, not 1"),
        ({"responses": ["b", 3]}, r"responses\[1\] must be text, not int 3"),
        ({"prompt": 3}, "field `prompt` must be text or a list of messages, not int 3"),
        ({"prompt": [{"role": "human", "content": "a"}]}, r"prompt\[0\].role must be one of system, user, assistant"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "must end with a user message"),
    ],
)
def test_malformed_rankings_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        KRanking().parse(GOOD | change, "ranking")


def test_all_tied_and_null_ranks_are_kept() -> None:
    (row,) = KRanking().parse(GOOD | {"ranks": [1, 1]}, "ranking")
    assert isinstance(row, Ranking) and row.ranks == [1, 1]


def test_copies_of_a_text() -> None:
    assert merge_copies(["b", "c", "b"], [1, 2, 1]) == (["b", "c"], [1, 2])
    # a contradiction takes all copies out, and c and d are still two
    assert merge_copies(["b", "c", "b", "d"], [1, 2, 3, 4]) == (["c", "d"], [2, 4])
    with pytest.raises(Dirty, match="identical"):
        merge_copies(["b", "c", "b"], [1, 2, 3])


def test_reward_bench_pairs() -> None:
    row = {
        "prompt": "a", "chosen": "b", "chosen_model": "m1", "rejected": "c", "rejected_model": "m2",
        "subset": "s", "id": 7,
    }  # fmt: skip
    assert next(f for f in FORMATS if "ranking" in f.kinds and f.matches(row)).name == "preference"
    tags = {"chosen_model": "m1", "rejected_model": "m2"}
    prompt = Prompt(messages=[{"role": "user", "content": "a"}], id="7", tags=tags)
    expected = Ranking(prompt=prompt, responses=["b", "c"], ranks=[1, 2], subset="s")
    assert Preference().parse(row, "ranking") == [expected]


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": True}, "field `subset` must be text or a whole number, not bool True"),
        ({"subset": ["s"]}, "field `subset` must be text or a whole number, not list"),
        ({"annotator": {"id": 1}}, "field `annotator` must be text or a whole number, not dict"),
        ({"annotator": float("nan")}, "field `annotator` must be text or a whole number, not float nan"),
        ({"rejected": 3}, "field `rejected` must be text or a list of messages, not int 3"),
        ({"rejected": None}, "field `rejected` is missing"),
    ],
)
def test_malformed_pairs_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        Preference().parse(PAIR | change, "ranking")


def test_weights_scores_and_margins_are_read() -> None:
    (row,) = KRanking().parse(
        {"prompt": "a", "responses": list("bcd"), "ranks": [3, None, 1], "scores": [2, None, 4.5], "weight": 2},
        "ranking",
    )
    assert isinstance(row, Ranking)
    assert (row.scores, row.weight, row.prompt.tags) == ([2.0, None, 4.5], 2.0, {})
    (pair,) = Preference().parse(PAIR | {"margin": 1.5, "weight": 0.5}, "ranking")
    assert isinstance(pair, Ranking)
    assert (pair.scores, pair.weight, pair.prompt.tags) == ([1.5, 0.0], 0.5, {})
    assert KRanking().parse(GOOD, "ranking")[0].scores is None  # type: ignore[union-attr]


def test_scores_follow_merged_copies() -> None:
    row = {"prompt": "a", "responses": ["b", "c", "b"], "ranks": [1, 2, 1], "scores": [4, 3, 4]}
    (found,) = KRanking().parse(row, "ranking")
    assert isinstance(found, Ranking) and (found.responses, found.scores) == (["b", "c"], [4.0, 3.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": True}, "field `weight` must be a finite number above 0, not bool True"),
        ({"weight": 0}, "field `weight` must be a finite number above 0, not int 0"),
        ({"weight": float("nan")}, "field `weight` must be a finite number above 0, not float nan"),
        ({"weight": float("inf")}, "field `weight` must be a finite number above 0, not float inf"),
        ({"weight": "2"}, "field `weight` must be a finite number above 0, not str '2'"),
        ({"scores": 3}, "field `scores` must be a list of numbers, not int 3"),
        ({"scores": [1, True]}, r"scores\[1\] must be a finite number or null, not bool True"),
        ({"scores": [1, float("nan")]}, r"scores\[1\] must be a finite number or null, not float nan"),
        ({"scores": [3, 2, 1]}, "`scores` has 3 entries for 2 responses"),
        ({"scores": [1, 2]}, "`scores` order the responses otherwise than `ranks`"),
        ({"scores": [2, 2]}, "`scores` order the responses otherwise than `ranks`"),
        ({"scores": [2, None]}, "`scores` order the responses otherwise than `ranks`"),
    ],
)
def test_malformed_weights_and_scores_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        KRanking().parse(GOOD | change, "ranking")


@pytest.mark.parametrize("margin", [True, -1.0, float("nan"), float("inf"), "1"])
def test_a_margin_is_not_negative(margin: object) -> None:
    with pytest.raises(Malformed, match="field `margin` must be a finite number and not negative, not "):
        Preference().parse(PAIR | {"margin": margin}, "ranking")


def test_bare_prompts_and_tags() -> None:
    assert PlainPrompt().parse("a", "prompt") == [Prompt(messages=[{"role": "user", "content": "a"}])]
    (row,) = PlainPrompt().parse({"prompt": "a", "safe": True, "note": None}, "prompt")
    assert isinstance(row, Prompt) and row.tags == {"safe": True}
