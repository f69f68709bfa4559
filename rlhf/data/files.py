"""From a path to rows: JSONL, JSON, CSV, Parquet, plain text, each also as .gz; a folder, a glob, or a hub id.

JSON, CSV and text are read here and not through `datasets`, so that a broken line is named by its number.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.artifacts import canonical, sha256_file
from rlhf.config import SourceConfig
from rlhf.data.licences import licence_beside
from rlhf.data.rows import shown
from rlhf.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# Cells of a CSV that hold JSON.
_LISTS = ("messages", "conversations", "responses", "ranks", "preference", "completions", "answers", "rankings")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its value, or why it could not be read. `line` counts from 1 (of rows, in Parquet and hub)."""

    line: int
    value: Any = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """One file, read."""

    name: str
    digest: str
    rows: list[Row]
    license: str | None = None  # as far as it is written beside the file


def read_source(source: SourceConfig, key: str, root: str | None) -> list[Table]:
    """All tables of a source. Relative paths are taken from `root`, or else from the start directory; a path that is
    `root` itself stands for it, so that an experiment can point all its sources there.

    Raises DataError for a missing, empty or unreadable file; problems of single rows stand in the rows.
    """
    assert source.path is not None
    root = None if source.path == root else root
    paths = resolve(source.path, root)
    if not paths:
        if _may_be_hub_id(source.path):
            return [_read_hub(source, key)]
        place = Path(root or ".", source.path).expanduser().absolute()
        raise DataError(f"{key}.path={source.path}: no such file, folder or glob match: {place}")
    named = Path(root or ".", Path(source.path).expanduser())
    top = named if named.is_dir() else Path(root) if root else None
    return [replace(read_file(path, key), license=licence_beside(path, top)) for path in paths]


def resolve(path: str, root: str | None) -> list[Path]:
    """The data files that a local path stands for, sorted; empty if it stands for none.

    In a folder, .txt files are data only if there is nothing else: licences and notes lie beside many data sets.
    """
    full = Path(root or ".", Path(path).expanduser())
    if full.is_file():
        return [full]
    if full.is_dir():
        found = sorted(p for p in full.rglob("*") if p.is_file() and _suffix(p) and not p.name.startswith("."))
        return [p for p in found if _suffix(p) != ".txt"] or found
    return sorted(Path(p) for p in glob.glob(str(full), recursive=True) if Path(p).is_file())


def read_file(path: Path, key: str) -> Table:
    """Read one file wholly."""
    suffix = _suffix(path)
    if not suffix:
        raise DataError(f"{key}: {path}: unknown kind of file; it must end in {', '.join(SUFFIXES)}, or one with .gz")
    try:
        if suffix == ".parquet":
            rows = _parquet_rows(path)
        else:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = list(_text_rows(raw, suffix))
        digest = sha256_file(path)
    except (OSError, EOFError, ValueError) as error:  # gzip.BadGzipFile is an OSError, broken Parquet a ValueError
        raise DataError(f"{key}: {path}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{key}: {path}: is empty: it holds no row")
    return Table(str(path), digest, rows)


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def _text_rows(raw: bytes, suffix: str) -> Iterator[Row]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Row(line, problem=f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8")
        return
    if suffix == ".csv":
        yield from _csv_rows(text)
    elif suffix == ".txt":
        yield from (Row(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    elif suffix == ".json" and text.lstrip().startswith("["):
        yield from _json_list(text)
    else:
        yield from _json_lines(text)


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield Row(number, json.loads(line))
            except ValueError as error:
                yield Row(number, problem=f"broken JSON: {error}")


def _json_list(text: str) -> Iterator[Row]:
    """The elements of one JSON list, each with the line that it starts on."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    place, counted, line = text.index("[") + 1, 0, 1
    separator = ""
    while True:
        place = blank.match(text, place).end()  # type: ignore[union-attr]  # the pattern matches nothing too
        line, counted = line + text.count("\n", counted, place), place
        if text[place : place + 1] == "]" and separator != ",":
            rest = text[place + 1 :].strip()
            if rest:
                yield Row(line, problem="broken JSON: text after the end of the list")
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            at = getattr(error, "lineno", line)
            yield Row(at, problem=f"broken JSON: {error}")
            return
        yield Row(line, value)
        place = blank.match(text, place).end()  # type: ignore[union-attr]  # the pattern matches nothing too
        separator = text[place : place + 1]
        if separator == ",":
            place += 1
        elif separator != "]":
            yield Row(line, problem="broken JSON: neither a comma nor the end of the list after this element")
            return


def _csv_rows(text: str) -> Iterator[Row]:
    """Cells are text; one that starts with [ or { is JSON, so that messages, responses and ranks fit into a cell."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(line, problem=f"broken CSV: {error}")
            return
        if cells is None:
            return
        if header is None:
            header = cells
        elif cells and len(cells) != len(header):
            yield Row(line, problem=f"has {len(cells)} cells, the header {len(header)}")
        elif cells:
            yield _csv_row(line, dict(zip(header, cells, strict=True)))


def _csv_row(line: int, cells: dict[str, str]) -> Row:
    value: dict[str, Any] = {}
    for name, cell in cells.items():
        is_json = name in (*_LISTS, "prompt", "chosen", "rejected") and cell[:1] in ("[", "{")
        try:
            value[name] = json.loads(cell) if is_json else cell
        except ValueError as error:
            if name in _LISTS:
                return Row(line, problem=f"field `{name}`: broken JSON: {error}")
            value[name] = cell  # a prompt or reply that merely starts with a bracket
    return Row(line, value)


def _parquet_rows(path: Path) -> list[Row]:
    import datasets  # slow to import

    with tempfile.TemporaryDirectory() as cache:  # nothing is left in the user's cache
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return [_checked_row(n, value) for n, value in enumerate(table, 1)]
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(str(error.__cause__ or error)) from error


def _checked_row(line: int, value: Any) -> Row:
    """A row of a typed table, whose fields may hold more than JSON has: that is a problem which names the field."""
    found = _not_json(value)
    if found is None:
        return Row(line, value)
    field, bad = found
    return Row(line, problem=f"field `{field}` is {shown(bad)}, which JSON cannot hold: make it text or drop it")


def _not_json(value: Any, name: str = "") -> tuple[str, Any] | None:
    """The first part of a value, with its path, that is not made of text, finite numbers, booleans, null, lists and
    objects."""
    if isinstance(value, dict):
        inner = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        inner = ((f"{name}[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, float):
        return None if math.isfinite(value) else (name, value)
    else:
        return None if value is None or isinstance(value, str | int) else (name, value)
    return next((found for path, item in inner if (found := _not_json(item, path)) is not None), None)


def _may_be_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not _suffix(Path(path))


def _read_hub(source: SourceConfig, key: str) -> Table:
    import datasets

    try:
        table = datasets.load_dataset(source.path, split=source.split)
        values = list(table)
    except Exception as error:  # foreign code and the network: whatever it raises becomes one message
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{key}.path={source.path}: neither a file or folder here nor a data set that the hub gives "
            f"(split={source.split}): {reason}"
        ) from error
    if not values:
        raise DataError(f"{key}.path={source.path}: split {source.split} is empty")
    rows = [_checked_row(n, value) for n, value in enumerate(values, 1)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update((canonical(row.value) if row.problem is None else row.problem).encode())
    name = f"{source.path}[{source.split}]"
    return Table(name, "sha256:" + digest.hexdigest(), rows, license=table.info.license or None)
