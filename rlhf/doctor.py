"""do=doctor: what is missing on this machine, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table

from rlhf.launch import usable_cores

GIB = 1024**3
OPEN_FILES = 4096  # sockets of the ranks, shards of the weights, workers of the data
Finding = tuple[str, str, str]  # what, "ok" | "note" | "missing", what was seen and what to do


def examine(run_dir: Path) -> tuple[Table, list[str]]:
    """A table of findings, and the names of those without which nothing runs."""
    findings = [*_python(), *_packages(), *_compute(), *_several_ranks(), *_limits(), *_disk(run_dir), *_services()]
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
    yield "CPU", "ok", f"{usable_cores()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield "CUDA", "ok", names
        yield "bf16", "ok" if torch.cuda.is_bf16_supported() else "note", "model.dtype=bfloat16 needs it"
    elif torch.version.cuda is None:
        yield "CUDA", "note", "this PyTorch is built for CPUs: slow beyond the quickstart (pip install torch for GPUs)"
    else:
        yield "CUDA", "note", "no GPU is seen: look at nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"


def _several_ranks() -> Iterator[Finding]:
    """What launch.gpus, launch.hostfile and the engines need beyond one process."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    there = torch.distributed.is_available() and torch.distributed.is_backend_available(backend)
    if there and backend == "nccl":
        yield "NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    elif there:
        yield "NCCL", "note", "without a GPU ranks talk over gloo"
    else:
        yield backend, "note", f"this PyTorch lacks {backend}: one rank only (launch.gpus=1)"
    yield _imported(
        "DeepSpeed", "deepspeed", "engine=zero1, zero2, zero3 need it: pip install deepspeed, after torch",
        "pip install --no-build-isolation deepspeed builds it against the installed torch",
    )  # fmt: skip
    compiler = shutil.which("g++") or shutil.which("c++")
    yield (
        "C++ compiler",
        "ok" if compiler else "note",
        compiler or "none: DeepSpeed compiles the offloaded optimizer with it (apt install g++, or engine=zero3)",
    )
    if torch.cuda.is_available():
        yield _imported(
            "flash-attention", "flash_attn", "not installed: PyTorch's own attention is used, which is as exact",
            "does not fit this PyTorch or GPU: uninstall it, PyTorch's own attention is used then",
        )  # fmt: skip


def _imported(what: str, module: str, absent: str, broken: str) -> Finding:
    """Whether a package can be imported, tried in a process of its own: a broken one may end the process."""
    if importlib.util.find_spec(module) is None:
        return what, "note", absent
    tried = subprocess.run(
        [sys.executable, "-c", f"import {module}; print('version', {module}.__version__)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    version = re.search(r"^version (.+)$", tried.stdout, re.MULTILINE)
    if tried.returncode == 0 and version:
        return what, "ok", version.group(1)
    last = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    return what, "note", f"is installed but cannot be imported ({last}): {broken}"


def _limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= OPEN_FILES or soft == resource.RLIM_INFINITY
    seen = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    yield "open files", "ok" if enough else "note", seen if enough else f"{seen}: `ulimit -n {OPEN_FILES}` before a run"


def _disk(run_dir: Path) -> Iterator[Finding]:
    place = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    free = shutil.disk_usage(place).free / GIB
    more = "" if free > 5 else ": do=plan says what a checkpoint takes; run.root=... for another place"
    yield "disk", "ok" if free > 5 else "note", f"{free:.0f} GiB free at {place}{more}"
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
