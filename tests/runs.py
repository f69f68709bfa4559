"""Helpers for the tests that run the program as a user does: in processes of its own, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = ("tighten the belt", "change the fuse", "oil the joint", "reboot twice")
STAGES = ("sft", "rm", "ppo")
# Two updates a stage where the data allow it, two held-out evaluations, a checkpoint after every update.
TINY = (
    "experiment=own", "tracker=none", "gate.mode=observe", "launch.threads=1",
    "data.max_prompt_length=64", "data.max_length=128", "data.holdout=0.3",
    "sft.optim.batch=8", "sft.optim.micro_batch=8", "sft.optim.evals=1", "sft.optim.checkpoint_every=1",
    "rm.optim.batch=8", "rm.optim.micro_batch=8", "rm.optim.evals=1", "rm.optim.checkpoint_every=1",
    "ppo.updates=2", "ppo.batch=4", "ppo.minibatch=4", "ppo.max_new_tokens=8", "ppo.eval_prompts=4",
    "ppo.eval_every=1", "ppo.checkpoint_every=1", "gate.prompts=8",
)  # fmt: skip


def write_data(folder: Path, rows: int = 24) -> tuple[str, str]:
    """`rows` demonstrations and as many rankings; the overrides that name their files."""
    prompts = [f"my robot {i} rattles" for i in range(rows)]
    demos = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": ANSWERS[i % 4]}]}
        for i, p in enumerate(prompts)
    ]
    rankings = [{"prompt": p, "responses": list(ANSWERS[:3]), "ranks": [1, 2, 2]} for p in prompts]
    for name, lines in (("demos", demos), ("rankings", rankings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"data.demonstrations.path={folder}/demos.jsonl", f"data.rankings.path={folder}/rankings.jsonl"


def environment() -> dict[str, str]:
    """This process's environment, with the checkout importable and the network out of reach."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def rlhf(
    *arguments: str, cwd: Path, timeout: float = 600, given: str | None = None
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`python -m rlhf ...` to its end; `given` is what it reads from its standard input."""
    command = [sys.executable, "-m", "rlhf", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(), input=given, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


def words(output: str) -> str:
    """Output with every run of blanks made one, so that where a line was broken does not matter."""
    return " ".join(output.split())


def worker_of(launcher: int) -> int:
    """The process id of a launcher's worker. Linux only."""
    (child,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split()
    return int(child)


def interrupt(
    *arguments: str, cwd: Path, when: Callable[[], bool], number: int = signal.SIGKILL, timeout: float = 300
) -> int:
    """The exit code of `interrupted`."""
    return interrupted(*arguments, cwd=cwd, when=when, number=number, timeout=timeout)[0]


def interrupted(
    *arguments: str, cwd: Path, when: Callable[[], bool], number: int = signal.SIGKILL, worker: bool = False,
    timeout: float = 300,
) -> tuple[int, str]:  # fmt: skip
    """Start the program, send signal `number` to the launcher, or to the worker alone, once `when()` is true; the
    launcher's exit code and what both printed.

    Returns only when the worker has let go of the run directory too: it holds the launcher's standard output.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", *arguments], cwd=cwd, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + timeout
    while not when():
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"ended with {process.returncode} before the moment came:\n{output}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError("the moment never came")
        time.sleep(0.002)
    os.kill(worker_of(process.pid) if worker else process.pid, number)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
