"""Build what the user names by `_target_`: found, and its arguments checked against its signature, before it runs."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from rlhf.errors import ConfigError


def find(spec: Any, key: str) -> Any:
    """The class or function that `spec["_target_"]` names; a ConfigError that names `key` otherwise."""
    if not isinstance(spec, dict) or not isinstance(spec.get("_target_"), str):
        raise ConfigError(f"{key}: needs `_target_: package.module.Name`, not {spec!r}")
    path = spec["_target_"]
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"{key}._target_: {path!r} has no module: write package.module.Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}._target_: {path}: {error}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, dir(module), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}._target_: {module_name} has no {name!r}{hint}")
    return getattr(module, name)


def check_arguments(target: Any, arguments: dict[str, Any], key: str) -> None:
    """A ConfigError if `target(**arguments)` would not fit its signature."""
    signature = inspect.signature(target)
    unknown = [a for a in arguments if a not in signature.parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if unknown and not takes_any:
        near = difflib.get_close_matches(unknown[0], list(signature.parameters), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(signature.parameters) or 'none'}"
        raise ConfigError(f"{key}.{unknown[0]}: {target.__name__} has no such argument{hint}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {target.__name__}: {error}") from error


def build(spec: Any, key: str, **defaults: Any) -> Any:
    """Instantiate `spec`. `defaults` are given only where the target takes them and the spec does not."""
    target = find(spec, key)
    given = {name: value for name, value in spec.items() if name != "_target_"}
    taken = inspect.signature(target).parameters
    arguments = {**{n: v for n, v in defaults.items() if n in taken}, **given}
    check_arguments(target, arguments, key)
    return target(**arguments)
