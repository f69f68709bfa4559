"""Where the things of a run lie: the run directory, its parents' directory, the models and the data that they read."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path
from typing import Any, TextIO

from rlhf.config import Config, stage_config
from rlhf.errors import ConfigError, LineageError
from rlhf.inputs import Inputs
from rlhf.ledger import Ledger
from rlhf.manifest import MANIFEST, STARTED, model_folder, read_manifest
from rlhf.models import pick_device
from rlhf.plugins import build
from rlhf.types import World


class RunDir:
    """One run directory, locked while it is open, and the configuration that works on it."""

    def __init__(self, cfg: Config, *, read_only: bool = False) -> None:
        self.cfg = cfg
        self.dir = Path(cfg.run.dir)
        self._lock: TextIO | None = None
        if cfg.run.parents and not (Path(cfg.run.parents) / "ledger.jsonl").is_file():
            raise ConfigError(f"run.parents: {cfg.run.parents} is not a run directory (it holds no ledger.jsonl)")
        self.anchor = _anchor(cfg, self.dir)
        if cfg.gate.waiver and not Path(cfg.gate.waiver).is_file():
            raise ConfigError(f"gate.waiver: no such file: {cfg.gate.waiver}")
        if not read_only:
            self._make_directory()
        self._ledgers: dict[Path, Ledger] = {}
        self.ledger = self._open_ledger()
        self.device = pick_device(cfg.launch)
        self.world: World | None = build(cfg.data.world, "data.world", seed=cfg.seed) if cfg.data.world else None
        self.own_rankings = cfg.data.rankings.path is not None  # given, not to be sampled from our own policy
        self._inputs: dict[str, Inputs] = {}

    def _make_directory(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            probe = self.dir / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"run.dir: {self.dir} cannot be written ({error.strerror}): choose run.root=..."
            ) from error
        self._lock = (self.dir / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LineageError(
                f"run.dir: another process is at work in {self.dir}: wait, or use run.name=..."
            ) from error

    def _open_ledger(self) -> Ledger:
        """This run's, which must be whole and fit its anchor."""
        try:
            ledger = self.ledger_of(self.dir / "sft")
            if self.anchor is not None:
                ledger.check_anchor(self.anchor)
        except LineageError:
            self._unlock()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the run directory, and keep the ledger's head where it was asked to be."""
        if self._lock is not None:
            if self.anchor is not None:
                self.ledger.write_anchor(self.anchor)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def ledger_of(self, folder: Path) -> Ledger:
        """The ledger of the run that a stage's folder lies in."""
        path = folder.parent / "ledger.jsonl"
        if path not in self._ledgers:
            self._ledgers[path] = Ledger(path)
        return self._ledgers[path]

    def folder(self, stage: str) -> Path:
        """The stage's folder: in this run, or, for a parent that this run does not have, in run.parents."""
        own = self.dir / stage
        if self.cfg.run.parents and not (own / MANIFEST).exists() and not (own / STARTED).exists():
            other = Path(self.cfg.run.parents) / stage
            if (other / MANIFEST).exists() or (stage == "world" and other.is_dir()):
                return other
        return own

    def base(self) -> Path | str:
        """The pretrained model."""
        return self.folder("world") / "base" if self.world else str(self.cfg.model.path)

    def own_base(self) -> Path | None:
        """The model that the reward model starts from, where it is not the SFT model."""
        return local_model(self.cfg.rm.base, "rm.base") if self.cfg.rm.base else None

    def model(self, stage: str) -> Path:
        """The model folder of a finished or imported stage."""
        artifact = stage_config(self.cfg, stage).artifact
        if artifact:
            return local_model(artifact, f"{stage}.artifact")
        manifest = read_manifest(self.folder(stage))
        if manifest is None:
            raise LineageError(f"{stage}: no finished artifact in {self.folder(stage)}; {mend(self.cfg, stage)}")
        return model_folder(self.folder(stage), manifest)

    def use_rankings(self) -> None:
        """Point data.rankings at the annotators' rankings, once they are there."""
        path = self.folder("rankings") / "rankings.jsonl"
        if self.world is not None and not self.own_rankings and path.exists():
            self.cfg.data.rankings.path = str(path)

    def inputs(self, stage: str, *, judged: dict[str, Any] | None = None) -> Inputs:
        """The data as the model that this stage starts from tokenizes it.

        judged: the manifest of the artifact that they are to judge. Rows are then drawn and held out as when it was
        made, so that another seed or holdout of this command offers it neither new dice nor rows that it trained on.
        """
        cfg = self.cfg
        if judged is not None:
            holdout = judged["inputs"].get("data", {}).get("rules", {}).get("holdout", cfg.data.holdout)
            if (judged["seed"], holdout) != (cfg.seed, cfg.data.holdout):
                data = dataclasses.replace(cfg.data, holdout=holdout)
                cfg = dataclasses.replace(cfg, seed=judged["seed"], data=data)
        start: Path | str = self.base()
        if stage != "sft":
            made = stage_config(self.cfg, "sft").artifact or read_manifest(self.folder("sft"))
            start = self.model("sft") if made else start
        own = self.own_base() if stage == "rm" else None
        start = own or start
        key = f"{start} {cfg.seed} {cfg.data.holdout}"
        if key not in self._inputs:
            inputs = Inputs(cfg, start, only_reads=own is not None)
            same = [i for i in self._inputs.values() if i.reads_as(inputs)]
            self._inputs[key] = same[0] if same else inputs
        return self._inputs[key]


def _anchor(cfg: Config, run_dir: Path) -> Path | None:
    if cfg.run.anchor is None:
        return None
    anchor = Path(cfg.run.anchor).resolve()
    if anchor.is_relative_to(run_dir.resolve()):
        raise ConfigError(f"run.anchor: {anchor} lies in the run directory, with which it would be replaced")
    return anchor


def local_model(path: str, key: str, revision: str | None = None) -> Path:
    """A local folder for a path or hub id; a ConfigError that names `key` if there is none."""
    if Path(path).is_dir():
        return Path(path).resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"{key}: {path} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                local_files_only=bool(os.environ.get("HF_HUB_OFFLINE")),
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"],
            )
        )
    except Exception as error:  # the hub's client raises many kinds: not found, gated, offline, timeout
        first = str(error).split("\n")[0]
        raise ConfigError(f"{key}: {path} is neither a folder nor a hub model that can be had: {first}") from error


def mend(cfg: Config, stage: str) -> str:
    """The command that makes a stage's artifact."""
    name = "" if cfg.run.name == "run" else f" run.name={cfg.run.name}"
    return f"`python -m rlhf stage={stage}{name}` makes it"
