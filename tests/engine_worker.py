"""One rank of a job that trains many toys one after the other: starting the ranks costs more than the training.

    RANK=0 WORLD_SIZE=2 ... python engine_worker.py jobs.json

jobs.json holds `Job`s as dictionaries; what became of each is written beside it by each rank, as <number>-<rank>.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEETINGS = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier")


@dataclass(kw_only=True)
class Job:
    """A toy training; `folder` is the stage's, `base` the model that it starts from."""

    stage: str
    engine: str
    folder: str
    base: str
    lora: bool = False
    rows: int = 24
    micro: int = 2
    epochs: int = 1
    stop_at: int | None = None  # the update after which a stop is asked for
    die_at: int | None = None  # the update after which rank 1 is killed
    nan_at: int | None = None  # the update in which rank 1's loss is not a number
    lose: str = ""  # a file that is lost from the newest checkpoint, whose seal is then made to fit
    learning_rate: float = 1e-3
    bf16: bool = False

    def changed(self, **changes: Any) -> Job:
        return dataclasses.replace(self, **changes)


def configured(job: Job, ranks: Any) -> tuple[Any, Any]:
    """The configuration and the context of a job."""
    from supervised_toys import make_config, make_context

    from rlhf.config import Dtype, LoraConfig

    cfg = make_config(job.engine, micro_batch=job.micro, epochs=job.epochs, learning_rate=job.learning_rate)
    stage = getattr(cfg, job.stage)
    if job.lora:
        stage.lora = LoraConfig(enabled=True, r=2, alpha=4)
    if job.bf16:
        cfg.model.dtype = Dtype.bfloat16
    context = make_context(Path(job.folder), Path(job.base), job.rows, job.stop_at, ranks=ranks)
    return cfg, context


def perform(job: Job, ranks: Any) -> dict[str, Any]:
    """Losses, gradient norms and held-out losses by update, the stage's metrics; or the error that ended it."""
    import importlib

    import rlhf.training
    from rlhf.errors import RLHFError

    rlhf.training.LOG_EVERY = 1
    cfg, context = configured(job, ranks)
    asked = context.stopping
    if job.die_at is not None:
        updates = iter(range(1, 1000))

        def stopping() -> bool:
            if next(updates) == job.die_at and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return bool(asked())

        context.stopping = stopping
    if job.lose and ranks.is_main:
        lose(Path(job.folder) / "checkpoints", job.lose)
    ranks.barrier()
    stage = importlib.import_module(f"stages.{job.stage}")
    whole, meetings = stage.Trainer.training_step, Counter[str]()
    if job.nan_at is not None:
        stage.Trainer.training_step = poisoned(stage.Trainer, job.nan_at, ranks.rank == 1)
    else:
        stage.Trainer.training_step = noting_meetings(stage.Trainer, meetings)
    try:
        result = stage.run(cfg, context)
    except RLHFError as error:
        return {"error": [type(error).__name__, str(error)]}
    finally:
        stage.Trainer.training_step = whole
    series = {name: {str(k): v for k, v in context.tracker.values(name).items()}
              for name in ("train/loss", "train/grad_norm", "eval/loss")}  # fmt: skip
    return {"metrics": result.metrics, "updates": result.updates, "meetings": meetings, **series}


def in_turn(ranks: Any, job: Job) -> dict[str, Any]:
    """`perform` as tests/two_ranks.py calls it."""
    return perform(job, ranks)


def noting_meetings(trainer: Any, found: Counter[str]) -> Any:
    """A training step, forward and backward, that counts in `found` what is asked of all ranks inside it. Gradients
    that torch's DDP sends are not seen."""
    import torch.distributed as dist

    whole = trainer.training_step

    def counting(name: str, meet: Any) -> Any:
        def met(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return meet(*args, **kwargs)

        return met

    def training_step(*args: Any, **kwargs: Any) -> Any:
        kept = {name: getattr(dist, name) for name in MEETINGS}
        for name, meet in kept.items():
            setattr(dist, name, counting(name, meet))
        try:
            found["passes"] += 1
            return whole(*args, **kwargs)
        finally:
            for name, meet in kept.items():
                setattr(dist, name, meet)

    return training_step


def poisoned(trainer: Any, update: int, here: bool) -> Any:
    """A training step whose loss on this rank is not a number in one update."""
    import math

    whole = trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if here and self.state.global_step + 1 == update:
            num_items_in_batch = num_items_in_batch * math.nan
        return whole(self, model, inputs, num_items_in_batch)

    return training_step


def lose(checkpoints: Path, pattern: str) -> None:
    """Delete a file of the newest checkpoint and seal it anew, as if it had never been written."""
    from rlhf.artifacts import latest_checkpoint, seal

    newest, _ = latest_checkpoint(checkpoints)
    assert newest is not None
    for path in newest.glob(pattern):
        path.unlink()
    seal(newest)


def run_jobs(folder: Path, jobs: Sequence[Job], ranks: int = 2, timeout: float = 300) -> list[list[dict[str, Any]]]:
    """What every rank said about every job; empty for what a rank did not live to say."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "jobs.json"
    spec.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")) if p)
    common = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}  # fmt: skip
    logs = [(folder / f"rank{rank}.log").open("w", encoding="utf-8") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(spec)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank], stderr=subprocess.STDOUT,
        ) for rank in range(ranks)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    if any(codes) and not any(job.die_at for job in jobs):
        ends = [(folder / f"rank{rank}.log").read_text(encoding="utf-8")[-3000:] for rank in range(ranks)]
        raise AssertionError(f"the ranks ended with {codes}:\n" + "\n---\n".join(ends))
    files = [[folder / f"{number}-{rank}.json" for rank in range(ranks)] for number in range(len(jobs))]
    return [[json.loads(f.read_text(encoding="utf-8")) if f.exists() else {} for f in row] for row in files]


def main() -> None:
    from rlhf.config import LaunchConfig
    from rlhf.engine.ranks import open_ranks

    spec = Path(sys.argv[1])
    jobs = [Job(**job) for job in json.loads(spec.read_text(encoding="utf-8"))]
    with open_ranks(LaunchConfig(device="cpu", hang_seconds=120)) as ranks:
        for number, job in enumerate(jobs):
            said = perform(job, ranks)
            (spec.parent / f"{number}-{ranks.rank}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
