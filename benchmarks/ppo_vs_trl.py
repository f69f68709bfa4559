"""PPO here against the last PPOTrainer that TRL shipped (1.12), on the CPU: seconds an update and peak memory.

    pip install --no-deps --target /some/folder trl==1.12.0
    python benchmarks/ppo_vs_trl.py --trl /some/folder --model POCKET --prompts hh.jsonl.gz [--lora]

What makes it fair:
- Two processes, each with its models loaded, make their updates in turn (ours, TRL, ours, ...), so that what else the
  machine does hits both. While one works the other waits for a line. The first update of each is not counted.
- The same prompts in the same order, and the same responses: what the starting policy sampled once is put in the place
  of the tokens that either system draws, after it has drawn them. The lengths are those of real end tokens. (A table of
  lengths alone would need the logits changed, and with them the log-probabilities that both train on.)
- Both: full fine-tuning (or LoRA of the same rank on the same layers), fp32, batch and minibatch 32, 2 epochs, fused
  AdamW, one reward model of the policy's shape, a critic that starts from it, no gradient clipping, no recomputation.
- TRL runs with the chunk (local_rollout_forward_batch_size) and batch (per_device_train_batch_size) in BEST; --search
  times others, and what is fastest depends on the machine. Nothing is logged or saved. Ours runs the stage's own loop,
  metrics file and re-tokenised rewards included.
- Before any timing one update of each is compared: log-probabilities, reference, values and, on the fixed lengths,
  where the two define them alike, advantages and both losses. (TRL pays the score one token after the end, and its
  means are taken per micro-batch; on responses without an end neither matters.)
- On a busy machine use --threads 1 and read the CPU seconds: two OpenMP threads spin while they wait for each other,
  and beside other work an update takes many times as long.
- Memory is the high-water mark of the process less what it held when all imports were done. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from frozen import Workload, prepare
from process import BATCH, Settings

from rlhf.scoring import micro_batches

HERE = Path(__file__).resolve().parent
# TRL's (chunk, micro-batch): long padded rows want small ones. Run --search on your machine before you rely on them.
BEST = {"cap64": (16, 8), "cap256": (32, 4), "cap384": (32, 4), "fixed": (32, 8)}
# Ours: padded tokens of a pass. More is faster and takes more memory; rows of one length gain the most.
MICRO_TOKENS = {"cap64": 512, "cap256": 512, "cap384": 512, "fixed": 1024}
SEARCH = [(32, 16), (32, 8), (16, 8), (32, 4), (16, 4), (8, 4), (32, 2)]
HEADER = (
    "| workload | ours s | TRL s | TRL / ours (spread) | the same of CPU seconds | ours MB | TRL MB | ours / TRL "
    "| pad ours | pad TRL | ours generate / score / train | TRL |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
Laps = dict[str, float]


class Worker:
    """A process that makes one update a command."""

    def __init__(self, system: str, settings: Settings) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"{system}_worker.py"), settings.dump()], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def update(self) -> Laps:
        self._read()  # ready
        self._tell("go")
        return self._read()

    def stop(self) -> None:
        self._read()
        self._tell("stop")
        self.process.wait()

    def finish(self) -> None:
        """Wait for a process that takes no commands."""
        if self.process.wait() != 0:
            self._fail()

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._fail()

    def _fail(self) -> None:
        self.process.wait()
        self.log.seek(0)
        raise SystemExit(f"a worker failed:\n{self.log.read()[-3000:]}")


def compare(settings: Settings, folder: Path, work: Workload) -> None:
    """Stop unless both systems compute the same from one rollout. TRL goes first: ours is paid what its model said."""
    theirs, ours = folder / "check-trl.pt", folder / "check-ours.pt"
    Worker("trl", replace(settings, check=str(theirs))).finish()
    Worker("ours", replace(settings, check=str(ours), scores=str(theirs))).finish()
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    names = ["logp", "reference", "values", *(["advantages"] if work.fixed else [])]
    limits = {"advantages": 5e-3}  # TRL divides the variance by N - 1
    for name in names:
        gap = max(float((x - y).abs().max()) for x, y in zip(a[name], b[name], strict=True))
        _report_gap(name, gap, limits.get(name, 1e-3))
    if work.fixed and not settings.lora:  # adapters start from different random factors, so the second epoch differs
        for name, x, y in zip(("policy loss", "value loss"), a["losses"], b["losses"], strict=True):
            print(f"    {name}: ours {x:.6f}, TRL {y:.6f}")
            _report_gap(name, abs(x - y), 1e-3 * max(1.0, abs(y)))


def _report_gap(name: str, gap: float, limit: float) -> None:
    print(f"    {name}: largest difference {gap:.2g} (allowed {limit:g})")
    if not gap <= limit:
        raise SystemExit(f"{name}: the two systems do not compute the same")


def padding(work: Workload, batch: int, micro_tokens: int) -> tuple[float, float]:
    """Padded tokens of a training pass over real ones, ours and TRL's, in batch number `batch`."""
    rows = [(batch * BATCH + i) % len(work.prompts) for i in range(BATCH)]
    prompts, responses = [len(work.prompts[i]) for i in rows], [len(work.responses[i]) for i in rows]
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    ours = sum(lengths[cut[0]] * len(cut) for cut in micro_batches(lengths, micro_tokens))
    return ours / sum(lengths), BATCH * (max(prompts) + max(responses)) / sum(lengths)


