"""The licences that a card tells: what is written beside the files or given, never what is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import DataConfig, SourceConfig
from rlhf.data import load_prompts
from rlhf.data.files import read_source
from rlhf.data.licences import licence_beside

CARD = "---\nlicense: cc-by-4.0\ntags: [a]\n---\n# Letters\nlicense: mit\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"notes.txt": "MIT License"}, None),
        ({"LICENSE": "\n  MIT  License\n\n====\nCopyright (c) 22 A\nx"}, "MIT License; Copyright (c) 22 A (LICENSE)"),
        ({"licence.md": "free"}, "free (licence.md)"),
        ({"LICENSE": " \n"}, None),
        ({"README.md": CARD, "LICENSE": "MIT"}, "cc-by-4.0 (README.md)"),
        ({"README.md": "---\nlicense: [mit, other]\n---\n"}, "mit, other (README.md)"),
        ({"README.md": "---\nlicense: other\nlicense_name: my-own\n---\n"}, "my-own (README.md)"),
        ({"README.md": "# No header\n---\nlicense: mit\n---\n"}, None),
        ({"README.md": "---\nlicense: [\n---\n"}, None),
        ({"README.md": "---\njust text\n---\n", "COPYING": "GPL"}, "GPL (COPYING)"),
        ({"LICENSE": "x" * 300}, "x" * 160 + " (LICENSE)"),
    ],
)
def test_a_licence_is_what_lies_beside_the_file(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert licence_beside(tmp_path / "rows.jsonl") == licence_beside(tmp_path) == expected


def test_folders_above_are_read_up_to_the_source_or_the_root(tmp_path: Path) -> None:
    inner = tmp_path / "mine" / "set" / "part"
    inner.mkdir(parents=True)
    (inner / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "mine" / "LICENSE").write_text("of the set")
    (tmp_path / "LICENSE").write_text("of the code")

    def read(path: str, root: Path | None) -> str | None:
        (table,) = read_source(SourceConfig(path=path), "data.prompts", str(root) if root else None)
        return table.license

    assert read(str(inner / "rows.jsonl"), None) is None, "no licence of a project around it"
    found = [read(str(tmp_path / "mine"), None), read("set/part/rows.jsonl", tmp_path / "mine")]
    assert found == ["of the set (LICENSE)"] * 2
    assert read("part/*.jsonl", tmp_path / "mine" / "set") is None
    (inner / "LICENSE").write_text("of the part")
    assert read(str(tmp_path / "mine"), None) == "of the part (LICENSE)"


def test_the_report_holds_the_licence_that_was_given_or_found(tmp_path: Path) -> None:
    rows = [{"prompt": f"my pump {i} rattles"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(prompts=SourceConfig(path=str(tmp_path / "rows.jsonl")))
    (tmp_path / "LICENSE").write_text("MIT License")
    assert load_prompts(data, 0).report.to_json()["files"][0]["license"] == "MIT License (LICENSE)"
    data.prompts.license = "bought from A"
    assert load_prompts(data, 0).report.to_json()["files"][0]["license"] == "bought from A"
