"""Parquet and hub data sets, whose typed columns may hold what JSON cannot."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import datasets
import pytest
from test_data_loading import config, ranking

from rlhf.config import SourceConfig
from rlhf.data import load_rankings
from rlhf.errors import DataError

NOT_JSON = {
    "a date": ({"when": datetime(2026, 1, 2)}, r"field `when` is datetime datetime\.datetime\(2026, 1, 2"),
    "NaN": ({"weight": float("nan")}, r"field `weight` is float nan"),
    "infinity in a list": ({"scores": [1.0, float("inf")]}, r"field `scores\[1\]` is float inf"),
    "bytes in an object": ({"meta": {"raw": b"x"}}, r"field `meta\.raw` is bytes b'x'"),
}


@pytest.mark.parametrize("fault", NOT_JSON)
@pytest.mark.parametrize("place", ["parquet", "hub"])
def test_a_value_that_json_cannot_hold_is_named(
    place: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of three rows; the first has null there, which is nothing wrong."""
    change, message = NOT_JSON[fault]
    nothing = dict.fromkeys(change)
    table = datasets.Dataset.from_list([ranking(0, **nothing), ranking(1, **change), ranking(2, **nothing)])
    path = str(tmp_path / "rows.parquet")
    if place == "parquet":
        table.to_parquet(path)
    else:
        path = "owner/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    where = re.escape(path if place == "parquet" else "owner/name[train]")
    with pytest.raises(DataError, match=rf"^data\.rankings: 1 row is malformed:\n  {where}:2: {message}.*JSON"):
        load_rankings(config(rankings=SourceConfig(path=path)), 0)


def test_the_digest_of_a_hub_data_set_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ranking(i) for i in range(40)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    text = "".join(json.dumps(row, sort_keys=True, separators=(",", ":")) for row in rows)
    digests = load_rankings(config(rankings=SourceConfig(path="owner/name")), 0).report.digests
    assert digests == {"owner/name[train]": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}