def in_turn(settings: Settings, updates: int) -> tuple[list[Laps], list[Laps]]:
    """`updates` counted updates of each system, one after the other, after one that is not counted."""
    workers = Worker("ours", settings), Worker("trl", settings)
    laps: tuple[list[Laps], list[Laps]] = [], []
    for _ in range(updates + 1):
        for worker, into in zip(workers, laps, strict=True):
            into.append(worker.update())
    for worker in workers:
        worker.stop()
    return laps[0][1:], laps[1][1:]


def show(work: Workload, settings: Settings, ours: Sequence[Laps], theirs: Sequence[Laps]) -> None:
    """One line of the table, then the split of both."""
    seconds = [statistics.median(lap["seconds"] for lap in laps) for laps in (ours, theirs)]
    peaks = [max(lap["peak"] for lap in laps) for laps in (ours, theirs)]
    pads = [padding(work, i + 1, settings.micro_tokens) for i in range(len(ours))]
    pad = [statistics.median(p[i] for p in pads) for i in (0, 1)]
    print(
        f"| {work.name} | {seconds[0]:.2f} | {seconds[1]:.2f} "
        f"| {ratio(ours, theirs, 'seconds')} | {ratio(ours, theirs, 'cpu')} "
        f"| {peaks[0] / 1e6:.0f} | {peaks[1] / 1e6:.0f} | "
        f"**{peaks[0] / peaks[1]:.2f}** | {pad[0]:.2f} | {pad[1]:.2f} | "
        + " | ".join(
            " / ".join(f"{statistics.median(lap[part] for lap in laps):.2f}" for part in ("generate", "score", "train"))
            for laps in (ours, theirs)
        )
        + " |",
        flush=True,
    )


def ratio(ours: Sequence[Laps], theirs: Sequence[Laps], clock: str) -> str:
    """TRL's median over ours, and the extremes of the single updates' ratios."""
    each = [b[clock] / a[clock] for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(b[clock] for b in theirs) / statistics.median(a[clock] for a in ours)
    return f"**{middle:.2f}** ({min(each):.2f}–{max(each):.2f})"


def search(settings: Settings) -> None:
    """The seconds of one warm TRL update for each chunk and micro-batch."""
    for chunk, micro_batch in SEARCH:
        worker = Worker("trl", replace(settings, chunk=chunk, micro_batch=micro_batch))
        laps = [worker.update() for _ in range(2)][-1]
        worker.stop()
        print(f"    chunk {chunk}, micro-batch {micro_batch}: {laps['seconds']:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True, help="folder that TRL 1.12.0 was installed into")
    parser.add_argument("--model", type=Path, required=True, help="a small causal LM with a chat template")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="HH files, .jsonl or .jsonl.gz")
    parser.add_argument("--workloads", nargs="+", default=list(BEST), choices=list(BEST))
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-tokens", type=int, help="ours: padded tokens of one pass; default: MICRO_TOKENS")
    parser.add_argument("--lora", action="store_true", help="LoRA in both")
    parser.add_argument("--search", action="store_true", help="only time TRL's chunk and batch sizes")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison of what is computed")
    parser.add_argument("--work", type=Path, help="folder for models and workloads, kept; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        paths = {name: folder / f"{name}.json" for name in BEST}
        if not all(path.is_file() for path in paths.values()):
            paths = prepare(args.model, args.prompts, folder, [64, 256, 384])
        if not (args.search or args.no_check):
            for name in ("fixed", "cap64"):
                print(f"check on {name}:", flush=True)
                settings = Settings(workload=str(paths[name]), threads=args.threads, trl=args.trl, lora=args.lora)
                compare(settings, folder, Workload.load(paths[name]))
        if not args.search:
            print(HEADER, flush=True)
        for name in args.workloads:
            chunk, micro_batch = BEST[name]
            settings = Settings(
                workload=str(paths[name]), threads=args.threads, trl=args.trl, lora=args.lora,
                chunk=chunk, micro_batch=micro_batch, micro_tokens=args.micro_tokens or MICRO_TOKENS[name],
            )  # fmt: skip
            if args.search:
                print(f"{name}:")
                search(settings)
            else:
                show(Workload.load(paths[name]), settings, *in_turn(settings, args.updates))


if __name__ == "__main__":
    main()
