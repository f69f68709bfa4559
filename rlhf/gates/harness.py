"""Tasks of lm-evaluation-harness (the extra [lm-eval]): which files a task is made of, their digest, and its scores.

Nothing here runs a model. A task is YAML, with Python beside it for what YAML cannot say, and data: local files, or a
data set of the hub, which the YAML names and nothing here reads.
"""

from __future__ import annotations

import difflib
import functools
import glob
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.artifacts import canonical, file_digests, lenient, sha256_file, sha256_text
from rlhf.config import CheckConfig, TaskConfig
from rlhf.errors import ConfigError, Invalid
from rlhf.gates.measured import TaskMetric, TaskScores

LIBRARY, EXTRA = "lm_eval", "lm-eval"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A task, tag or group. `digest` is of the content of its files, not of where they lie."""

    name: str
    manager: Any  # the lm_eval TaskManager that knows it
    entries: list[Any]  # of the manager's index: the task, or the tag or group and all below it
    digest: str


class _Loader(yaml.SafeLoader):
    """Reads `!function utils.score` as the text behind it: nothing is imported."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def task_key(task: TaskConfig) -> str:
    """By this the scores of a task are found again; checks that ask the same share them."""
    return canonical(asdict(task))


def find(task: TaskConfig, key: str) -> Found:
    """The task that a check names. ConfigError, naming `key`, for one that does not exist and without the extra."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise ConfigError(f"{key}: needs lm-evaluation-harness: pip install 'rlhf-pipeline[{EXTRA}]'")
    assert task.name is not None
    name, include, file = task.name, task.include_path, None
    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"{key}.include_path: {include} is not a folder")
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{key}.name: there is no file {name}")
        file, include = Path(name), str(Path(name).parent) if include is None else include
        read = _read(file, key)
        name = str(read.get("group") or read.get("task") or name)
    manager = _manager_of(name, include)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        where = f" nor one in {include} that can be read" if include is not None else ""
        raise ConfigError(f"{key}.name: lm-evaluation-harness has no task {name!r}{where}{hint}")
    indexed = manager.task_index[name].yaml_path
    if file is not None and (indexed is None or Path(indexed).resolve() != file.resolve()):
        raise ConfigError(f"{key}.name: {file} calls itself {name!r}; so does {indexed}, which would be run instead")
    entries = [entry for entry in _below(name, manager.task_index).values() if entry is not None]
    yamls = sorted(Path(entry.yaml_path) for entry in entries if entry.yaml_path is not None)
    files = {path for path in yamls for path in _files(path, key)}
    listed = sorted([path.name, sha256_file(path)] for path in files)
    return Found(name=name, manager=manager, entries=entries, digest=sha256_text(canonical(listed)))


def _manager_of(name: str, include: str | None) -> Any:
    """One that knows `name` and all that it is made of. The harness's own 14,000 files are read only where they must
    be, as that takes long."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        manager = TaskManager(include_path=include, include_defaults=False)
        if None not in _below(name, manager.task_index).values():
            return manager
    return _with_defaults(include)


@functools.lru_cache(maxsize=4)
def _with_defaults(include: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _members(entry: Any) -> list[str]:
    """The names below a tag or a group."""
    if entry.tags and entry.yaml_path is None:
        return sorted(entry.tags)
    return list(_named(entry.cfg["task"])) if "group" in (entry.cfg or {}) else []


def _named(items: Any) -> Iterator[str]:
    """The names in a group's list: of tasks and groups, bare or with options, and in groups spelt out inside it."""
    for item in items if isinstance(items, list) else [items]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield from _named([item["group"]] if "group" in item else [])
            yield from _named(item.get("task") or [])


def _below(name: str, index: Any) -> dict[str, Any]:
    """The entries of `name` and of all below it, by name; None for one that the index has not, such as what a group
    spells out itself."""
    found: dict[str, Any] = {}
    names = [name]
    while names:
        current = names.pop()
        if current not in found:
            found[current] = index.get(current)
            names += _members(found[current]) if found[current] is not None else []
    return found


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        read = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}: {path}: cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{key}: {path}: is not a mapping, so no task")
    return read


