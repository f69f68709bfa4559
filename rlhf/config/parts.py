"""What several nodes of the configuration use: the checks' own tools, LoRA, the supervised optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlhf.errors import ConfigError


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


def require(condition: bool, key: str, message: str) -> None:
    """Raise a ConfigError that names the key unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def divides(node: Any, name: str, key: str) -> None:
    """Raise a ConfigError with the nearest number that fits unless `node.<name>` divides `node.batch`."""
    value = getattr(node, name)
    if node.batch % value:
        near = min((m for m in range(1, node.batch + 1) if node.batch % m == 0), key=lambda m: abs(m - value))
        raise ConfigError(f"{key}.{name}={value} does not divide {key}.batch={node.batch}: {key}.{name}={near} does")


@dataclass
class LoraConfig:
    enabled: bool = False
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # a name, or a list of module names

    def check(self, key: str) -> None:
        require(self.r > 0, f"{key}.r", f"must be positive, not {self.r}")


@dataclass
class OptimConfig:
    """The supervised stages' optimiser: AdamW."""

    learning_rate: float = 1e-5
    epochs: float = 1.0
    batch: int = 16  # rows (SFT), prompts (RM) per update, over all ranks
    micro_batch: int = 4  # rows per forward pass; cannot change the result
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.03  # share of all updates
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    evals: int = 4  # evaluations on the held-out rows, evenly spaced; the best is kept
    patience: int | None = None  # stop after so many evaluations without improvement
    checkpoint_every: int = 200  # updates

    def check(self, key: str) -> None:
        require(self.learning_rate >= 0, f"{key}.learning_rate", f"must not be negative, not {self.learning_rate}")
        require(self.micro_batch > 0, f"{key}.micro_batch", f"must be positive, not {self.micro_batch}")
        require(self.epochs > 0, f"{key}.epochs", f"must be positive, not {self.epochs}")
        require(self.evals > 0, f"{key}.evals", f"must be at least 1, not {self.evals}")
        require(0 <= self.warmup < 1, f"{key}.warmup", f"is a share of all updates, in [0, 1), not {self.warmup}")
        divides(self, "micro_batch", key)
