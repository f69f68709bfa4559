"""`rlhf.load_run("runs/x")`: a run's config, metrics, verdicts and models from Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import read_json
from rlhf.config import STAGES
from rlhf.errors import ConfigError
from rlhf.manifest import CONFIG, MANIFEST, VERDICT, model_folder, read_config, read_manifest
from rlhf.tracking import read_lines


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage as it lies on disk. `metrics` are the lines of metrics.jsonl; `config` is that of the whole command as
    it trained the stage, with the gate's part as it judged it."""

    folder: Path
    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    verdict: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def model_path(self) -> Path:
        """The model folder, for `from_pretrained`."""
        if self.manifest is None:
            raise ConfigError(f"{self.folder}: the stage has not finished: there is no {MANIFEST}")
        return model_folder(self.folder, self.manifest)

    def model(self, *, trust_remote_code: bool = False) -> Any:
        """The model and its tokenizer, loaded with plain transformers.

        trust_remote_code: run code that the model folder holds. The caller says so and not the run's config.yaml, since
        a run directory may be someone else's.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        kind = AutoModelForSequenceClassification if self.folder.name == "rm" else AutoModelForCausalLM
        trust = {"trust_remote_code": trust_remote_code}
        model = kind.from_pretrained(self.model_path, dtype=torch.float32, **trust)
        return model.eval(), AutoTokenizer.from_pretrained(self.model_path, **trust)


@dataclass(frozen=True, slots=True)
class RunRecord:
    path: Path
    config: dict[str, Any]
    stages: dict[str, StageRecord]


def load_run(path: str | Path) -> RunRecord:
    """Read a run directory. Stages that have not run are there, with `manifest` None."""
    root = Path(path)
    if not (root / CONFIG).is_file():
        raise ConfigError(f"{root}: not a run directory: there is no {CONFIG}")
    return RunRecord(root, read_config(root), {s: _stage(root / s) for s in STAGES})


def _stage(folder: Path) -> StageRecord:
    verdict, metrics, samples = folder / VERDICT, folder / "metrics.jsonl", folder / "samples.jsonl"
    return StageRecord(
        folder=folder,
        config=read_config(folder) if (folder / CONFIG).exists() else None,
        manifest=read_manifest(folder),
        verdict=read_json(verdict) if verdict.exists() else None,
        metrics=read_lines(metrics) if metrics.exists() else [],
        samples=read_lines(samples) if samples.exists() else [],
    )
