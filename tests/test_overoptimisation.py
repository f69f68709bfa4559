"""Over-optimisation in the quickstart's world, seed 0, as benchmarks/overoptimisation.py shows it.

The claim: paid by a reward model of 100 rankings with beta = 0, gold falls far below its peak; the alarm and the KL
budget stop the run before a tenth of what had been gained over SFT is lost; the defaults lose nothing.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from runs import ROOT, environment, read_json, rlhf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of the benchmark, on a quickstart run made here up to its reward model."""
    root = tmp_path_factory.mktemp("overoptimisation")
    for stage in ("sft", "rm"):
        made = rlhf("seed=0", f"stage={stage}", f"run.root={root}", "tracker=none", cwd=root, timeout=1800)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr
    command = [sys.executable, str(ROOT / "benchmarks" / "overoptimisation.py"), str(root / "quickstart")]
    command += ["--out", str(root / "out")]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = read_json(root / "out" / "overoptimisation.json")
    for name in ("free", "defaults"):
        found[name]["curve"] = {int(step): row for step, row in found[name]["curve"].items()}
    return found


def lost(curve: dict[int, Any], step: int) -> float:
    """Share of the gain over SFT at the highest point up to `step` that is lost at `step`."""
    peak = max(row["gold"] for at, row in curve.items() if at <= step)
    return float((peak - curve[step]["gold"]) / (peak - curve[0]["gold"]))


def test_without_a_brake_the_proxy_rises_and_gold_falls(result: dict[str, Any]) -> None:
    curve = result["free"]["curve"]
    peak, last = max(curve, key=lambda step: curve[step]["gold"]), max(curve)
    assert 0 < peak < last
    assert curve[last]["proxy"] > curve[peak]["proxy"] > curve[0]["proxy"]
    assert curve[last]["gold_high"] < curve[peak]["gold_low"]
    assert max(lost(curve, step) for step in curve if step > peak) > 0.5


def test_the_alarm_and_the_budget_stop_before_a_tenth_of_the_gain_is_lost(result: dict[str, Any]) -> None:
    curve, watched = result["free"]["curve"], result["watched"]
    assert watched["reason"] in {"over_optimisation", "kl_budget"}
    assert watched["stop"] < max(curve)
    assert lost(curve, watched["stop"]) <= 0.1, (watched, curve[watched["stop"]]["gold"])
    assert lost(curve, watched["kept"]) <= 0.1, (watched, curve[watched["kept"]]["gold"])


def test_with_the_defaults_gold_does_not_fall(result: dict[str, Any]) -> None:
    curve = result["defaults"]["curve"]
    last, peak = max(curve), max(curve, key=lambda step: curve[step]["gold"])
    assert curve[last]["gold_high"] >= curve[peak]["gold"]
    assert lost(curve, last) <= 0.1
