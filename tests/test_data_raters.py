"""Rows with several raters: hand-made rows with their rankings, malformed and dirty rows, the counts of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig, SourceConfig
from rlhf.data import check_dirty, load_prompts, load_rankings
from rlhf.data.raters import LabelStudio, Raters
from rlhf.data.rows import Dirty, Malformed
from rlhf.errors import DataError
from rlhf.types import Prompt, Ranking


def asked(text: str = "q", **kwargs: Any) -> Prompt:
    return Prompt(messages=[{"role": "user", "content": text}], **kwargs)


def raters(*rankings: Any, **fields: Any) -> dict[str, Any]:
    named = [{"annotator": name, "ranks": ranks} for name, ranks in zip(("anna", 7, "carl"), rankings, strict=False)]
    return {"prompt": "q", "responses": ["a", "b", "c"], "rankings": named, "subset": "s"} | fields


def test_each_rater_gives_a_ranking() -> None:
    row = raters([1, 2, 3], [2, 2, 1], [None, 1, 2], id=3, group="g")
    found = Raters().parse(row, "ranking")
    prompt = asked(id="3", tags={"group": "g"})
    expected = [("anna", [1, 2, 3]), ("7", [2, 2, 1]), ("carl", [None, 1, 2])]
    assert found == [
        Ranking(prompt=prompt, responses=["a", "b", "c"], ranks=[*ranks], annotator=name, subset="s")
        for name, ranks in expected
    ]
    prompts = [part.prompt for part in found if isinstance(part, Ranking)]
    assert prompts[0] is not prompts[1]  # lengths are cut in place
    assert Raters().parse(row, "prompt") == [prompt]


def test_each_rater_has_a_weight() -> None:
    row = raters([1, 2, 3], [2, 2, 1])
    row["rankings"][1]["weight"] = 0.5
    assert [part.weight for part in Raters().parse(row, "ranking") if isinstance(part, Ranking)] == [1.0, 0.5]
    row["rankings"][1]["weight"] = -1
    with pytest.raises(Malformed, match=r"field `rankings\[1\].weight` must be a finite number above 0, not int -1"):
        Raters().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (raters([1, 2, 3], [1, True, 2]), r"rankings\[1\].ranks\[1\] must be a whole number .* not bool True"),
        (raters([1, float("nan"), 3]), r"rankings\[0\].ranks\[1\] must be a whole number .* not NaN"),
        (raters([1, 2, 3], [1, 2]), r"`rankings\[1\].ranks` has 2 entries for 3 responses"),
        (raters([1, 2, 3], None), r"rankings\[1\].ranks is missing"),
        (raters(rankings=[{"ranks": [1, 2, 3]}]), r"rankings\[0\].annotator is missing"),
        (
            raters(rankings=[{"annotator": True, "ranks": [1, 2, 3]}]),
            r"rankings\[0\].annotator must be .* not bool True",
        ),
        (raters(rankings=[{"annotator": "a", "ranks": [1, 2, 3]}] * 2), r"rankings\[1\].annotator is 'a' again"),
        (raters(rankings={"anna": [1, 2, 3]}), "field `rankings` must be a list of objects, not dict"),
        (raters(rankings=[[1, 2, 3]]), r"rankings\[0\] must be an object, not list"),
        (raters([1, 2, 3], subset=True), "field `subset` must be text or a whole number, not bool True"),
        (raters([1, 2, 3], responses=["a"]), "field `responses` needs at least 2 entries"),
    ],
)
def test_malformed_raters_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        Raters().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (raters(), "no label"),
        (raters([1, None, None], [None, None, None]), "no label"),
        (raters([1, 2, 3], [3, 2, 1], responses=["a", " ", "c"]), "empty reply"),
        (raters([1, 2, 3], [3, 2, 1], responses=["a", "a", "a "]), "identical responses"),
        (raters([1, 2, 3], prompt=" "), "empty prompt"),
    ],
)
def test_a_row_without_any_ranking_is_dirty_once(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        Raters().parse(row, "ranking")


def written(path: Path, rows: list[Any]) -> DataConfig:
    path.write_text(json.dumps(rows, indent=1))
    return DataConfig(rankings=SourceConfig(path=str(path)))


def test_every_ranking_of_every_row_is_counted(tmp_path: Path) -> None:
    rows = [raters([1, 2, 3], [2, 2, 1], prompt=f"question {i}") for i in range(60)]
    rows[3] = raters([1, 2, 3], [None, 1, None], [1, 1, 1], prompt="question 3")  # three rankings, one of them dirt
    rows[5] = raters([1, None, None], [None, 2, None], prompt="question 5")  # none left: one dirty row
    data = written(tmp_path / "r.json", rows)
    loaded = load_rankings(data, 0)
    (file,) = loaded.report.to_json()["files"]
    # 58 rows of two rankings, one of three, one of none: 60 rows and 58 + 2 further rankings
    assert (file["format"], file["rows"], file["extra"], file["kept"]) == ("raters", 60, 60, 118)
    assert (file["dropped"], file["tied"], len(loaded.train) + len(loaded.heldout)) == ({"no label": 2}, 1, 118)
    assert "118 of 120 rows (2 no label, 60 beyond the first of their row, 1 all tied)" in loaded.report.summary()
    with pytest.raises(DataError, match=r"2 of 120 rows are dirty \(1.67%\)"):
        check_dirty(loaded.report, data)
    assert load_prompts(data, 0).report.total("kept") == 60


def annotation(*ids: Any, by: Any = 1, **fields: Any) -> dict[str, Any]:
    result = {"id": "x", "type": "ranker", "from_name": "rank", "to_name": "l", "value": {"ranker": {"rank": [*ids]}}}
    return {"id": 9, "completed_by": by, "was_cancelled": False, "result": [result]} | fields


def task(*annotations: Any, items: Any = None, **data: Any) -> dict[str, Any]:
    items = items or [{"id": key, "title": "t", "body": text} for key, text in (("x", "a"), ("y", "b"), (3, "c"))]
    return {"id": 12, "data": {"prompt": "q", "items": items} | data, "annotations": [*annotations], "project": 4}


def test_label_studio_annotations_become_rankings() -> None:
    row = task(
        annotation(3, "x", "y"),
        annotation("x", "y", "3", by={"id": 5, "email": "e"}, was_cancelled=True),
        annotation("y", "x", by={"id": 6, "email": "e"}),
        annotation(by=None, result=[{"type": "choices"}, {"type": "ranker", "value": {"ranker": ["y", "3"]}}]),
        group="g",
        subset="s",
    )
    prompt = asked(id="12", tags={"group": "g"})
    # c first, a second, b third; then b before a, and c left out; then b before c
    expected = [("1", [2, 3, 1]), ("6", [2, 1, None]), (None, [None, 1, 2])]
    assert LabelStudio().parse(row, "ranking") == [
        Ranking(prompt=prompt, responses=["a", "b", "c"], ranks=[*ranks], annotator=name, subset="s")
        for name, ranks in expected
    ]
    assert LabelStudio().parse(row, "prompt") == [prompt]


TWICE = [{"id": "x", "body": "a"}, {"id": "x", "body": "b"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (task(annotation("x", "z")), r"annotations\[0\].result\[0\].value.ranker names the item 'z', which is not in"),
        (task(annotation("x", "x")), r"annotations\[0\].result\[0\].value.ranker names the item 'x' twice"),
        (task(annotation("x", True)), r"value.ranker: an id must be text or a whole number, not bool True"),
        (task(annotation("x", "y", by=True)), r"annotations\[0\].completed_by must be .* not bool True"),
        (task(annotation("x", "y", by={"id": 1.5})), r"annotations\[0\].completed_by.id must be .* not float 1.5"),
        (task(annotation("x", "y", was_cancelled="no")), r"annotations\[0\].was_cancelled must be true or false"),
        (task(annotation(result=None)), r"field `annotations\[0\].result` must be a list of objects"),
        (task(annotation(result=annotation("x")["result"] * 2)), r"annotations\[0\].result has 2 rankings, not one"),
        (task(annotation(result=[{"type": "ranker"}])), r"result\[0\].value.ranker must be a list of ids"),
        (
            task(annotation(result=[{"type": "ranker", "value": {"ranker": {"good": ["x"], "_": ["y"]}}}])),
            r"annotations\[0\].result\[0\].value.ranker has the buckets good, _: buckets have no order",
        ),
        (task("x"), r"annotations\[0\] must be an object, not str 'x'"),
        (task(items=[{"id": "x", "body": None}]), r"data.items\[0\].body must be text, not NoneType None"),
        (task(items=[{"id": "x", "body": "a"}, {"body": "b"}]), r"data.items\[1\].id is missing"),
        (task(items=TWICE), r"data.items\[1\].id is 'x' again"),
        (task(more=TWICE), "must have one list of items with `id` and `body`, but it has items, more"),
        (task(items=["a", "b"]), "must have one list of items with `id` and `body`, but it has none"),
        (task(prompt=None), r"data.prompt is missing"),
        (task(prompt=3), r"field `data.prompt` must be text or a list of messages, not int 3"),
        ({"data": "q", "annotations": []}, "field `data` must be an object, not str 'q'"),
    ],
)
def test_malformed_tasks_name_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        LabelStudio().parse(row, "ranking")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (task(), "no label"),
        (task(annotation("x", "y", was_cancelled=True)), "no label"),
        (task(annotation("x"), annotation(result=[])), "no label"),
        (task(annotation("x", "y"), items=[{"id": "x", "body": "a"}, {"id": "y", "body": ""}]), "empty reply"),
        (task(annotation("x", "y"), items=[{"id": "x", "body": "a"}, {"id": "y", "body": "a"}]), "identical responses"),
        (task(annotation("x", "y"), prompt=" "), "empty prompt"),
    ],
)
def test_dirty_tasks(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(Dirty, match=kind):
        LabelStudio().parse(row, "ranking")


def test_an_export_is_recognised_and_its_lines_named(tmp_path: Path) -> None:
    rows = [task(annotation("x", "y", 3), prompt=f"question {i}") for i in range(60)]
    rows[2] = task(prompt="question 2")
    loaded = load_rankings(written(tmp_path / "export.json", rows), 0)
    (file,) = loaded.report.to_json()["files"]
    assert (file["format"], file["kept"], file["dropped"]) == ("labelstudio", 59, {"no label": 1})
    data = written(tmp_path / "export.json", [task(annotation("x", "z"))])
    with pytest.raises(DataError, match=r"export.json:2: annotations\[0\].result\[0\].value.ranker names the item 'z'"):
        load_rankings(data, 0)
