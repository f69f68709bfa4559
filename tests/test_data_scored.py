"""UltraFeedback scores and Nectar ranks: hand-made rows with their rankings, malformed and dirty rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig, SourceConfig
from rlhf.data import load_demonstrations, load_prompts, load_rankings
from rlhf.data.rows import Dirty, Malformed
from rlhf.data.scored import Nectar, UltraFeedback
from rlhf.errors import DataError
from rlhf.types import Prompt, Ranking


def asked(*turns: str, **tags: Any) -> Prompt:
    """A prompt whose turns the user and the assistant take in turn."""
    roles = ("user", "assistant")
    return Prompt(messages=[{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)], tags=tags)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def aspects(**ratings: Any) -> dict[str, Any]:
    return {"annotations": {name: {"Rating": rating, "Rationale": "r"} for name, rating in ratings.items()}}


def ultra(*scores: dict[str, Any], **fields: Any) -> dict[str, Any]:
    completions = [{"response": text} | score for text, score in zip("abcd", scores, strict=False)]
    return {"instruction": "q", "completions": completions} | fields


@pytest.mark.parametrize(
    ("given", "ranks", "scores"),
    [
        ([{"overall_score": 3}, {"overall_score": 8.5}, {"overall_score": 3.0}], [2, 1, 2], [3, 8.5, 3]),
        (
            [{"fine-grained_score": 4.5, "overall_score": 1}, {"fine-grained_score": 2, "overall_score": 9}],
            [1, 2],
            [4.5, 2],
        ),
        # sums 5, 9, 9, 4: both orders of 4 and 5 tie; the overall score does not count beside aspects
        (
            [aspects(x="3", y="2"), aspects(x=4, y="5"), aspects(x=5, y=4), aspects(x=1, y=3) | {"overall_score": 10}],
            [2, 1, 1, 3],
            [2.5, 4.5, 4.5, 2],
        ),
        # only x is rated for all: 2, 3; with y the means would be 3.5, 3
        ([aspects(x=2, y=5), aspects(x=3, y="N/A")], [2, 1], [2, 3]),
        # no rating at all leaves a completion unranked, and the others keep both aspects: 7, 6
        ([aspects(x=2, y=5), aspects(x=None, y="N/A"), aspects(x=3, y=3)], [1, None, 2], [3.5, None, 3]),
        (
            [{"annotations": {"x": 0.1, "y": 0.2, "z": 0.3}}, {"annotations": {"x": 0.3, "y": 0.2, "z": 0.1}}],
            [1, 1],
            [0.6 / 3] * 2,
        ),
    ],
)
def test_scores_become_ranks(given: list[dict[str, Any]], ranks: list[int | None], scores: list[float | None]) -> None:
    row = ultra(*given, source="flan", annotator="gpt")
    expected = Ranking(
        prompt=asked("q", source="flan"), responses=list("abcd")[: len(ranks)], ranks=ranks, annotator="gpt",
        scores=scores,
    )  # fmt: skip
    assert UltraFeedback().parse(row, "ranking") == [expected]
    assert UltraFeedback().parse(row, "prompt") == [expected.prompt]


FIVE = {"overall_score": 5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ultra(FIVE, {"overall_score": True}), r"completions\[1\].overall_score must be a number, not bool True"),
        (ultra(FIVE, {"overall_score": float("nan")}), r"completions\[1\].overall_score must be a number, not NaN"),
        (ultra(FIVE, {"overall_score": float("inf")}), r"completions\[1\].overall_score must be .* not float inf"),
        (ultra(FIVE, {"overall_score": "good"}), r"completions\[1\].overall_score must be a number, not str 'good'"),
        (ultra(FIVE, {}), r"completions\[1\].overall_score is missing"),
        (ultra(aspects(x=1), FIVE), r"completions\[1\].annotations is missing"),
        (ultra({}, {}), r"completions\[0\] has no score"),
        (ultra(aspects(x=1), aspects(x=False)), r"completions\[1\].annotations.x.Rating must be .* not bool False"),
        (ultra(aspects(x=1), {"annotations": [1]}), r"completions\[1\].annotations must be an object of aspects"),
        (ultra(aspects(x=1), {"annotations": {"x": {}}}), r"completions\[1\].annotations.x.Rating is missing"),
        (ultra(FIVE, FIVE | {"response": None}), r"completions\[1\].response is missing"),
        (ultra(FIVE, FIVE | {"response": 3}), r"completions\[1\].response must be text, not int 3"),
        (ultra(FIVE, FIVE, completions="ab"), "field `completions` must be a list of objects, not str 'ab'"),
        (ultra(FIVE, FIVE, completions=["a", "b"]), r"completions\[0\] must be an object, not str 'a'"),
        (ultra(FIVE, FIVE, annotator=True), "field `annotator` must be text or a whole number, not bool True"),
        (ultra(FIVE, FIVE, instruction=3), "field `instruction` must be text, not int 3"),
    ],
)
def test_malformed_scores_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        UltraFeedback().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (ultra(FIVE), "no label"),
        (ultra(aspects(x=1), aspects(x="N/A")), "no label"),
        (ultra(aspects(x=1), aspects(y=1)), "no label"),  # no aspect in common
        (ultra(FIVE, FIVE | {"response": " "}), "empty reply"),
        (ultra(FIVE, FIVE | {"response": "a"}), "identical responses"),
        (ultra(FIVE, FIVE, instruction=" "), "empty prompt"),
    ],
)
def test_dirty_scores(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        UltraFeedback().parse(row, "ranking")


HUMAN = "\n\nHuman: q\n\nAssistant: "


def nectar(*ranks: Any, **fields: Any) -> dict[str, Any]:
    answers = [{"answer": text, "model": "m", "rank": rank} for text, rank in zip("abcd", ranks, strict=False)]
    return {"prompt": HUMAN, "answers": answers} | fields


@pytest.mark.parametrize(
    ("given", "ranks"),
    [([2, 1, 3], [2, 1, 3]), ([3.0, 1.0, 2.0], [3, 1, 2]), ([1, 1, None], [1, 1, None]), ([7, 2], [7, 2])],
)
def test_nectar_ranks(given: list[Any], ranks: list[int | None]) -> None:
    expected = Ranking(prompt=asked("q", turns=1), responses=list("abc")[: len(ranks)], ranks=ranks)
    assert Nectar().parse(nectar(*given, turns=1), "ranking") == [expected]
    assert Nectar().parse(nectar(*given, turns=1), "prompt") == [expected.prompt]


@pytest.mark.parametrize(
    ("value", "turns"),
    [
        ("q", ["q"]),
        ([{"role": "user", "content": "q"}], ["q"]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", ["a", "b", "c"]),
        ("\n\nHuman: a", ["a"]),
    ],
)
def test_nectar_prompts(value: Any, turns: list[str]) -> None:
    assert Nectar().parse(nectar(1, 2, prompt=value), "prompt") == [asked(*turns)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (nectar(1, True), r"answers\[1\].rank must be a whole number from 1 \(best\), or null, not bool True"),
        (nectar(1, 1.5), r"answers\[1\].rank must be .* not float 1.5"),
        (nectar(1, float("nan")), r"answers\[1\].rank must be .* not NaN"),
        (nectar(0, 1), r"answers\[0\].rank must be .* not int 0"),
        (nectar(1, "2"), r"answers\[1\].rank must be .* not str '2'"),
        (nectar(answers=[{"answer": "a", "rank": 1}, {"answer": "b"}]), r"answers\[1\].rank is missing"),
        (nectar(answers=[{"answer": "a", "rank": 1}, {"rank": 2}]), r"answers\[1\].answer is missing"),
        (nectar(answers=[{"answer": "a", "rank": 1}, {"answer": 4, "rank": 2}]), r"answers\[1\].answer must be text"),
        (nectar(answers={"answer": "a"}), "field `answers` must be a list of objects"),
        (nectar(1, 2, prompt=3), "field `prompt` must be text or a list of messages, not int 3"),
        (nectar(1, 2, annotator=[1]), "field `annotator` must be text or a whole number, not list"),
    ],
)
def test_malformed_answers_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        Nectar().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (nectar(1), "no label"),
        (nectar(1, None), "no label"),
        (nectar(answers=[{"answer": "", "rank": 1}, {"answer": "b", "rank": 2}]), "empty reply"),
        (nectar(answers=[{"answer": "b", "rank": 1}, {"answer": "b ", "rank": 2}]), "identical responses"),
        (nectar(1, 2, prompt=HUMAN + "said already"), "reply to no question"),
        (nectar(1, 2, prompt="\n\nHuman: \n\nAssistant: "), "empty prompt"),
    ],
)
def test_dirty_answers(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        Nectar().parse(row, "ranking")


def test_they_are_recognised_and_counted_by_row(tmp_path: Path) -> None:
    scored = [ultra({"overall_score": 1}, FIVE, instruction=f"question {i}") for i in range(60)]
    scored[3]["completions"][0]["response"] = ""
    ranked = [nectar(2, 1, prompt=HUMAN.replace("q", f"question {i}")) for i in range(60)]
    ranked[5]["answers"][1]["answer"] = "a"
    for name, rows, where in (
        ("ultrafeedback", scored, {"empty reply": ":4"}), ("nectar", ranked, {"identical responses": ":6"})
    ):  # fmt: skip
        path = jsonl(tmp_path / f"{name}.jsonl", rows)
        data = DataConfig(rankings=SourceConfig(path=str(path)))
        loaded = load_rankings(data, 0)
        (file,) = loaded.report.to_json()["files"]
        assert (file["format"], file["kept"]) == (name, 59)
        assert file["samples"] == {kind: [f"{path}{line}"] for kind, line in where.items()}
        assert {tuple(r.ranks) for r in loaded.train + loaded.heldout} == {(2, 1)}
        prompts = load_prompts(data, 0).report
        assert (prompts.total("kept"), prompts.files[0].format) == (60, name)


def test_a_malformed_row_names_file_line_and_field(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "n.jsonl", [nectar(1, 2), nectar(1, True)])
    with pytest.raises(DataError, match=r"n.jsonl:2: answers\[1\].rank must be"):
        load_rankings(DataConfig(rankings=SourceConfig(path=str(path))), 0)
    path = jsonl(tmp_path / "u.jsonl", [ultra(FIVE, FIVE)])
    with pytest.raises(DataError, match=r"u.jsonl:1: field `output` is missing"):  # no demonstrations in it
        load_demonstrations(DataConfig(demonstrations=SourceConfig(path=str(path))), 0)
