"""Files to rows: every malformed input one message, every dirty row counted, the split, the lengths, real data."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import DataConfig, SourceConfig
from rlhf.data import (
    Loaded,
    check_dirty,
    is_heldout,
    load_demonstrations,
    load_gate_prompts,
    load_prompts,
    load_rankings,
    load_texts,
)
from rlhf.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(**sources: Any) -> DataConfig:
    named = {k: SourceConfig(path=str(v)) if isinstance(v, Path) else v for k, v in sources.items()}
    return DataConfig(**named)


def ranking(i: int, **change: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "responses": ["yes", "no"], "ranks": [1, 2]} | change


def prompts(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}"} for i in range(n)]


GOOD = json.dumps(ranking(0)).encode()
MALFORMED = {
    "empty file": (b"", "is empty"),
    "blank lines only": (b"\n\n", "is empty"),
    "broken JSON": (GOOD + b'\n{"prompt": \n', r"r.jsonl:2: broken JSON"),
    "not UTF-8": (GOOD + b"\n" + GOOD + b'\n{"prompt": "\xe9"}\n', r"r.jsonl:3: byte 0xe9 is not UTF-8"),
    "missing field": (GOOD + b'\n{"prompt": "a", "ranks": [1, 2]}', r"r.jsonl:2: field `responses` is missing"),
    "missing in the first row": (b'{"prompt": "a", "ranks": [1, 2]}', r"r.jsonl:1: field `responses` is missing"),
    "wrong length": (json.dumps(ranking(0, ranks=[1])).encode(), "`ranks` has 1 entries for 2 responses"),
    "NaN rank": (b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1, NaN]}', r"ranks\[1\] .* not NaN"),
    "a boolean rank": (
        GOOD + b'\n{"prompt": "a", "responses": ["b", "c"], "ranks": [1, true]}',
        r"r.jsonl:2: ranks\[1\] must be a whole number .* not bool True",
    ),
    "a boolean annotator": (
        GOOD + b'\n{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "annotator": false}',
        r"r.jsonl:2: field `annotator` must be text or a whole number, not bool False",
    ),
    "no known format": (b'{"x": 1}', "r.jsonl:1: is no ranking in any known format: it has the fields x"),
    "a number": (b"3", "is no ranking in any known format: it has no fields"),
}


@pytest.mark.parametrize(("raw", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_file_is_one_message(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        load_rankings(config(rankings=tmp_path / "r.jsonl"), 0)
    assert str(caught.value).startswith("data.rankings: ")
    assert (
        "empty" in message or "UTF-8" in message or '"ranks": [1, 1, 2]' in str(caught.value)
    )  # a correct row is shown


def test_five_problems_are_named_in_one_message(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", [ranking(0)] + [ranking(i, ranks=[1]) for i in range(7)])
    with pytest.raises(DataError) as caught:
        load_rankings(config(rankings=path), 0)
    lines = [int(n) for n in re.findall(r"r\.jsonl:(\d+):", str(caught.value))]
    assert lines == [2, 3, 4, 5, 6]
    assert "7 rows are malformed" in str(caught.value) and "and 2 more" in str(caught.value)


def test_missing_things_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.rankings.path=.*none.jsonl: no such file"):
        load_rankings(config(rankings=tmp_path / "none.jsonl"), 0)
    with pytest.raises(DataError, match="no such file, folder or glob match"):
        load_rankings(config(rankings=tmp_path / "*.jsonl"), 0)
    with pytest.raises(ConfigError, match=r"data.demonstrations.path: is not set"):
        load_demonstrations(config(rankings=tmp_path), 0)
    path = jsonl(tmp_path / "r.jsonl", [ranking(0)])
    with pytest.raises(ConfigError, match=r"data.rankings.format=alpaca: no such format .* there are: auto, .*hh, "):
        load_rankings(config(rankings=SourceConfig(path=str(path), format="alpaca")), 0)


def test_hub_without_network_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the hub cannot be reached\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"path=owner/name: neither .* \(split=train\): the hub cannot be reached$"):
        load_rankings(config(rankings=SourceConfig(path="owner/name")), 0)


def test_each_dirty_row_is_counted_once(tmp_path: Path) -> None:
    pair = "\n\nHuman: question {}\n\nAssistant: {}"
    rows = [{"chosen": pair.format(i, "yes"), "rejected": pair.format(i, "no")} for i in range(60)]
    rows[3]["rejected"] = pair.format(99, "no")
    rows[5]["rejected"] = pair.format(5, "")
    rows[7]["rejected"] = rows[7]["chosen"]
    path = jsonl(tmp_path / "hh.jsonl", rows)
    data = config(rankings=path)
    loaded = load_rankings(data, 0)
    (file,) = loaded.report.to_json()["files"]
    assert file["dropped"] == {"prompt mismatch": 1, "empty reply": 1, "identical responses": 1}
    assert file["samples"] == {
        "prompt mismatch": [f"{path}:4"], "empty reply": [f"{path}:6"], "identical responses": [f"{path}:8"],
    }  # fmt: skip
    assert (file["rows"], file["kept"], len(loaded.train) + len(loaded.heldout)) == (60, 57, 57)
    with pytest.raises(DataError, match=r"3 of 60 rows are dirty \(5.00%\).*data.max_dirty=0.01") as caught:
        check_dirty(loaded.report, data)
    assert "data.max_dirty=0.05" in str(caught.value)
    data.max_dirty = 0.05
    check_dirty(loaded.report, data)


def test_all_tied_rankings_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [ranking(i, ranks=[1, 1] if i < 4 else [2, 1]) for i in range(60)]
    loaded = load_rankings(config(rankings=jsonl(tmp_path / "r.jsonl", rows)), 0)
    assert (loaded.report.total("tied"), loaded.report.total("kept")) == (4, 60)


def test_rankings_that_come_again_are_kept_counted_and_named(tmp_path: Path) -> None:
    """The same responses to the same prompt: once more as it is, the other way round, in the other order, with another
    annotator (who is no repetition), and with other responses."""
    rows = [ranking(i) for i in range(60)]
    rows[10] = ranking(3)
    rows[20] = ranking(3, ranks=[2, 1])
    rows[30] = ranking(3, responses=["no ", "yes"])
    rows[40], rows[41] = ranking(3, annotator="anna"), ranking(3, annotator="anna", ranks=[1, 1])
    rows[50] = ranking(3, responses=["yes", "perhaps"])
    path = jsonl(tmp_path / "r.jsonl", rows)
    report = load_rankings(config(rankings=path), 0).report
    (file,) = report.to_json()["files"]
    assert (file["repeated"], file["kept"], file["tied"], file["dropped"]) == (4, 60, 1, {})
    assert file["samples"] == {"repeated ranking": [f"{path}:{line}" for line in (11, 21, 31, 42)]}
    assert "4 rank the same again" in report.summary()
    check_dirty(report, config(rankings=path))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = [ranking(i, subset="s") for i in range(40)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        import csv

        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(rows[0])
            writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)
    elif kind == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(r) + "\n" for r in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    data = config(rankings=path)
    loaded = load_rankings(data, 0)
    found = {(r.prompt.messages[0]["content"], *r.responses, *r.ranks, r.subset) for r in loaded.train + loaded.heldout}
    assert found == {(f"question {i}", "yes", "no", 1, 2, "s") for i in range(40)}
    assert list(loaded.report.digests) == [str(path)]


def test_json_list_names_the_line_of_an_element(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(
        '[\n{"prompt": "a",\n "responses": ["b", "c"], "ranks": [1, 2]},\n{"prompt": "a"}\n]'
    )
    with pytest.raises(DataError, match=r"r.json:4: field `responses` is missing"):
        load_rankings(config(rankings=tmp_path / "r.json"), 0)
    (tmp_path / "r.json").write_text('[\n{"prompt": "a"},\n]')
    with pytest.raises(DataError, match=r"r.json:3: broken JSON"):
        load_prompts(config(prompts=tmp_path / "r.json"), 0)


def test_broken_gzip_and_csv(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"r.jsonl.gz: cannot be read"):
        load_rankings(config(rankings=tmp_path / "r.jsonl.gz"), 0)
    (tmp_path / "r.csv").write_text("prompt,group\na,b\nc\n")
    with pytest.raises(DataError, match=r"r.csv:3: has 1 cells, the header 2"):
        load_prompts(config(prompts=tmp_path / "r.csv"), 0)


def test_folder_root_and_text_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", prompts(30))
    (tmp_path / "LICENSE.txt").write_text("words\n")
    data = DataConfig(
        root=str(tmp_path), prompts=SourceConfig(path="."), reference_text=SourceConfig(path="LICENSE.txt")
    )
    assert load_prompts(data, 0).report.total("rows") == 30
    assert load_texts(data, "reference_text", 0)[0] == ["words"]
    at_root = DataConfig(root=str(tmp_path), prompts=SourceConfig(path=str(tmp_path)))
    assert load_prompts(at_root, 0).report.total("rows") == 30


def test_a_prompt_is_on_one_side_everywhere(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", prompts(300))
    jsonl(tmp_path / "r.jsonl", [ranking(i) for i in range(300, -1, -1)])
    data = config(prompts=tmp_path / "p.jsonl", rankings=tmp_path / "r.jsonl")
    one, two = load_prompts(data, 0), load_rankings(data, 1)
    said = [{p.messages[0]["content"] for p in one.train}, {r.prompt.messages[0]["content"] for r in two.heldout}]
    assert not said[0] & said[1]
    assert 15 <= len(one.heldout) <= 45  # 30 expected of 300; the deviation is 5.2


@pytest.mark.parametrize("text", ["hello", " hello\n"])
def test_the_side_is_the_hash_of_what_is_said(text: str) -> None:
    # sha256sum of [["user","hello"]] begins with b963d642: .7242 of the way from 0 to ffffffff
    assert is_heldout([{"role": "user", "content": text}], 0.7243)
    assert not is_heldout([{"role": "user", "content": text}], 0.7241)


def test_limit_draws_with_the_seed(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", prompts(300))
    data = config(prompts=SourceConfig(path=str(tmp_path / "p.jsonl"), limit=60))

    def drawn(seed: int) -> list[str]:
        loaded = load_prompts(data, seed)
        assert (loaded.report.total("kept"), loaded.report.total("unused")) == (60, 240)
        return [p.where for p in loaded.train + loaded.heldout]

    assert drawn(0) == drawn(0) != drawn(1)


def test_prompts_come_from_the_rankings_once_each(tmp_path: Path) -> None:
    jsonl(tmp_path / "r.jsonl", [ranking(i % 50) for i in range(100)])
    loaded = load_prompts(config(rankings=tmp_path / "r.jsonl"), 0)
    assert (loaded.report.total("kept"), loaded.report.total("merged")) == (50, 50)
    assert load_rankings(config(rankings=tmp_path / "r.jsonl"), 0).report.total("kept") == 100


def test_gate_prompts_must_not_be_trained_on(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "p.jsonl", prompts(60))
    data = config(prompts=train)
    heldout = load_gate_prompts(data, 0)
    assert [p.messages for p in heldout] == [p.messages for p in load_prompts(data, 0).heldout]
    fine = jsonl(tmp_path / "fine.jsonl", [{"prompt": p.messages} for p in heldout])
    assert len(load_gate_prompts(config(prompts=train, gate_prompts=fine), 0)) == len(heldout)
    leaky = jsonl(tmp_path / "leaky.jsonl", [{"prompt": load_prompts(data, 0).train[0].messages}])
    with pytest.raises(
        DataError, match=r"1 of 1 prompts are training prompts[\s\S]*leaky.jsonl:1 is trained on: .*p.jsonl:"
    ):
        load_gate_prompts(config(prompts=train, gate_prompts=leaky), 0)


def need(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"no {folder} beside the checkout")
    return SHARED / folder


def test_hh_counts_agree_with_a_count_by_hand() -> None:
    folder = need("hh-rlhf")
    counted: Counter[str] = Counter()
    said: Counter[tuple[str, ...]] = Counter()
    for path in folder.glob("*.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().strip().split("\n"):
            row = json.loads(line)
            (head, _, good), (other, _, bad) = (row[k].rpartition("\n\nAssistant:") for k in ("chosen", "rejected"))
            if head != other:
                counted["prompt mismatch"] += 1
            elif not good.strip() or not bad.strip():
                counted["empty reply"] += 1
            elif good.strip() == bad.strip():
                counted["identical responses"] += 1
            elif "\n\nAssistant:" in head[head.rfind("\n\nHuman:") :]:
                counted["reply to no question"] += 1
            else:
                said[head.strip(), *sorted((good.strip(), bad.strip()))] += 1
    loaded = load_rankings(config(rankings=folder), 0)
    assert loaded.report.total("rows") == 3466
    assert loaded.report.dropped == counted
    assert min(counted.values()) > 0
    assert loaded.report.total("repeated") == sum(said.values()) - len(said)


@pytest.mark.parametrize(
    ("load", "key", "folder", "rows"),
    [
        (load_demonstrations, "demonstrations", "gpteacher-roleplay", 3146),
        (load_prompts, "prompts", "gpteacher-roleplay", 3146),
        (load_prompts, "prompts", "oasst-prompts", 263),
    ],
)
def test_real_files_are_read_wholly(load: Callable[..., Loaded[Any]], key: str, folder: str, rows: int) -> None:
    loaded = load(config(**{key: need(folder)}), 0)
    assert len(loaded.train) + len(loaded.heldout) == loaded.report.total("kept") == rows
