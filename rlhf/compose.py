"""From the command line to a checked `Config`: the schema for Hydra, and Hydra's errors in one line each. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config import CheckConfig, Config, NoninferiorityConfig, TaskConfig, check_all
from rlhf.errors import ConfigError, RLHFError

# Options of other samplers, whose samples would not have the log-probabilities that PPO computes for them.
FILTERS = frozenset(
    ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_new_tokens", "min_length",
     "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "num_beams")
)  # fmt: skip
CONF_DIR = str(Path(__file__).resolve().parent.parent / "conf")


def register() -> None:
    """Make the dataclasses Hydra's schema: names and types are then checked while it composes."""
    ConfigStore.instance().store(name="schema", node=Config)


def schema_keys(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        yield key
        if dataclasses.is_dataclass(hints[field.name]):
            yield from schema_keys(hints[field.name], key + ".")


def stray_keys(cfg: Any, cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """Keys that `+key=...` added where the schema has none; `to_object` would drop them in silence."""
    hints = typing.get_type_hints(cls)
    for key in cfg:
        hint = hints.get(str(key))
        if hint is None:
            yield f"{prefix}{key}"
        elif dataclasses.is_dataclass(hint) and OmegaConf.is_config(cfg[key]):
            yield from stray_keys(cfg[key], hint, f"{prefix}{key}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            for name, item in cfg[key].items():
                yield from stray_keys(item, typing.get_args(hint)[1], f"{prefix}{key}.{name}.")


def to_config(cfg: DictConfig) -> Config:
    """The composed tree as dataclasses, all rules checked."""
    stray = next(stray_keys(cfg), None)
    if stray:
        raise ConfigError(unknown_key(stray))
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    check_all(config)
    return config


def unknown_key(key: str) -> str:
    """The message for a key that does not exist, with its nearest neighbour."""
    key = re.sub(r"^\++", "", key)
    keys = list(schema_keys())
    leaf = key.rpartition(".")[2]
    if leaf in FILTERS:
        return (
            f"{key}: no such key, and there will be none: responses are drawn from the model's own distribution at a "
            "temperature, and log-probabilities do not model a filter on top; ppo.temperature is what can be set"
        )
    siblings = {name.rpartition(".")[2]: name for name in _siblings(key)}
    beside = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, 1)]
    near = beside if key.startswith("gate.") else []
    near = near or difflib.get_close_matches(key, keys, 1, 0.6)
    near = near or [k for k in keys if k.rpartition(".")[2] in difflib.get_close_matches(leaf, [leaf], 1)][:1]
    near = near or [k for k in keys if difflib.SequenceMatcher(None, leaf, k.rpartition(".")[2]).ratio() > 0.7][:1]
    near = near or beside
    hint = f"; did you mean {near[0]}?" if near else "; `--cfg job` lists every key"
    return f"{key}: no such key{hint}"


def _siblings(key: str) -> list[str]:
    """The keys that there are where the first unknown part of `key` stands; none inside plain mappings."""
    cls: Any = Config
    at: list[str] = []
    parts = key.split(".")
    while parts:
        hints = typing.get_type_hints(cls)
        if parts[0] not in hints:
            return [".".join([*at, name]) for name in hints]
        at.append(parts.pop(0))
        cls = hints[at[-1]]
        if typing.get_origin(cls) is dict and parts:  # a check of a gate: its name is the user's
            cls = typing.get_args(cls)[1]
            at.append(parts.pop(0))
        if not dataclasses.is_dataclass(cls):
            break
    return []


def friendly(error: BaseException) -> RLHFError | None:
    """What the user should read for an error of the composition; None if it is not one of those."""
    chain = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    for link in chain:
        if isinstance(link, RLHFError):
            return link
    override = next((m for m in map(_override_of, chain) if m), "")
    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            return ConfigError(_omegaconf_message(link, override))
    for link in chain:
        if isinstance(link, HydraException) or (isinstance(link, ValueError) and _raised_in_hydra(link)):
            return ConfigError(_hydra_message(str(link)))
    return None


def _raised_in_hydra(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and f"{os.sep}hydra{os.sep}" in frames[-1].filename


def _override_of(error: BaseException) -> str:
    """The `key` of the command line's `key=value` that an error of Hydra's merge names."""
    found = re.search(r"Error merging override ([^\s=]+)=", str(error))
    return found.group(1).lstrip("+~") if found else ""


def _omegaconf_message(error: OmegaConfBaseException, override: str) -> str:
    key = override or str(error.full_key or "")
    text = str(error).split("\n")[0]
    unknown = re.search(r"Key '(\w+)' (?:is )?not in", text)
    if "is not a subclass of CheckConfig" in text:
        return f"{key}: the policy has no such check; add one a level higher: '+gate.ppo={{degenerate: {{max: 0.1}}}}'"
    if unknown and key.startswith("gate.") and key.count(".") == 1:  # inside a check that a mapping adds
        classes = (CheckConfig, NoninferiorityConfig, TaskConfig)
        names = [field.name for cls in classes for field in dataclasses.fields(cls)]
        near = difflib.get_close_matches(unknown.group(1), names, 1)
        return f"{key}: a check has no key {unknown.group(1)!r}{f'; did you mean {near[0]}?' if near else ''}"
    if (unknown or "is not a subclass of" in text) and key not in schema_keys():
        return unknown_key(key)
    return f"{key}: {text}" if key else text


def _hydra_message(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        return unknown_key(override.group(1))
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        group, _, option = missing.group(1).rpartition("/")
        folder = Path(CONF_DIR) / group
        options = sorted(p.stem for p in folder.glob("*.yaml")) if folder.is_dir() else []
        near = difflib.get_close_matches(option, options, 1)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        return f"{group or option}: no option {option!r}; there are {', '.join(options) or 'none'}{hint}"
    return " ".join(lines)[:600]
