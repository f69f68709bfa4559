from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.artifacts import canonical, sha256_text
from rlhf.errors import LineageError
from rlhf.ledger import GENESIS, Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in ("started", "finished", "verdict"):
        ledger.append(event, stage="sft", note=event)
    return ledger.path


def test_each_record_names_the_hash_of_the_one_before(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[0]["prev"] == GENESIS
    assert [r["prev"] for r in records[1:]] == [r["hash"] for r in records[:-1]]
    for record in records:
        body = {k: v for k, v in record.items() if k != "hash"}
        assert record["hash"] == sha256_text(canonical(body))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_edited_record_is_found_and_its_line_named(path: Path, broken: int) -> None:
    lines = path.read_text().splitlines()
    lines[broken] = lines[broken].replace('"stage": "sft"', '"stage": "ppo"')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LineageError, match=rf"ledger.jsonl:{broken + 1}:"):
        Ledger(path)


def test_a_record_taken_out_of_the_middle_is_found(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    with pytest.raises(LineageError, match=r"ledger.jsonl:2:"):
        Ledger(path)


def test_a_record_torn_by_a_kill_never_happened(path: Path) -> None:
    whole = path.read_text()
    path.write_text(whole + '{"event": "fini')
    ledger = Ledger(path)
    assert [r["event"] for r in ledger.records] == ["started", "finished", "verdict"]
    ledger.append("promotion", stage="sft")
    assert Ledger(path).last("promotion", "sft") is not None


def test_last_finds_the_newest_of_its_stage(path: Path) -> None:
    ledger = Ledger(path)
    ledger.append("verdict", stage="sft", note="second")
    found = ledger.last("verdict", "sft")
    assert found is not None
    assert found["note"] == "second"
    assert ledger.last("verdict", "rm") is None
