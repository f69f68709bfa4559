"""Kill it, stop it, flip a byte: what is run again ends as what was never broken, and what was altered is refused."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import STAGES, TINY, digests, flip_a_byte, interrupt, interrupted, lines, read_json, rlhf, write_data

pytestmark = pytest.mark.slow
# Long enough for a signal to land between the first checkpoint and the end of each stage.
LONGER = (
    "sft.optim.epochs=60", "rm.optim.epochs=60", "sft.optim.checkpoint_every=3", "rm.optim.checkpoint_every=3",
    "sft.optim.evals=4", "rm.optim.evals=4", "ppo.updates=12", "ppo.eval_every=5", "ppo.checkpoint_every=2",
)  # fmt: skip
FAILED_GATES = {10, 11, 12}  # of a random model, looked at with gate.mode=observe


@dataclass
class Lab:
    folder: Path
    arguments: list[str]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lab:
    """A folder with an unbroken run in it, `whole`."""
    folder = tmp_path_factory.mktemp("kills")
    overrides = dict(item.split("=", 1) for item in (*TINY, *LONGER))
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    made = Lab(folder, [*arguments, f"model.path={tiny_model}", *write_data(folder), f"run.root={folder}/runs"])
    whole = rlhf(*made.arguments, "run.name=whole", cwd=folder)
    assert whole.returncode in FAILED_GATES, whole.stderr
    return made


def half_way(folder: Path) -> Callable[[], bool]:
    """True once the stage in `folder` has a sealed checkpoint to go on from, and something logged."""

    def reached() -> bool:
        sealed = any(folder.glob("checkpoints/[!.]*-*/digests.json"))
        return sealed and (folder / "metrics.jsonl").is_file() and not (folder / "manifest.json").exists()

    return reached


def logged(folder: Path) -> list[dict[str, Any]]:
    """The stage's metrics without how long things took."""
    rows = lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def same(broken: Path, whole: Path) -> None:
    """One stage of two runs ended with the same weights to the last bit, and the same record of the way there."""
    assert digests(broken / "model") == digests(whole / "model")
    factors = [path / "adapter" / "adapter_model.safetensors" for path in (broken, whole)]
    assert factors[0].exists() == factors[1].exists()
    assert not factors[0].exists() or factors[0].read_bytes() == factors[1].read_bytes()
    assert read_json(broken / "manifest.json")["digest"] == read_json(whole / "manifest.json")["digest"]
    assert logged(broken) == logged(whole)
    assert not (broken / "checkpoints").exists()