def _files(path: Path, key: str) -> Iterator[Path]:
    """The YAML file, those that it includes, the Python beside them and the local data that they name."""
    read = _read(path, key)
    yield path
    yield from sorted(path.parent.rglob("*.py"))
    included = read.get("include") or []
    for name in included if isinstance(included, list) else [included]:
        yield from _files(path.parent / name, key)  # an absolute name stays itself
    options = read.get("dataset_kwargs") or {}
    named = [*_texts(options.get("data_files")), *_texts(options.get("data_dir")), *_texts(read.get("dataset_path"))]
    for name in named:
        yield from _data(name, name in _texts(options.get("data_files")), key)


def _data(name: str, must: bool, key: str) -> Iterator[Path]:
    """The local files that a name of data stands for: a file, a folder or a pattern; none for an address."""
    if Path(name).is_dir():
        yield from (Path(name) / inner for inner in file_digests(Path(name)))
        return
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
    if must and not matches and "://" not in name:
        raise ConfigError(f"{key}: its YAML names the data file {name}, and there is none")
    yield from matches


def _texts(value: Any) -> list[str]:
    """All texts in a text, a list or a mapping."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for item in inner for text in _texts(item)]


def validate_task(key: str, check: CheckConfig) -> None:
    """ConfigError for a task that is not there, runs code that a model wrote, or whose metric is not what the check
    takes it for; all this without its data."""
    found = find(check.task, f"{key}.task")
    for entry in found.entries:
        said = entry.cfg or {}
        if said.get("unsafe_code"):
            raise ConfigError(f"{key}.task.name: {entry.name} runs code that the model writes: it is not run here")
        metrics = {_metric_name(item): item for item in said.get("metric_list") or []}
        if not metrics:
            continue
        if check.metric is None and len(metrics) > 1:
            raise ConfigError(f"{key}.metric: {entry.name} has {', '.join(metrics)}: say which")
        if check.metric is not None and check.metric not in metrics:
            raise ConfigError(f"{key}.metric: {entry.name} has no {check.metric!r}; it has {', '.join(metrics)}")
        name = check.metric or next(iter(metrics))
        check_direction(key, check, name, metrics[name].get("higher_is_better"))


def _metric_name(item: dict[str, Any]) -> str:
    """As the harness calls it: of a function, which the index holds as `folder/module.function`, the last part."""
    name = str(item["metric"])
    return name.rpartition(".")[2] if "/" in name else name


def check_direction(key: str, check: CheckConfig, metric: str, higher: bool | None) -> None:
    """ConfigError for a `min` on what should be low, or a `max` on what should be high."""
    if higher is False and check.min is not None:
        raise ConfigError(f"{key}.min: of {metric}, lower is better: limit it by `max`")
    if higher is True and check.max is not None:
        raise ConfigError(f"{key}.max: of {metric}, higher is better: limit it by `min`")


def collect(
    name: str, tasks: dict[str, Any], samples: dict[str, list[dict[str, Any]]], asked: dict[str, int], means: Any
) -> TaskScores:  # fmt: skip
    """The metrics that all tasks have, over the documents of all of them together.

    samples: by task, the harness's rows, one for each document and filter; asked: how many documents each task was to
    answer; means: the harness's aggregations that are a plain mean. Invalid if a document is missing.
    """
    metrics: dict[tuple[str, str], TaskMetric] = {}
    prints: set[str] = set()
    for task_name, task in tasks.items():
        rows = samples.get(task_name, [])
        filters = {row["filter"] for row in rows}
        if not rows or len(rows) != asked[task_name] * len(filters):
            raise Invalid(f"{task_name}: {len(rows)} answers came back for {asked[task_name]} documents")
        aggregations, higher = task.aggregation(), task.higher_is_better()
        for row in rows:
            document = f"{task_name}/{row['doc_id']}"
            prints.add(f"{document} {row['doc_hash']} {row['target_hash']}")
            for metric in row["metrics"]:
                aggregate = aggregations.get(metric)
                known = metrics.setdefault((metric, row["filter"]), TaskMetric(
                    values={}, aggregate=None if aggregate in (None, *means) else aggregate,
                    higher_is_better=higher.get(metric) is not False,
                ))  # fmt: skip
                known.values[document] = row[metric]
    total = sum(asked.values())
    whole = {key: metric for key, metric in metrics.items() if len(metric.values) == total}
    if not whole:
        raise Invalid(f"{name}: its tasks have no metric in common")
    if len(tasks) > 1:
        whole = {key: metric for key, metric in whole.items() if metric.aggregate is None}
    return TaskScores(name=name, documents=sha256_text(lenient(sorted(prints))), metrics=whole)
