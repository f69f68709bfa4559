"""The forms of published data sets: hand-made rows with their rankings, malformed and dirty rows, the real files."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import Config, DataConfig, Intransitive, SourceConfig
from rlhf.data import load_demonstrations, load_prompts, load_rankings
from rlhf.data.published import Comparisons, ShareGPT
from rlhf.data.rows import Dirty, Malformed
from rlhf.errors import DataError
from rlhf.manifest import stage_inputs
from rlhf.types import Demonstration, Prompt, Ranking

QA_FEEDBACK = Path(__file__).parents[2] / "shared" / "data" / "qa-feedback-kwise" / "feedback.json"


def prompt(text: str = "q", **kwargs: Any) -> Prompt:
    return Prompt(messages=[{"role": "user", "content": text}], **kwargs)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rankings_of(path: Path, **options: Any) -> DataConfig:
    return DataConfig(rankings=SourceConfig(path=str(path)), **options)


def talk(*turns: str, **fields: Any) -> dict[str, Any]:
    """A ShareGPT row from turns such as "human: Hello"."""
    said = [turn.partition(": ") for turn in turns]
    return {"conversations": [{"from": speaker, "value": text} for speaker, _, text in said], **fields}


def test_sharegpt_becomes_messages() -> None:
    row = talk("system: s", "human: a", "gpt: b", "user: c", "assistant: d", id="x1", lang="en")
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    expected = Prompt(messages=[{"role": r, "content": c} for r, c in turns], id="x1", tags={"lang": "en"})
    assert ShareGPT().parse(row, "demonstration") == [Demonstration(prompt=expected, response="d")]
    assert ShareGPT().parse(row, "prompt") == [expected]
    (beside,) = ShareGPT().parse(talk("human: a", "gpt: b", system="s"), "prompt")
    assert isinstance(beside, Prompt) and beside.tags == {}
    assert beside.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "hi"}, "field `conversations` must be a list of turns, not str 'hi'"),
        ({"conversations": ["hi"]}, r"conversations\[0\] must have `from` and `value`, not str 'hi'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] must have `from` and `value`"),
        (talk("human: a", "tool: b"), r"conversations\[1\].from must be one of system, human, .* not str 'tool'"),
        ({"conversations": [{"from": True, "value": "a"}]}, r"conversations\[0\].from must be .* not bool True"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value must be text, not NoneType"),
        (talk("human: a", "gpt: b", system=3), "field `system` must be text, not int 3"),
        ({}, "field `conversations` is missing"),
    ],
)
def test_malformed_conversations_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        ShareGPT().parse(row, "demonstration")


def test_dirty_conversations_are_counted(tmp_path: Path) -> None:
    rows = [talk(f"human: question {i}", "gpt: yes") for i in range(60)]
    rows[2] = talk()
    rows[4] = talk("human: a", "gpt: b", "human: c")
    rows[6] = talk("human: a", "gpt: ")
    rows[8] = talk("gpt: continued")
    rows[9] = talk("human: a", "gpt: b", "gpt: c")
    path = jsonl(tmp_path / "s.jsonl", rows)
    data = DataConfig(demonstrations=SourceConfig(path=str(path)))
    report = load_demonstrations(data, 0).report.to_json()["files"][0]
    assert report["format"] == "sharegpt" and report["kept"] == 55
    assert report["samples"] == {
        "empty prompt": [f"{path}:3"], "empty reply": [f"{path}:5", f"{path}:7"],
        "reply to no question": [f"{path}:9", f"{path}:10"],
    }  # fmt: skip
    assert load_prompts(data, 0).report.dropped == {"empty prompt": 1, "reply to no question": 2}


def compared(preference: list[Any], *texts: str, **fields: Any) -> dict[str, Any]:
    texts = texts or ("a", "b", "c", "d")
    predictions = {f"prediction {i}": text for i, text in enumerate(texts, 1)}
    return {"question": "q", **predictions, "preference": preference, **fields}


@pytest.mark.parametrize(
    ("preference", "ranks"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 2, 3, 4]),
        ([2, 2, 2, 2, 2, 2], [4, 3, 2, 1]),
        # 3 > 1 > 2 > 4: with 1 against 4 and 2 against 3 in the other order this would be no ranking
        ([1, 2, 1, 2, 1, 1], [2, 3, 1, 4]),
        ([0, 1, 1, 1, 1, 0], [1, 1, 2, 2]),
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_comparisons_become_ranks(preference: list[int], ranks: list[int]) -> None:
    row = compared(preference, annotator=7, gold="g")
    expected = Ranking(prompt=prompt(tags={"gold": "g"}), responses=list("abcd"), ranks=[*ranks], annotator="7")
    assert Comparisons().parse(row, "ranking") == [expected]
    ours = {"prompt": "q", "responses": list("abcd"), "preference": preference, "annotator": 7, "gold": "g"}
    assert Comparisons().parse(ours, "ranking") == [expected]
    assert Comparisons().parse(row, "prompt") == [expected.prompt]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (compared([1, 1, 1, 1, 1]), "`preference` has 5 entries for the 6 pairs of responses"),
        (compared([1, 1, 1]), "`preference` has 3 entries for the 6 pairs of responses"),
        (compared([1] * 10), "field `prediction 5` is missing"),
        (compared([1] * 6, **{"prediction 3": None}), "field `prediction 3` is missing"),
        (compared([1] * 6, **{"prediction 3": 4}), "field `prediction 3` must be text, not int 4"),
        (compared([1, 1, 1, 1, 1, True]), r"preference\[5\] must be 1 .* or 0 \(a tie\), not bool True"),
        (compared([1, False, 1, 1, 1, 1]), r"preference\[1\] must be 1 .* not bool False"),
        (compared([1, 1, 1, 1, 1, 3]), r"preference\[5\] must be 1 .* not int 3"),
        (compared([1, 1, 1, 1, 1, None]), r"preference\[5\] must be 1 .* not NoneType None"),
        (compared([1, 1, 1, 1, 1, float("nan")]), r"preference\[5\] must be 1 .* not NaN"),
        (compared([]), "field `preference` must be a list of verdicts"),
        (compared([1] * 6, annotator=True), "field `annotator` must be text or a whole number, not bool True"),
        (compared([1] * 6, annotator=["a"]), "field `annotator` must be text or a whole number, not list"),
        (compared([1] * 6, " ", "b", "c", "d", annotator=1.5), "field `annotator` must be text .* not float 1.5"),
        (compared([1] * 6, question=5), "field `question` must be text or a list of messages, not int 5"),
    ],
)
def test_malformed_comparisons_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        Comparisons().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (compared([1, 2, 1], "a", "b", "c"), "intransitive"),  # a > b > c > a
        (compared([1, 1, 1], "a", " ", "c"), "empty reply"),
        (compared([1], "a", "a "), "identical responses"),
        (compared([1, 1, 1], "a", "b", "c", question=" "), "empty prompt"),
    ],
)
def test_dirty_comparisons(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        Comparisons().parse(row, "ranking")


def test_intransitive_rows_are_dropped_or_kept_but_always_counted(tmp_path: Path) -> None:
    rows = [compared([1, 1, 1], "a", "b", "c", question=f"question {i}") for i in range(60)]
    rows[3]["preference"] = [1, 0, 1]  # a > b > c, a = c: a wins once, b wins and loses, c loses once
    rows[5]["preference"] = [1, 2, 1]  # a > b > c > a
    path = jsonl(tmp_path / "c.jsonl", rows)
    where = {"intransitive": [f"{path}:4", f"{path}:6"]}

    dropped = load_rankings(rankings_of(path), 0)
    (file,) = dropped.report.to_json()["files"]
    assert file["format"] == "comparisons" and file["samples"] == where
    assert (file["dropped"], file["intransitive"], file["kept"]) == ({"intransitive": 2}, 0, 58)

    kept = load_rankings(rankings_of(path, intransitive=Intransitive.keep), 0)
    (file,) = kept.report.to_json()["files"]
    assert file["samples"] == where and "2 intransitive kept" in kept.report.summary()
    assert (file["dropped"], file["intransitive"], file["kept"], file["tied"]) == ({}, 2, 60, 1)
    ranks = {ranking.prompt.where: ranking.ranks for ranking in kept.train + kept.heldout}
    assert (ranks[f"{path}:4"], ranks[f"{path}:6"], ranks[f"{path}:5"]) == ([1, 2, 3], [1, 1, 1], [1, 2, 3])


def test_what_happens_to_intransitive_rows_decides_the_reward_model_alone() -> None:
    drop, keep = Config(), Config(data=DataConfig(intransitive=Intransitive.keep))
    for stage, same in (("sft", True), ("rm", False), ("ppo", True)):
        inputs = [stage_inputs(cfg, stage, 1, {}, {}) for cfg in (drop, keep)]
        assert (inputs[0] == inputs[1]) is same


def test_a_malformed_comparison_names_file_line_and_field(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", [compared([1] * 6), compared([1, 1, 1, 1, 1, True])])
    with pytest.raises(DataError, match=r"c.jsonl:2: preference\[5\] must be"):
        load_rankings(rankings_of(path), 0)


def test_the_real_comparisons_agree_with_a_count_by_hand() -> None:
    if not QA_FEEDBACK.is_file():
        pytest.skip("no qa-feedback-kwise beside the checkout")
    # The verdicts of each of the 75 rankings of four, ties allowed: what is not among them is intransitive.
    orders = [ranks for ranks in product(range(1, 5), repeat=4) if set(ranks) == set(range(1, max(ranks) + 1))]
    verdicts = {tuple(0 if a == b else 1 if a < b else 2 for a, b in combinations(o, 2)): list(o) for o in orders}
    rows = json.loads(QA_FEEDBACK.read_text())
    expected = {
        row["question"]: ([row[f"prediction {k}"] for k in (1, 2, 3, 4)], verdicts[tuple(row["preference"])])
        for row in rows
        if tuple(row["preference"]) in verdicts
    }
    assert len(orders) == 75 and len(rows) == 300
    loaded = load_rankings(rankings_of(QA_FEEDBACK), 0)
    found = {r.prompt.messages[0]["content"]: (r.responses, r.ranks) for r in loaded.train + loaded.heldout}
    assert found == expected
    assert loaded.report.dropped == {"intransitive": 300 - len(expected)} == {"intransitive": 13}
    assert loaded.report.total("tied") == sum(len(set(ranks)) == 1 for _, ranks in expected.values()) == 4
    kept = load_rankings(rankings_of(QA_FEEDBACK, intransitive=Intransitive.keep), 0).report
    assert (kept.total("kept"), kept.total("intransitive"), kept.dropped) == (300, 13, Counter())


def test_errorless_answers_win_in_the_real_comparisons() -> None:
    """Which number stands for the better one: `feedback` names the errors of the first prediction, and where it names
    none, that prediction must not lose."""
    if not QA_FEEDBACK.is_file():
        pytest.skip("no qa-feedback-kwise beside the checkout")
    rows = [
        r for r in json.loads(QA_FEEDBACK.read_text()) if not r["feedback"]["errors"] + r["feedback"]["missing-info"]
    ]
    assert len(rows) == 3
    for row in rows:
        (ranking,) = Comparisons().parse(row, "ranking")
        assert isinstance(ranking, Ranking)
        assert ranking.ranks[0] == 1 and ranking.ranks.count(1) == 1