def resumed(run: Path) -> list[str]:
    return [record["stage"] for record in lines(run / "ledger.jsonl") if record["event"] == "resumed"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_killed_in_every_stage_it_ends_as_an_unbroken_run(lab: Lab, tuning: str) -> None:
    name, whole, arguments = f"killed-{tuning}", "whole", lab.arguments
    if tuning == "lora":
        whole, arguments = "whole-lora", [*arguments, "lora=r16"]
        unbroken = rlhf(*arguments, f"run.name={whole}", cwd=lab.folder)
        assert unbroken.returncode in FAILED_GATES, unbroken.stderr
        assert (lab.run(whole) / "ppo" / "adapter").is_dir()
    run = lab.run(name)
    for stage in STAGES:
        code = interrupt(*arguments, f"run.name={name}", cwd=lab.folder, when=half_way(run / stage))
        assert code == -signal.SIGKILL
        assert not (run / stage / "manifest.json").exists(), "the stage ended before it was killed"
    last = rlhf(*arguments, f"run.name={name}", cwd=lab.folder)
    assert last.returncode in FAILED_GATES, last.stderr
    assert resumed(run) == list(STAGES)
    for stage in STAGES:
        same(run / stage, lab.run(whole) / stage)


SIGNALS = [("sft", signal.SIGTERM), ("rm", signal.SIGTERM), ("ppo", signal.SIGTERM), ("ppo", signal.SIGINT)]


@pytest.mark.parametrize(("stage", "number"), SIGNALS, ids=lambda value: getattr(value, "name", value))
def test_a_stop_signal_ends_with_75_and_the_same_command_goes_on(lab: Lab, stage: str, number: int) -> None:
    name = f"stopped-{stage}-{int(number)}"
    arguments = [*lab.arguments, f"stage={stage}", f"run.name={name}", f"run.parents={lab.run('whole')}"]
    folder = lab.run(name) / stage
    assert interrupt(*arguments, cwd=lab.folder, when=half_way(folder), number=number) == 75
    assert not (folder / "manifest.json").exists()
    again = rlhf(*arguments, cwd=lab.folder)
    assert again.returncode in {0, *FAILED_GATES}, again.stderr
    assert resumed(lab.run(name)) == [stage]
    same(folder, lab.run("whole") / stage)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_the_worker_alone_killed_is_one_line_and_the_next_run_goes_on(lab: Lab) -> None:
    arguments = [*lab.arguments, "stage=sft", "run.name=worker"]
    folder = lab.run("worker") / "sft"
    code, output = interrupted(*arguments, cwd=lab.folder, when=half_way(folder), worker=True)
    assert code == 128 + signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    assert [line for line in output.splitlines() if "error" in line.lower()] == [
        "error: the worker process was ended by signal 9 (Killed), as a machine out of memory does: "
        "run the same command again to go on"
    ]
    assert "Traceback" not in output
    again = rlhf(*arguments, cwd=lab.folder)
    assert again.returncode in {0, *FAILED_GATES}, again.stderr
    assert resumed(lab.run("worker")) == ["sft"]
    same(folder, lab.run("whole") / "sft")


@pytest.mark.parametrize("moment", ["published", "sampling"])
def test_a_stop_signal_before_the_verdict_ends_with_75_and_the_same_command_judges(lab: Lab, moment: str) -> None:
    """As soon as the manifest is there, or once the gate is at work. The verdict is that of a gate without a stop."""
    longer = ["gate.k=64", "gate.max_new_tokens=48"]  # so many samples that the signal finds the gate at work
    arguments = [*lab.arguments, *longer, "stage=sft", f"run.name={moment}"]
    run = lab.run(moment)

    def reached() -> bool:
        begun = moment == "published" or not (run / "sft" / "started.json").exists()
        return begun and (run / "sft" / "manifest.json").exists()

    code, output = interrupted(*arguments, cwd=lab.folder, when=reached, number=signal.SIGTERM)
    assert code == 75, output
    assert "error: stopped by a signal" in output and "Traceback" not in output
    assert not (run / "sft" / "verdict.json").exists()
    again = rlhf(*arguments, cwd=lab.folder)
    assert again.returncode in {0, *FAILED_GATES}, again.stderr
    assert "sft: skipped" in again.stdout
    events = [record["event"] for record in lines(run / "ledger.jsonl")]
    assert (events.count("finished"), events.count("verdict")) == (1, 1)
    same(run / "sft", lab.run("whole") / "sft")
    assert not (run / "sft" / "started.json").exists()
    artifact = f"sft.artifact={lab.run('whole')}/sft/model"
    unbroken = rlhf(*lab.arguments, *longer, "do=gate", "stage=sft", "run.name=unbroken", artifact, cwd=lab.folder)
    assert unbroken.returncode == again.returncode, unbroken.stderr
    verdicts = [read_json(lab.run(name) / "sft" / "verdict.json") for name in (moment, "unbroken")]
    assert verdicts[0]["checks"] == verdicts[1]["checks"]
    assert verdicts[0]["generation"]["k"] == 64


@pytest.mark.parametrize("parent", ["sft", "rm"])
def test_a_byte_flipped_in_a_parent_is_13(lab: Lab, parent: str) -> None:
    name = f"flipped-{parent}"
    shutil.copytree(lab.run("whole"), lab.run(name))
    flip_a_byte(lab.run(name) / parent / "model" / "model.safetensors")
    before = digests(lab.run(name) / "ppo")
    refused = rlhf(*lab.arguments, "stage=ppo", f"run.name={name}", cwd=lab.folder)
    assert refused.returncode == 13, refused.stdout + refused.stderr
    assert "altered" in refused.stderr and f"{parent}/model" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert digests(lab.run(name) / "ppo") == before
