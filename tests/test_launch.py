"""Ranks that are started by our launcher and by others: one configuration, one end, one exit code."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, TINY, environment, read_json, rlhf, write_data

from rlhf.__main__ import report
from rlhf.config import Config, Do, EngineConfig, LaunchConfig, check_all
from rlhf.errors import ConfigError
from rlhf.launch import JobFailed, launch, worker_environment

HERE = Path(__file__).parent
SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
OWN = ("engine.kind=ddp", "launch.gpus=2")
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc_per_node=2", "--standalone"),
    "deepspeed": ("deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank"),
    "deepspeed --local_rank": ("deepspeed.launcher.runner", "--num_gpus=2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=bf16"),
}


def toy_environment() -> dict[str, str]:
    made = environment()
    made["PYTHONPATH"] = os.pathsep.join((str(HERE), made["PYTHONPATH"]))
    return {name: value for name, value in made.items() if name != "OMP_NUM_THREADS"}


def command(name: str, cwd: Path, *arguments: str) -> list[str]:
    return [
        "experiment=own",
        f"model.path={cwd}",
        "launch.device=cpu",
        f"run.root={cwd}",
        f"run.name={name}",
        *arguments,
    ]


def toy(name: str, cwd: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The toy `name` to its end."""
    started = [sys.executable, "-m", "toy_main", *command(name, cwd, *arguments)]
    return subprocess.run(started, cwd=cwd, env=toy_environment(), capture_output=True, text=True, timeout=timeout)


def stopped(name: str, cwd: Path, *arguments: str, by: int = signal.SIGTERM) -> subprocess.CompletedProcess[str]:
    """The toy `name`, sent the signal `by` while it works, to its end, which has to be that of a stop."""
    started = [sys.executable, "-m", "toy_main", *command(name, cwd, *arguments)]
    process = subprocess.Popen(started, cwd=cwd, env=toy_environment(), stderr=subprocess.PIPE, text=True)
    while not (cwd / name / "going").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(by)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    return subprocess.CompletedProcess(started, process.returncode, stderr=stderr)


def errors(process: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in process.stderr.splitlines() if line.startswith("error:")]


# ---- what is refused, without a process


