"""do=doctor: what is missing on this machine, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table

GIB = 1024**3
Finding = tuple[str, str, str]  # what, "ok" | "note" | "missing", what was seen and what to do


def examine(run_dir: Path) -> tuple[Table, list[str]]:
    """A table of findings, and the names of those without which nothing runs."""
    findings = [*_python(), *_packages(), *_compute(), *_disk(run_dir), *_services()]
    table = Table(title="doctor", title_justify="left")
    for column in ("what", "state", "seen"):
        table.add_column(column, overflow="fold")
    for what, state, seen in findings:
        table.add_row(what, state, seen)
    return table, [what for what, state, _ in findings if state == "missing"]


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield (
        "python",
        "ok" if good else "missing",
        f"{platform.python_version()}{'' if good else ': 3.11 or newer is needed'}",
    )


def _packages() -> Iterator[Finding]:
    """The installed versions against the ranges of this distribution."""
    try:
        wanted = importlib.metadata.requires("rlhf-pipeline") or []
    except importlib.metadata.PackageNotFoundError:
        yield "rlhf-pipeline", "note", "runs from a checkout that is not installed: versions are not checked"
        return
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield requirement.name, "missing", f"pip install '{requirement}'"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield requirement.name, "ok" if fits else "note", f"{version} (tested range: {requirement.specifier})"


def _compute() -> Iterator[Finding]:
    yield "CPU", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield "CUDA", "ok", names
        yield "bf16", "ok" if torch.cuda.is_bf16_supported() else "note", "model.dtype=bfloat16 needs it"
    else:
        yield "CUDA", "note", "no GPU: everything runs on the CPU; fine for the quickstart, slow beyond it"
    compiler = shutil.which("g++") or shutil.which("c++")
    yield "C++ compiler", "ok" if compiler else "note", compiler or "none: only optimizer offload would need one"


def _disk(run_dir: Path) -> Iterator[Finding]:
    place = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free / GIB
    yield "disk", "ok" if free > 5 else "note", f"{free:.0f} GiB free at {place}"
    writable = os.access(place, os.W_OK)
    yield "run directory", "ok" if writable else "missing", f"{place} {'can' if writable else 'cannot'} be written"


def _services() -> Iterator[Finding]:
    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    yield (
        "Hugging Face hub",
        "note" if offline else "ok",
        "HF_HUB_OFFLINE is set" if offline else "used for hub ids only",
    )
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    yield "W&B", "ok" if key else "note", "credentials found" if key else "no credentials: offline only (`wandb login`)"
