"""The GPU benchmark runs where only torch, transformers and peft are; on toy shapes, since no test measures time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from supervised_toys import tiny_base

ROOT = Path(__file__).resolve().parent.parent
BLOCK = """
import runpy, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = {"trl", "datasets", "deepspeed", "hydra", "omegaconf", "wandb"}
def find_spec(*given):
    name = given[0] if isinstance(given[0], str) else given[1]
    return None if name.split(".")[0] in absent else find(name, *given[given.index(name) + 1 :])
PathFinder.find_spec = find_spec
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that cannot import the heavier libraries."""
    return subprocess.run([sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_rollout_losses_and_models_import_without_the_heavy_libraries() -> None:
    modules = (
        "rlhf.rollout, rlhf.losses, rlhf.advantages, rlhf.models, rlhf.ppo.update, rlhf.ppo.episodes, rlhf.ppo.roles"
    )
    done = alone(f"import {modules}\nfrom rlhf.rollout import generate\n")
    assert done.returncode == 0, done.stderr
    assert alone("import hydra").returncode != 0  # the block holds


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--lora"]], ids=["full", "lora"])
def test_gpu_benchmark_on_toy_shapes(extra: list[str]) -> None:
    argv = ["gpu.py", "--tiny", "--device", "cpu", "--batch", "4", "--updates", "1", *extra]
    done = alone(f"sys.argv = {argv!r}\nrunpy.run_path('benchmarks/gpu.py', run_name='__main__')\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["system"] == ("lora" if extra else "full")
    assert found["peak_bytes"] is None
    parts = [found[f"{name}_seconds"] for name in ("generate", "score", "train")]
    assert found["pairs_per_second"] == pytest.approx(4 / sum(parts))


@pytest.mark.slow
def test_reward_model_benchmark_on_toy_shapes(tmp_path: Path) -> None:
    """It ends only if the first update's loss is TRL's."""
    argv = ["--model", str(tiny_base(tmp_path)), "--k", "3", "--prompts", "2", "--updates", "1", "--pairs", "4"]
    done = subprocess.run(
        [sys.executable, "benchmarks/rm_vs_trl.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| 3 | ")
