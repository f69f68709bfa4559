"""Finished quickstarts: each takes minutes, so that all tests of a session share one for a seed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import rlhf


@dataclass
class Quickstart:
    """One finished quickstart; `numbers` are gold's."""

    seed: int
    root: Path
    process: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        return self.root / "runs" / "quickstart"

    def again(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        common = (f"seed={self.seed}", f"run.root={self.root}/runs", "tracker=none")
        return rlhf(*common, *arguments, cwd=self.root)


def quickstart(made: dict[int, Quickstart], seed: int, factory: pytest.TempPathFactory) -> Quickstart:
    if seed not in made:
        root = factory.mktemp(f"seed-{seed}")
        arguments = (f"seed={seed}", f"run.root={root}/runs", "tracker=none")
        made[seed] = Quickstart(seed, root, rlhf(*arguments, cwd=root, timeout=1800))
    return made[seed]
