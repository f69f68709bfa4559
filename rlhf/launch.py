"""Start the work in processes of its own, one or several ranks, and give back its exit code. No torch.

Fresh processes for each job keep a sweep's jobs apart and torch out of the composing process. The configuration is
composed once and handed over as a file; where another launcher has started the ranks, each composes its own and takes
rank 0's (rlhf.worker).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from rlhf.config import Config, Do
from rlhf.errors import ConfigError
from rlhf.places import SOCKET_VARIABLE, Place, place_from
from rlhf.signals import STOP_FILE
from rlhf.supervise import kill_session, supervise

PARENT_VARIABLE = "RLHF_LAUNCHER_PID"
WORKER = "rlhf.worker"
LOOPBACK = "127.0.0.1"
STATES = ".ranks"  # in the run directory while several ranks are at work: what each says about itself


class JobFailed(Exception):
    """A sweep's job that ran in a process of a Hydra launcher's making (submitit) ended with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


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
    plain: dict[str, Any] = _plain(cfg)
    return plain


def _plain(value: Any) -> Any:
    """OmegaConf's `to_container` does the same in forty times the time, which every manifest and verdict would take."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def from_plain(plain: dict[str, Any]) -> Config:
    """The inverse of `to_plain`."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    return config


def launch(cfg: Config) -> int:
    """Run the work for this configuration in processes of its own: one, `launch.gpus` ranks, those of a host file, or
    the one rank that another launcher has started this process for. The exit code is that of `supervise`."""
    place = place_from(os.environ)
    ranked = cfg.do is Do.run  # everything else is for one process
    if place is not None:
        _check_started_by_another(cfg, place)
        if not ranked and place.rank > 0:
            return 0
    if cfg.launch.hostfile is not None and ranked:
        return _launch_hosts(cfg)
    count = cfg.launch.gpus if ranked and place is None else 1
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder, socket.create_server((LOOPBACK, 0)) as listening:
        spec = Path(folder) / "config.json"
        spec.write_text(json.dumps(to_plain(cfg)), encoding="utf-8")
        places = local_places(count, listening.getsockname()[1]) if count > 1 else [place if ranked else None]
        starts = [partial(_start, spec, at, listening.fileno(), count) for at in places]
        try:
            return supervise(starts, cfg.launch.grace_seconds)
        except OSError as error:
            raise ConfigError(f"the worker process did not start: {error}") from error
        finally:
            if count > 1:
                shutil.rmtree(Path(cfg.run.dir) / STATES, ignore_errors=True)


def local_places(count: int, port: int) -> list[Place | None]:
    """The ranks of one machine."""
    return [Place(rank=rank, size=count, local_rank=rank, address=LOOPBACK, port=port) for rank in range(count)]


def _start(spec: Path, place: Place | None, listening: int, count: int) -> subprocess.Popen[bytes]:
    """Start one rank. Rank 0 of ours inherits the open socket that the others will find it by."""
    environment = worker_environment()
    environment[PARENT_VARIABLE] = str(os.getpid())
    environment |= place.variables() if place is not None else {}
    held: tuple[int, ...] = ()
    if count > 1:
        assert place is not None
        environment["LOCAL_WORLD_SIZE"] = str(count)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
        if place.rank == 0:
            held, environment[SOCKET_VARIABLE] = (listening,), str(listening)
    command = [sys.executable, "-P", "-m", WORKER, str(spec)]
    return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=held)


def worker_environment() -> dict[str, str]:
    """This environment, with the checkout importable, without what accelerate's own launcher would set in it: the
    configuration alone says what is trained and how."""
    another = {*Place(0, 1, 0, "", 0).variables(), "SLURM_STEP_NUM_TASKS"}  # a rank gets its own variables
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_") and k not in another}
    return {
        **kept,
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL pings the hub otherwise
        "TOKENIZERS_PARALLELISM": "false",
        # Else each rank of DDP warns that it looks for unused weights, which experts need and most models do not.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "PYTHONPATH": os.pathsep.join(p for p in (_checkout(), os.environ.get("PYTHONPATH")) if p),
    }


def _check_started_by_another(cfg: Config, place: Place) -> None:
    """ConfigError for what cannot be done where another launcher has started the ranks."""
    key = next((k for k, given in (("gpus", cfg.launch.gpus > 1), ("hostfile", cfg.launch.hostfile)) if given), None)
    if key is not None:
        raise ConfigError(
            f"launch.{key}: this is rank {place.rank} of the {place.size} that another launcher has started "
            f"(RANK or SLURM_PROCID is set): leave launch.{key} out, or start without that launcher"
        )
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError(
            "-m: a sweep starts the ranks of each job itself: run it without torchrun, deepspeed, accelerate or srun, "
            "with launch.gpus=N"
        )


def _launch_hosts(cfg: Config) -> int:
    """Ranks on the machines of a host file, by DeepSpeed's launcher: over ssh from here, or, with `launch.node_rank`,
    this machine's part alone. The file with the configuration lies in the run directory, which all machines see.

    That launcher kills on a signal, so that a stop is asked for by a file beside the configuration.
    """
    at = cfg.launch
    assert at.hostfile is not None
    if not Path(at.hostfile).is_file():
        raise ConfigError(f"launch.hostfile: there is no file {at.hostfile}")
    folder = Path(cfg.run.dir) / f".launch-{platform.node()}-{os.getpid()}"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", at.hostfile]
    command += ["--no_ssh", f"--node_rank={at.node_rank}"] if at.node_rank is not None else []
    command += [f"--master_addr={at.master_addr}"] if at.master_addr else []
    command += [f"--master_port={at.master_port}", "--no_local_rank", "--module", WORKER, str(folder / "config.json")]
    environment = {**worker_environment(), "PYTHONSAFEPATH": "1"}  # as -P; names in PYTHON* are passed on over ssh
    try:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_plain(cfg)), encoding="utf-8")
        start = partial(subprocess.Popen, command, env=environment, start_new_session=True)
        return supervise(
            [start], at.grace_seconds, lambda _number, _processes: (folder / STOP_FILE).touch(), kill_session
        )
    except OSError as error:
        raise ConfigError(f"run.dir: {folder.parent} cannot be written or DeepSpeed not started: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checkout() -> str:
    """The folder that holds this package: the worker must run this code, whatever its start directory offers."""
    return str(Path(__file__).resolve().parent.parent)
