"""Which rank this process is, from what torchrun, DeepSpeed, accelerate or SLURM put into the environment. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.errors import ConfigError

SOCKET_VARIABLE = "RLHF_LISTENING_SOCKET"  # in rank 0: the launcher's open socket, so that no port is lost to another
FIRST_PORT, PORTS = 20_000, 20_000  # SLURM gives no port: one by the job's number, below the ephemeral ones


@dataclass(frozen=True, slots=True)
class Place:
    """One rank of `size`, `local_rank` on its machine; rank 0 listens at address:port."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The environment that torch.distributed, accelerate and DeepSpeed read."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


def place_from(environ: Mapping[str, str]) -> Place | None:
    """This process's place, or None if nobody started it as a rank. ConfigError for half of an environment."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torch(environ)
    return _from_slurm(environ)


def _from_torch(environ: Mapping[str, str]) -> Place:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environ]
    if missing:
        given = ", ".join(name for name in names if name in environ)
        raise ConfigError(
            f"{given}: set in the environment without {', '.join(missing)}: a launcher sets all of them; "
            "unset what is left over from another program"
        )
    numbers = {name: _number(name, environ[name]) for name in names if name != "MASTER_ADDR"}
    place = Place(
        rank=numbers["RANK"], size=numbers["WORLD_SIZE"], local_rank=numbers["LOCAL_RANK"],
        address=environ["MASTER_ADDR"], port=numbers["MASTER_PORT"],
    )  # fmt: skip
    if not 0 <= place.rank < place.size:
        raise ConfigError(f"RANK={place.rank}: must be in 0 .. WORLD_SIZE - 1 = {place.size - 1}")
    return place


def _from_slurm(environ: Mapping[str, str]) -> Place | None:
    """The task of a step that `srun` started. The batch script itself has a SLURM_PROCID too, but is no rank: only srun
    sets SLURM_STEP_NUM_TASKS (https://slurm.schedmd.com/srun.html, output environment variables). The only task of a
    step is none either: it may start ranks of its own, as each job of submitit's does."""
    if not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"} <= environ.keys():
        return None
    if environ["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    job = _number("SLURM_JOB_ID", environ.get("SLURM_JOB_ID", "0"))
    step = _number("SLURM_STEP_ID", environ.get("SLURM_STEP_ID", "0"))
    return Place(
        rank=_number("SLURM_PROCID", environ["SLURM_PROCID"]),
        size=_number("SLURM_STEP_NUM_TASKS", environ["SLURM_STEP_NUM_TASKS"]),
        local_rank=_number("SLURM_LOCALID", environ["SLURM_LOCALID"]),
        address=environ.get("MASTER_ADDR") or first_host(nodes),
        port=_number("MASTER_PORT", environ.get("MASTER_PORT") or str(FIRST_PORT + (job * 16 + step) % PORTS)),
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `a[03-07,9]-ib,b` is a03-ib, `n[1-2]c[4-5]` is n1c4."""
    depth, end = 0, len(nodes)
    for at, letter in enumerate(nodes):  # a comma inside brackets does not end the first entry
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            end = at
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[:end])


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: must be a whole number; a launcher sets it") from error
