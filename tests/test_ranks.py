"""What ranks do together: alone each is a no-op, and two agree on every value."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranked import exercise
from runs import environment, read_json

from rlhf.config import LaunchConfig
from rlhf.engine import ranks as module
from rlhf.engine.ranks import Ranks, choose_device, open_ranks
from rlhf.errors import ConfigError
from rlhf.places import SOCKET_VARIABLE, Place

ALONE = {
    "rank": 0, "size": 1, "main": True, "device": "cpu", "broadcast": {"from": 0}, "gather": ["of 0"],
    "any": [False, False, True], "sum": [1.0, 10.0], "found": False,
}  # fmt: skip


def test_alone_everything_is_as_given_and_no_group_is_formed(tmp_path: Path) -> None:
    with open_ranks(LaunchConfig(device="cpu"), environ={}) as ranks:
        assert not dist.is_initialized()
        assert exercise(ranks, tmp_path) == ALONE


def test_a_group_of_one_takes_a_free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed wants a process group, and its variables, for one process too."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are taken away again
        monkeypatch.delenv(name)
    with open_ranks(LaunchConfig(device="cpu"), alone=True) as ranks:
        assert dist.get_world_size() == 1
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
        assert int(os.environ["MASTER_PORT"]) > 0
        assert exercise(ranks, tmp_path) == ALONE
    assert not dist.is_initialized()


def test_a_wait_for_rank_0_outlasts_a_gate_and_one_for_a_tensor_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own limits are 30 minutes: less than a gate may take."""
    limits: dict[str, float] = {}

    def noted(name: str, given: Any = None) -> Any:
        def call(*_: Any, timeout: timedelta, **__: Any) -> Any:
            limits[name] = timeout.total_seconds()
            return given

        return call

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # so that they are put back
    for name in ("init_process_group", "new_group", "monitored_barrier"):
        monkeypatch.setattr(dist, name, noted(name))
    ranks = module._join(Place(0, 2, 0, "127.0.0.1", 29_500), torch.device("cpu"), 600.0)
    ranks.barrier()
    assert limits == {"init_process_group": 660.0, "new_group": 7 * 86_400.0, "monitored_barrier": 7 * 86_400.0}


def test_main_first_lets_the_others_go_on_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(Ranks, "barrier", lambda self: waits.append(self.rank))
    with pytest.raises(OSError, match="no network"), Ranks(rank=0, size=2).main_first():
        raise OSError("no network")
    assert waits == [0]


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    places = [Place(rank, 3, rank, "here", 1) for rank in range(3)]
    assert choose_device("auto", None) == torch.device("cuda")
    assert [choose_device("auto", place) for place in places[:2]] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert choose_device("cpu", places[0]) == torch.device("cpu")
    with pytest.raises(ConfigError, match="rank 2 has no GPU: its machine shows 2"):
        choose_device("auto", places[2])
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="rank 1 has no GPU"):
        choose_device("auto", places[1])
    monkeypatch.setenv("SLURM_PROCID", "1")  # srun --gpus-per-task=1
    assert choose_device("auto", places[1]) == torch.device("cuda:0")


@pytest.mark.slow
def test_two_ranks_agree_over_a_socket_that_was_handed_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        started = []
        for rank in (0, 1):
            place = Place(rank, 2, rank, "127.0.0.1", port).variables()
            held = {SOCKET_VARIABLE: str(listening.fileno())} if rank == 0 else {}
            command = [sys.executable, str(Path(__file__).with_name("ranked.py")), str(tmp_path)]
            started.append(subprocess.Popen(
                command, env={**environment(), **place, **held}, pass_fds=(listening.fileno(),) if rank == 0 else ()
            ))  # fmt: skip
        assert [process.wait(120) for process in started] == [0, 0]
    common = {
        "size": 2, "device": "cpu", "broadcast": {"from": 0}, "gather": ["of 0", "of 1"], "any": [False, True, True],
        "sum": [3.0, 30.0], "port": str(port),
    }  # fmt: skip
    assert read_json(tmp_path / "rank-0.json") == {"rank": 0, "main": True, "found": False, **common}
    assert read_json(tmp_path / "rank-1.json") == {"rank": 1, "main": False, "found": True, **common}
