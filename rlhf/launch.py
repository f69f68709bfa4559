"""Start the work in a process of its own and give back its exit code. No torch.

A fresh process for each job keeps a sweep's jobs apart, keeps torch out of the composing process, and is where several
ranks will start from. Stop signals are passed on once, so that the work can checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from rlhf.config import Config
from rlhf.errors import ConfigError

PARENT_VARIABLE = "RLHF_LAUNCHER_PID"


def resolve_run_dir(cfg: Config) -> None:
    """Fix `run.dir` once, absolute, for every rank: the sweep's folder, or run.root/run.name."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode is RunMode.MULTIRUN:
        cfg.run.dir = str(Path(hydra_cfg.runtime.output_dir).resolve())
        cfg.run.name = f"{cfg.run.name}/{Path(cfg.run.dir).name}"  # as run.name, it finds this job's folder again
    else:
        cfg.run.dir = str(Path(cfg.run.dir or Path(cfg.run.root) / cfg.run.name).resolve())


def to_plain(cfg: Config) -> dict[str, Any]:
    """The configuration as JSON-able values; enums by their names."""
    plain = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> Config:
    """The inverse of `to_plain`."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    return config


def launch(cfg: Config) -> int:
    """Run the work for this configuration in a new process; its exit code, or 128 + n and a line if signal n killed it
    before it could say anything itself."""
    environment = {
        **os.environ,
        PARENT_VARIABLE: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL pings the hub otherwise
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(p for p in (_checkout(), os.environ.get("PYTHONPATH")) if p),
    }
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        spec = Path(folder) / "config.json"
        spec.write_text(json.dumps(to_plain(cfg)), encoding="utf-8")
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf.worker", str(spec)], env=environment, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"the worker process did not start: {error}") from error
        previous = {s: signal.signal(s, lambda n, _: process.send_signal(n)) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if code < 0:
        cause = ", as a machine out of memory does" if -code == signal.SIGKILL else ""
        sys.stderr.write(
            f"error: the worker process was ended by signal {-code} ({signal.strsignal(-code)}){cause}: "
            "run the same command again to go on\n"
        )
    return code if code >= 0 else 128 - code


def _checkout() -> str:
    """The folder that holds this package: the worker must run this code, whatever its start directory offers."""
    return str(Path(__file__).resolve().parent.parent)
