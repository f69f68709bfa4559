from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rlhf.artifacts import (
    atomic_folder,
    canonical,
    checkpoints,
    folder_digest,
    is_intact,
    latest_checkpoint,
    prune_checkpoints,
    seal,
    write_json,
)


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_folder_digest_is_the_hash_of_the_sorted_file_digests(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", b="2", a="1")
    one, two = ("sha256:" + hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    listing = '{"a":"' + one + '","b":"' + two + '"}'
    assert folder_digest(folder) == "sha256:" + hashlib.sha256(listing.encode()).hexdigest()


def test_the_digest_sees_content_and_names_but_not_the_model_card(tmp_path: Path) -> None:
    before = folder_digest(make(tmp_path / "m", a="1"))
    assert folder_digest(make(tmp_path / "n", b="1")) != before
    make(tmp_path / "m", **{"README.md": "card"})
    assert folder_digest(tmp_path / "m") == before
    make(tmp_path / "m", a="0")
    assert folder_digest(tmp_path / "m") != before


def test_a_failure_while_writing_a_folder_keeps_the_old_one_whole(tmp_path: Path) -> None:
    final = make(tmp_path / "model", weights="old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(final) as part:
        (part / "weights").write_text("ne")
        raise OSError("disk full")
    assert (final / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_finished_folder_takes_the_old_ones_place(tmp_path: Path) -> None:
    final = make(tmp_path / "model", weights="old", extra="x")
    with atomic_folder(final) as part:
        (part / "weights").write_text("new")
    assert {p.name: p.read_text() for p in final.iterdir()} == {"weights": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_write_json_keeps_the_old_file_when_the_value_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_newest_intact_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        seal(make(tmp_path / f"step-{step}", weights=f"{step}"))
    make(tmp_path / "step-11", weights="never sealed")
    make(tmp_path / "step-10", weights="one byte flipped")
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-9", "step-10", "step-11"]
    found, torn = latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-9"
    assert [p.name for p in torn] == ["step-11", "step-10"]


def test_a_file_added_to_or_lost_from_a_sealed_checkpoint_breaks_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "step-1", a="1", b="2")
    seal(folder)
    assert is_intact(folder)
    make(folder, c="3")
    assert not is_intact(folder)
    (folder / "c").unlink()
    (folder / "a").unlink()
    assert not is_intact(folder)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") == (None, [])


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        make(tmp_path / f"step-{step}", a="")
    prune_checkpoints(tmp_path, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-10"]


def test_canonical_json_has_one_form() -> None:
    assert canonical({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"\\u00e9"]}'
