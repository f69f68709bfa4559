"""The command line: every error is one line with the key and its nearest neighbour, fast, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "deepspeed", "wandb")


def rlhf(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that reports, at its end, which heavy modules it imported."""
    program = (
        "import sys, atexit, runpy\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"loaded = lambda: ' '.join(m for m in {HEAVY!r} if m in sys.modules)\n"
        "atexit.register(lambda: sys.stderr.write(f'HEAVY {loaded()}\\n'))\n"
        f"sys.argv = ['rlhf', *{list(arguments)!r}]\n"
        "runpy.run_module('rlhf', run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["ppo.upates=3"], ["ppo.upates", "did you mean ppo.updates?"]),
        (["ppo.updates=abc"], ["ppo.updates", "abc"]),
        (["stage=pppo"], ["stage", "pppo"]),
        (["+typo=1"], ["typo: no such key"]),
        (["+ppo.foo=2"], ["ppo.foo: no such key"]),
        (["+gate.ppo.toxicity.maxx=2"], ["gate.ppo.toxicity.maxx"]),
        (["gate=quickstat"], ["gate", "did you mean gate=quickstart?"]),
        (["experiment=own"], ["model.path", "is not set"]),
        (["seed=-1"], ["seed", "-1"]),
        (["ppo.minibatch=63"], ["ppo.minibatch=63", "ppo.minibatch=64 does"]),
        (["sft.optim.micro_batch=5"], ["sft.optim.micro_batch=5", "sft.optim.micro_batch=4 does"]),
        (["model.path=x"], ["model.path", "experiment=own"]),
        (["data.holdout=1.5"], ["data.holdout", "1.5"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_config_error_is_one_message_with_code_2(arguments: list[str], needles: list[str], tmp_path: Path) -> None:
    done = rlhf(*arguments, f"run.root={tmp_path}/runs")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    for needle in needles:
        assert needle in message
    assert "HEAVY \n" in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing may have started"


@pytest.mark.parametrize("argument", ["--help", "--cfg=job"])
def test_help_and_the_composed_config_import_no_torch(argument: str) -> None:
    done = rlhf(argument)
    assert done.returncode == 0
    assert "stage" in done.stdout
    assert "HEAVY \n" in done.stderr


def test_a_local_rank_argument_does_no_harm() -> None:
    assert rlhf("--local_rank=0", "--cfg=job").returncode == 0
