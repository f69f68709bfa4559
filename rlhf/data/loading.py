"""The rows of each source, validated wholly before anything else loads, and split by prompt."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from rlhf.artifacts import canonical
from rlhf.config import DataConfig, Intransitive, SourceConfig
from rlhf.data.files import Table, read_source
from rlhf.data.formats import FORMATS, Format
from rlhf.data.report import DataReport, FileReport
from rlhf.data.rows import REPEATED, Contradiction, Dirty, Kind, Malformed, Parsed, text_of
from rlhf.errors import ConfigError, DataError
from rlhf.types import Demonstration, Messages, Prompt, Ranking

T = TypeVar("T", Demonstration, Ranking, Prompt)
SHOWN = 5  # problems of a file that one message names


@dataclass(slots=True)
class Loaded(Generic[T]):
    """The rows of one source. No prompt is on both sides, in this or any other source."""

    train: list[T]
    heldout: list[T]
    report: DataReport


def prompt_of(row: Demonstration | Ranking | Prompt) -> Prompt:
    return row if isinstance(row, Prompt) else row.prompt


def prompt_key(messages: Messages) -> str:
    """sha256 of what the prompt says: roles and texts without blanks around them."""
    said = [[m["role"], m["content"].strip()] for m in messages]
    return hashlib.sha256(canonical(said).encode()).hexdigest()


def is_heldout(messages: Messages, holdout: float) -> bool:
    """The side of a prompt: its hash, read as a number in [0, 1), lies below `holdout`. Depends on nothing else."""
    return int(prompt_key(messages)[:16], 16) / 2**64 < holdout


def load_demonstrations(data: DataConfig, seed: int) -> Loaded[Demonstration]:
    """The rows of data.demonstrations. Raises DataError, or ConfigError if the source is not set."""
    return _load(data, "demonstrations", "demonstration", seed, Demonstration)


def load_rankings(data: DataConfig, seed: int) -> Loaded[Ranking]:
    """The rows of data.rankings."""
    return _load(data, "rankings", "ranking", seed, Ranking)


def load_prompts(data: DataConfig, seed: int) -> Loaded[Prompt]:
    """data.prompts, or else the prompts of the rankings, or else those of the demonstrations; each once."""
    names = [name for name in ("prompts", "rankings", "demonstrations") if getattr(data, name).path]
    return _load(data, names[0] if names else "prompts", "prompt", seed, Prompt)


def load_gate_prompts(data: DataConfig, seed: int) -> list[Prompt]:
    """data.gate_prompts, or else the held-out prompts. Raises DataError if one of them is trained on."""
    if not data.gate_prompts.path:
        return load_prompts(data, seed).heldout
    gate, _ = _read_rows(data, "gate_prompts", "prompt", seed)
    trained: dict[str, str] = {}
    for name in ("demonstrations", "rankings", "prompts"):
        if getattr(data, name).path:
            for prompt in _load(data, name, "prompt", seed, Prompt).train:
                trained.setdefault(prompt_key(prompt.messages), prompt.where)
    prompts = [prompt for prompt in gate if isinstance(prompt, Prompt)]
    leaks = [(p.where, trained[key]) for p in prompts if (key := prompt_key(p.messages)) in trained]
    if leaks:
        named = "\n".join(f"  {where} is trained on: {other}" for where, other in leaks[:SHOWN])
        raise DataError(
            f"data.gate_prompts: {len(leaks)} of {len(prompts)} prompts are training prompts, so the gates would judge "
            f"what was learnt by heart:\n{named}\nTake them out of one of the two files."
        )
    return prompts


def load_texts(data: DataConfig, name: str, seed: int) -> tuple[list[str], list[str]]:
    """The plain texts of data.<name>, which are the lines of a .txt, bare strings or the field `text`, and the digests
    of its files."""
    key, source = f"data.{name}", getattr(data, name)
    texts, digests = [], []
    for table in read_source(_need(source, key), key, data.root):
        rows, problems = _parse(table, lambda value: value if isinstance(value, str) else text_of(value, "text"))
        _raise(key, table.name, problems, {"text": "The boiler stands in the cellar."})
        texts += [text for _, text in rows]
        digests.append(table.digest)
    return (texts if source.limit is None else _draw(texts, source.limit, seed)), sorted(digests)


def _load(data: DataConfig, name: str, kind: Kind, seed: int, of: type[T]) -> Loaded[T]:
    key = f"data.{name}"
    found, report = _read_rows(data, name, kind, seed)
    rows = [row for row in found if isinstance(row, of)]
    loaded: Loaded[T] = Loaded([], [], report)
    for row in rows:
        (loaded.heldout if is_heldout(prompt_of(row).messages, data.holdout) else loaded.train).append(row)
    report.train, report.heldout = len(loaded.train), len(loaded.heldout)
    if rows and not (loaded.train and loaded.heldout):
        side = "held-out" if loaded.train else "training"
        raise DataError(
            f"{key}: none of its {len(rows)} rows is on the {side} side of data.holdout={data.holdout:g}: "
            "give more prompts, or another share"
        )
    return loaded


def _need(source: SourceConfig, key: str) -> SourceConfig:
    if not source.path:
        raise ConfigError(f"{key}.path: is not set; this stage needs it: {key}.path=... (a file, folder, glob, hub id)")
    return source


def _read_rows(data: DataConfig, name: str, kind: Kind, seed: int) -> tuple[list[Parsed], DataReport]:
    """All good rows of a source in file order, and the report. Dirty ones are counted, malformed ones raise."""
    key, source = f"data.{name}", getattr(data, name)
    report = DataReport(key=key)
    kept: list[Parsed] = []
    seen: set[str] = set()
    for table in read_source(_need(source, key), key, data.root):
        format_ = _choose(source.format, table, kind, key)
        file = FileReport(file=table.name, format=format_.name, digest=table.digest, rows=len(table.rows),
                          license=source.license or table.license)  # fmt: skip
        report.files.append(file)
        parsed, problems = _parse(table, partial(_or_dirt, format_, kind))
        readable = any(row.problem is None for row in table.rows)
        _raise(key, table.name, problems, format_.example if readable else None)
        for line, result in parsed:
            where = f"{table.name}:{line}"
            file.extra += len(result) - 1
            kept += _keep(_clean(result, where, file, data.intransitive), where, file, seen)
    if not kept:
        raise DataError(f"{key}: no row is left; dropped: {dict(report.dropped)}")
    if source.limit is not None:
        kept = _limit(kept, source.limit, seed, report)
    _note_rankings([row for row in kept if isinstance(row, Ranking)], report)
    return kept, report


def _note_rankings(rankings: list[Ranking], report: DataReport) -> None:
    """Count the kept rankings that say nothing but ties, and those that rank the same again, which are named: a pair
    that a file holds twice weighs twice, and one that it holds both ways round cancels."""
    known: set[tuple[str, frozenset[str], str | None]] = set()
    for row in rankings:
        file = report.of(row.prompt.where)
        file.tied += len({rank for rank in row.ranks if rank is not None}) == 1
        key = prompt_key(row.prompt.messages), frozenset(text.strip() for text in row.responses), row.annotator
        if key in known:
            file.repeated += 1
            file.note(REPEATED, row.prompt.where)
        known.add(key)


def _choose(name: str, table: Table, kind: Kind, key: str) -> Format:
    """The format by its name, or the first one that serves `kind` and matches the first readable row."""
    able = [f for f in FORMATS if kind in f.kinds]
    if name != "auto":
        chosen = [f for f in able if f.name == name]
        if not chosen:
            raise ConfigError(f"{key}.format={name}: no such format of {kind}s; there are: auto, {_names(able)}")
        return chosen[0]
    first = next((row for row in table.rows if row.problem is None), None)
    if first is None:  # nothing can be read, and the caller says so
        return able[0]
    for format_ in able:
        if format_.matches(first.value):
            return format_
    fields = set(first.value) if isinstance(first.value, dict) else set()
    near = max(able, key=lambda f: len(fields & set(f.example)))
    if fields & set(near.example):  # its parser names the field that is missing
        return near
    shown = f"the fields {', '.join(sorted(fields)) or 'none'}" if isinstance(first.value, dict) else "no fields"
    examples = "\n".join(f"  {f.name}: {json.dumps(f.example, ensure_ascii=False)}" for f in able)
    raise DataError(
        f"{key}: {table.name}:{first.line}: is no {kind} in any known format: it has {shown}. "
        f"Correct rows look like this:\n{examples}"
    )


def _names(formats: Iterable[Format]) -> str:
    return ", ".join(f.name for f in formats)


def _or_dirt(format_: Format, kind: Kind, value: Any) -> Sequence[Parsed | Dirty]:
    """The rows of a value; dirt is a result and not an exception, since the row is counted and the file read on."""
    try:
        return format_.parse(value, kind)
    except Dirty as dirt:
        return [dirt]


R = TypeVar("R")


def _parse(table: Table, parse: Callable[[Any], R]) -> tuple[list[tuple[int, R]], list[tuple[int, str]]]:
    """What `parse` makes of each row, and the problems, each with its line."""
    good, problems = [], []
    for row in table.rows:
        if row.problem is not None:
            problems.append((row.line, row.problem))
            continue
        try:
            good.append((row.line, parse(row.value)))
        except Malformed as error:
            problems.append((row.line, str(error)))
    return good, problems


def _raise(key: str, name: str, problems: list[tuple[int, str]], example: Any) -> None:
    if not problems:
        return
    lines = [f"  {name}:{line}: {problem}" for line, problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    rows = "1 row is" if len(problems) == 1 else f"{len(problems)} rows are"
    if example is not None:
        lines.append(f"A correct row: {json.dumps(example, ensure_ascii=False)}")
    raise DataError(f"{key}: {rows} malformed:\n" + "\n".join(lines))


def _clean(result: Sequence[Parsed | Dirty], where: str, file: FileReport, intransitive: Intransitive) -> list[Parsed]:
    """What one line holds without its dirt, which is counted."""
    clean: list[Parsed] = []
    for part in result:
        if isinstance(part, Contradiction) and intransitive is Intransitive.keep:
            file.intransitive += 1
            file.note(str(part), where)
            clean.append(part.instead)
        elif isinstance(part, Dirty):
            file.drop(str(part), where)
        else:
            clean.append(part)
    return clean


def _keep(result: list[Parsed], where: str, file: FileReport, seen: set[str]) -> list[Parsed]:
    """The rows of one line that are kept. Prompts count once, however often they occur: `seen` holds their keys."""
    kept = []
    for row in result:
        prompt = prompt_of(row)
        key = prompt_key(prompt.messages)
        prompt.where, prompt.id = where, prompt.id or key[:16]
        if isinstance(row, Prompt) and key in seen:
            file.merged += 1
            continue
        seen.add(key)
        file.kept += 1
        kept.append(row)
    return kept


def _limit(rows: list[Parsed], limit: int, seed: int, report: DataReport) -> list[Parsed]:
    kept = _draw(rows, limit, seed)
    chosen = {id(row) for row in kept}
    for row in rows:
        if id(row) not in chosen:
            file = report.of(prompt_of(row).where)
            file.kept, file.unused = file.kept - 1, file.unused + 1
    return kept


V = TypeVar("V")


def _draw(rows: list[V], limit: int, seed: int) -> list[V]:
    """`limit` of the rows, drawn with the seed, in their order."""
    places = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    return [rows[i] for i in sorted(places)]