@pytest.mark.parametrize(
    ("launching", "says"),
    [
        (LaunchConfig(gpus=0), "launch.gpus: must be at least 1"),
        (LaunchConfig(gpus=2, hostfile="h"), "launch.gpus: is for one machine"),
        (LaunchConfig(node_rank=0), "launch.node_rank: is a line of launch.hostfile"),
        (LaunchConfig(master_addr="h"), "launch.master_addr: is for launch.hostfile"),
        (LaunchConfig(grace_seconds=-1), "launch.grace_seconds: must not be negative"),
        (LaunchConfig(hang_seconds=0), "launch.hang_seconds: must be positive or null"),
    ],
)
def test_options_that_cannot_hold_together_are_refused(launching: LaunchConfig, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_all(launching, "launch")
    assert str(raised.value).startswith(says)


@pytest.mark.parametrize(
    ("cfg", "environ", "says"),
    [
        (Config(launch=LaunchConfig(gpus=2)), SECOND, "launch.gpus: this is rank 1 of the 2 that another launcher"),
        (Config(launch=LaunchConfig(hostfile="h")), SECOND, "launch.hostfile: this is rank 1 of the 2"),
        (
            Config(engine=EngineConfig("ddp"), launch=LaunchConfig(hostfile="/no")),
            {},
            "launch.hostfile: there is no file",
        ),
    ],
)
def test_what_another_launcher_forbids(
    monkeypatch: pytest.MonkeyPatch, cfg: Config, environ: dict[str, str], says: str
) -> None:
    started_as(monkeypatch, environ)
    with pytest.raises(ConfigError) as raised:
        launch(cfg)
    assert str(raised.value).startswith(says) and report(raised.value) == 2


def started_as(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    """This process as another launcher would have started it, or as none has."""
    for name in SECOND:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_only_rank_0_does_what_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started_as(monkeypatch, SECOND)
    assert launch(Config(do=Do.gate)) == 0


@pytest.mark.parametrize(
    ("cfg", "environ", "ranks"),
    [
        (Config(launch=LaunchConfig(gpus=2)), {}, [(0, 2), (1, 2)]),
        (Config(), SECOND, [(1, 1)]),
        (Config(do=Do.gate, launch=LaunchConfig(gpus=2)), {}, [(None, 1)]),
        (Config(do=Do.gate, launch=LaunchConfig(hostfile="h")), {}, [(None, 1)]),
        (Config(do=Do.gate), {**SECOND, "RANK": "0"}, [(None, 1)]),
    ],
    ids=["ours", "another launcher's", "gpus", "hosts", "rank 0 of another launcher"],
)
def test_a_run_alone_starts_ranks(
    monkeypatch: pytest.MonkeyPatch, cfg: Config, environ: dict[str, str], ranks: list[tuple[int | None, int]]
) -> None:
    """Each process as (its rank, how many are started here); a gate that is a rank would wait for the others."""
    begun: list[tuple[int | None, int]] = []

    def starts(given: list[Any], _grace: float) -> int:
        begun.extend((place and place.rank, count) for _, place, _, count in (start.args for start in given))
        return 7

    started_as(monkeypatch, environ)
    monkeypatch.setattr("rlhf.launch.supervise", starts)
    assert launch(cfg) == 7 and begun == ranks


def test_a_worker_gets_nothing_of_another_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "1")
    made = worker_environment()
    assert not {"ACCELERATE_MIXED_PRECISION", "RANK", "SLURM_STEP_NUM_TASKS"} & made.keys()
    assert made["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_job_of_a_launcher_plug_in_brings_its_code_home() -> None:
    """From another process, as an exception that is pickled."""
    assert pickle.loads(pickle.dumps(JobFailed(11))).code == 11


# ---- real ranks


@pytest.mark.slow
def test_two_ranks_of_ours_get_one_configuration(tmp_path: Path) -> None:
    done = toy("runs", tmp_path, *OWN, "--local_rank=1", "seed=3")
    assert done.returncode == 0, done.stderr
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in ("0", "1"):
        assert read_json(tmp_path / "runs" / f"rank-{rank}.json") == {
            "stage": "runs", "root": "built by rank 0", "seed": 3, "size": 2,
            "environment": {
                "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads,
                "ACCELERATE_MIXED_PRECISION": None,
            },
        }  # fmt: skip
    assert not (tmp_path / "runs" / ".ranks").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_of_another_launcher(tmp_path: Path, launcher: str) -> None:
    """Each composes a configuration; rank 0's holds."""
    module = "-m" if launcher in ("torchrun", "accelerate") else "--module"
    arguments = command("runs", tmp_path, "engine.kind=ddp", "seed=${oc.env:RANK}")
    started = [sys.executable, "-m", *LAUNCHERS[launcher], module, "toy_main", *arguments]
    done = subprocess.run(
        started, cwd=tmp_path, env=toy_environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in ("0", "1"):
        saw = read_json(tmp_path / "runs" / f"rank-{rank}.json")
        assert (saw["seed"], saw["size"], saw["environment"]["RANK"]) == (0, 2, rank)
        assert saw["environment"]["ACCELERATE_MIXED_PRECISION"] is None


@pytest.mark.slow
def test_two_hosts_of_a_host_file(tmp_path: Path) -> None:
    """Two loopback addresses stand for two machines, each of which starts its own part."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", encoding="utf-8")
    hosts = [
        "engine.kind=ddp",
        f"launch.hostfile={tmp_path}/hosts",
        "launch.master_addr=127.0.0.1",
        "launch.master_port=29741",
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "toy_main", *command("runs", tmp_path, *hosts, f"launch.node_rank={node}")],
            cwd=tmp_path, env=toy_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    saw = [read_json(tmp_path / "runs" / f"rank-{rank}.json") for rank in (0, 1)]
    assert [(s["size"], s["environment"]["LOCAL_RANK"]) for s in saw] == [(2, "0"), (2, "0")]
    assert not list((tmp_path / "runs").glob(".launch*"))


@pytest.mark.slow
def test_a_stop_signal_ends_the_ranks_of_a_host_file_with_75(tmp_path: Path) -> None:
    """DeepSpeed's launcher gets no signal: the ranks see a file."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n", encoding="utf-8")
    hosts = ["engine.kind=ddp", f"launch.hostfile={tmp_path}/hosts", "launch.master_addr=127.0.0.1",
             "launch.master_port=29743", "launch.node_rank=0"]  # fmt: skip
    stopped("stopped", tmp_path, *hosts)
    assert not list((tmp_path / "stopped").glob(".launch*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("killed", 137, "error: rank 1 of 2 was ended by signal 9 (Killed), as a machine out of memory does: "),
        ("raises", 1, "error: the toy broke"),
        ("all-raise", 1, "error: the toy broke everywhere"),
        ("gate-fails", 10, "error: the toy is not shown safe"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_code_and_one_message(
    tmp_path: Path, name: str, code: int, message: str
) -> None:
    begun = time.monotonic()
    done = toy(name, tmp_path, *OWN)
    assert done.returncode == code, done.stderr
    assert len(errors(done)) == 1 and errors(done)[0].startswith(message), done.stderr
    assert time.monotonic() - begun < 60  # starts included; the 30 s are those of LAST_WORDS and a kill


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"), [("stopped", signal.SIGTERM), ("stopped", signal.SIGINT), ("early-stop", 15)]
)
def test_a_stop_signal_ends_all_ranks_at_the_same_update_with_75(tmp_path: Path, name: str, number: int) -> None:
    lines = errors(stopped(name, tmp_path, *OWN, by=number))
    if name == "early-stop":
        assert lines == ["error: stopped by a signal: run the same command again to go on"]
        return
    stops = [read_json(tmp_path / name / f"rank-{rank}.json")["stopped at"] for rank in (0, 1)]
    assert stops[0] == stops[1] >= 3
    assert lines == [f"error: toy: stopped and checkpointed at update {stops[0]}"]


@pytest.mark.slow
def test_a_hang_is_named_by_rank_and_phase(tmp_path: Path) -> None:
    done = toy("hangs", tmp_path, *OWN, "launch.hang_seconds=2")
    assert done.returncode == 1, done.stderr
    for rank in (0, 1):
        assert f"error: rank {rank} has not moved for" in done.stderr
        assert f"rank {rank}: in toy hangs, after 1 signs of progress" in done.stderr
    assert "toy_worker.py" in done.stderr, "where the interpreter stands"


@pytest.mark.slow
def test_a_sweep_starts_new_ranks_for_each_job_and_one_failing_job_fails_it(tmp_path: Path) -> None:
    done = toy("sweep", tmp_path, *OWN, "-m", "seed=7,8")
    assert done.returncode == 10, done.stderr
    saw = [[read_json(tmp_path / "sweep" / job / f"rank-{rank}.json") for rank in (0, 1)] for job in ("0", "1")]
    assert [[s["seed"] for s in ranks] for ranks in saw] == [[7, 7], [8, 8]]
    assert errors(done) == ["error: the toy is not shown safe"]


@pytest.mark.slow
def test_submitit_makes_a_process_for_each_job_of_a_sweep_and_keeps_its_code(tmp_path: Path, tiny_model: Path) -> None:
    """The first job's gate cannot pass eight prompts; the second's seven rows do not divide among its two ranks."""
    pytest.importorskip(
        "hydra_plugins.hydra_submitit_launcher", reason="it is not installed: pip install -e '.[slurm]'"
    )
    swept = rlhf(
        *TINY, f"model.path={tiny_model}", *write_data(tmp_path), f"run.root={tmp_path}", "run.name=sweep", "stage=sft",
        *OWN, "-m", "sft.optim.batch=8,7", "sft.optim.micro_batch=${sft.optim.batch}", "hydra/launcher=submitit_local",
        cwd=tmp_path,
    )  # fmt: skip
    decision = read_json(tmp_path / "sweep" / "0" / "sft" / "verdict.json")["decision"]
    assert swept.returncode == {"FAIL": 10, "INCONCLUSIVE": 11, "INVALID": 12}[decision], swept.stderr
    assert not (tmp_path / "sweep" / "1" / "sft").exists()
    logs = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "sweep" / ".submitit").rglob("*.err"))
    assert "sft.optim.batch=7 rows do not divide among 2 ranks: 6 or 8 do" in logs
