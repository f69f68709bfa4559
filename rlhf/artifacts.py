"""Folders that are either whole or not there: digests, atomic writes, sealed checkpoints.

Everything is written beside its place under a temporary name, flushed to disk and renamed, so that a kill or a full
disk loses nothing that was saved before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, LineageError

SEAL = "digests.json"
MEMBERS, HOLDOUT = "members", "holdout"  # of several reward models: a key of the manifest's `extra`, and a folder
UNSEALED = ("README.md",)  # the model card is not part of the digest


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def lenient(value: Any) -> str:
    """Canonical JSON of rows that a user's data may put anything into: dates as text, NaN as null."""
    return canonical(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))


def sha256_text(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder` by its relative path, without the seal and the model card.

    A link to a file counts as what it points to, as in the hub's cache. LineageError for a link to a folder, whose
    files would be read by a loader and missed here, and for one that leads nowhere.
    """
    found = sorted(folder.rglob("*"))
    strange = next((p for p in found if p.is_symlink() and not p.is_file()), None)
    if strange is not None:
        kind = "to a folder" if strange.is_dir() else "that leads nowhere"
        raise LineageError(f"{strange}: is a symbolic link {kind}: put the files themselves there")
    files = [p for p in found if p.is_file() and p.name != SEAL]
    names = {p: p.relative_to(folder).as_posix() for p in files}
    return {name: sha256_file(p) for p, name in names.items() if name not in UNSEALED}


def folder_digest(folder: Path) -> str:
    """One digest for a folder: the hash of its sorted (name, digest) list."""
    return sha256_text(canonical(file_digests(folder)))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically: NaN is an error, since a reader would not agree on what it means."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success it takes `final`'s place, on failure nothing has changed."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _fsync_tree(part)
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.replace(old)
            part.replace(final)
            shutil.rmtree(old)
        else:
            part.replace(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def seal(folder: Path) -> None:
    """Write the digests of a finished checkpoint into it: only a sealed checkpoint is ever resumed from."""
    write_json(folder / SEAL, file_digests(folder))


def is_intact(folder: Path) -> bool:
    """True if `folder` is sealed and every file is as it was."""
    try:
        return bool(read_json(folder / SEAL) == file_digests(folder))
    except (OSError, ValueError, LineageError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """All `step-N` or `checkpoint-N` folders in `folder`, oldest first, intact or not."""
    found = [p for p in folder.glob("*-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest intact checkpoint in `folder`, and the newer ones that were passed over as torn or altered."""
    torn: list[Path] = []
    for path in reversed(checkpoints(folder)):
        if is_intact(path):
            return path, torn
        torn.append(path)
    return None, torn


def check_made_by(checkpoint: Path, was: tuple[str, int], now: tuple[str, int]) -> None:
    """ConfigError unless the engine and the number of ranks are those that wrote the checkpoint."""
    if was != now:
        raise ConfigError(
            f"engine: {checkpoint} was made by engine={was[0]} on {was[1]} ranks, and this is engine={now[0]} on "
            f"{now[1]}: go on with what it was made by, or delete {checkpoint.parent} to start the stage anew"
        )


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def members_of(extra: Mapping[str, Any]) -> list[str]:
    """The folders in rm/ of the members beside the first, as the `extra` of rm's manifest has them."""
    return [name for name in extra.get(MEMBERS, {}) if name != HOLDOUT]


def holdout_of(model: Path | None, extra: Mapping[str, Any]) -> Path | None:
    """The model folder of the run's own holdout; `model` is the run's reward model, `extra` of its manifest."""
    return model.parent / HOLDOUT / "model" if model is not None and HOLDOUT in extra.get(MEMBERS, {}) else None
