"""What both worker processes share: commands on standard input, one JSON line back for each, memory, settings."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCH, EPOCHS = 32, 2
LEARNING_RATE = 1e-6
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(kw_only=True, slots=True)
class Settings:
    """How one system is run. `check` names a file: one update at a higher rate, and what it computed goes there."""

    workload: str
    threads: int
    micro_tokens: int = 512  # ours: padded tokens of a forward and backward pass
    chunk: int = 32  # TRL: local_rollout_forward_batch_size
    micro_batch: int = 8  # TRL: per_device_train_batch_size
    lora: bool = False
    trl: str = ""
    check: str = ""
    scores: str = ""  # ours: a file that `check` of the other system wrote; its scores are paid instead of our own

    @property
    def learning_rate(self) -> float:
        return 1e-4 if self.check else LEARNING_RATE

    def dump(self) -> str:
        return json.dumps(asdict(self))


class Channel:
    """The parent's end of a worker. Whatever else the libraries print goes to standard error."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.floor, self.worked = 0, 0.0

    def imported(self) -> None:
        """Call when everything is imported and nothing loaded: memory is counted from here."""
        self.floor = memory("VmRSS")

    def wait(self) -> bool:
        """Tell the parent that an update can begin, and wait until it says so. False: enough."""
        self.say({"ready": True})
        go = sys.stdin.readline().strip() == "go"
        self.worked = time.process_time()
        return go

    def say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.out, flush=True)

    def report(self, laps: dict[str, float]) -> None:
        """Wall and CPU seconds of one update, and the peak of memory so far in bytes above the floor."""
        self.say(
            laps | {"cpu": time.process_time() - self.worked, "peak": memory("VmHWM") - self.floor, "floor": self.floor}
        )


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest. Linux."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
