"""The quickstart on two ranks: the gates of one, what another engine and another launcher make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quickstart_runs import Quickstart
from runs import STAGES, environment, read_json, rlhf
from wandb_files import segments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    root = tmp_path_factory.mktemp("ranks")
    arguments = ("launch.gpus=2", "launch.threads=1", "seed=0", f"run.root={root}/runs", "tracker=none")
    return Quickstart(0, root, rlhf(*arguments, cwd=root, timeout=1800))


def test_two_ranks_pass_the_gates_of_one(made: Quickstart) -> None:
    assert made.process.returncode == 0, made.process.stdout[-3000:] + made.process.stderr
    assert [read_json(made.run / s / "verdict.json")["decision"] for s in STAGES] == ["PASS"] * 3
    assert [read_json(made.run / s / "manifest.json")["status"] for s in STAGES] == ["PROMOTED"] * 3
    assert not list(made.run.glob(".*ranks*")), "what the ranks say about themselves goes with them"
    assert made.process.stdout.count("sft: started") == 1, "one rank speaks"


def test_one_process_finds_what_two_ranks_made(made: Quickstart) -> None:
    again = made.again()
    assert again.returncode == 0, again.stderr
    assert [stage for stage in STAGES if f"{stage}: skipped" in again.stdout] == list(STAGES)


def test_sft_on_two_hosts_has_the_bits_of_two_ranks_on_one(made: Quickstart) -> None:
    """DeepSpeed's launcher on each of two loopback addresses, without ssh; the real stage and its gate."""
    hosts = made.root / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", encoding="utf-8")
    common = [
        sys.executable, "-m", "rlhf", "stage=sft", "run.name=hosts", f"run.root={made.root}/runs", "tracker=none",
        f"run.parents={made.run}", "engine=ddp", "launch.threads=1", f"launch.hostfile={hosts}",
        "launch.master_addr=127.0.0.1", "launch.master_port=29751",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [*common, f"launch.node_rank={node}"], cwd=made.root, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    left, right = (read_json(run / "sft" / "manifest.json") for run in (made.root / "runs" / "hosts", made.run))
    assert (left["digest"], left["fingerprint"]) == (right["digest"], right["fingerprint"])
    assert left["metrics"] == right["metrics"]
    assert "sft: started" in outputs[0] and "sft: started" not in outputs[1]


def test_a_sweep_on_two_ranks_has_a_folder_and_a_tracker_run_for_each_job(made: Quickstart, tmp_path: Path) -> None:
    """Jobs of 16 and 8 rows an update; one of 15, which do not divide."""
    swept = rlhf(
        "-m", "stage=sft", "run.name=sweep", f"run.root={tmp_path}", f"run.parents={made.run}", "launch.gpus=2",
        "launch.threads=1", "engine=ddp", "sft.optim.epochs=0.2", "gate=default", "gate.prompts=100",
        "gate.sft.perplexity_gain.record_only=true", "gate.sft.perplexity_gain.max=null", "sft.optim.batch=16,8,15",
        "sft.optim.micro_batch=${sft.optim.batch}", cwd=tmp_path,
    )  # fmt: skip
    assert swept.returncode == 2, swept.stdout[-3000:] + swept.stderr
    assert "sft.optim.batch=15 rows do not divide among 2 ranks: 14 or 16 do" in swept.stderr
    jobs = [tmp_path / "sweep" / job / "sft" for job in ("0", "1")]
    assert [read_json(job / "manifest.json")["inputs"]["config"]["optim"]["batch"] for job in jobs] == [16, 8]
    assert [read_json(job / "verdict.json")["decision"] for job in jobs] == ["PASS"] * 2
    assert not (tmp_path / "sweep" / "2" / "sft" / "manifest.json").exists()
    ids = [{segment.run_id for segment in segments(job)} for job in jobs]
    assert [len(found) for found in ids] == [1, 1] and ids[0] != ids[1]
    assert all(any("train/loss" in row for row in segments(job)[0].rows) for job in jobs)
