"""RLHF as one gated pipeline: supervised fine-tuning, a reward model from rankings, PPO.

This package imports nothing heavy by itself; `load_run` loads what it needs when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf.runs import RunRecord

__version__ = "0.1.0"
__all__ = ["load_run"]


def load_run(path: str | Path) -> RunRecord:
    """A run's config, metrics, verdicts and models: see `rlhf.runs.RunRecord`."""
    from rlhf.runs import load_run as load

    return load(path)
