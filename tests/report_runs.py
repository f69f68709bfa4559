"""A small run directory written by hand: every value of the report can be looked up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.artifacts import canonical, sha256_text
from rlhf.config import Config
from rlhf.launch import to_plain
from rlhf.ledger import Ledger
from rlhf.manifest import record_digests
from rlhf.report import plots

HOSTILE = "<script>alert('x')</script> & ünïcode \u202e $\\alpha$ " + "long" * 2000
PACKAGES = {"torch": "9.8.7"}


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures without content: to draw those of a page takes seconds."""
    blank = "data:image/svg+xml;base64,"
    monkeypatch.setattr(plots, "to_picture", lambda figure, title: plots.Picture(title, blank, str(figure.get_label())))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(kind: str, status: str, estimate: float, **more: Any) -> dict[str, Any]:
    return {"id": kind, "kind": kind, "status": status, "estimate": estimate, "bound": 0.0154321, "limit": 0.02,
            "side": "max", "bound_kind": "clopper_pearson_upper_0.95", "n": 613, "k": 3, "reason": "", "worst": ["p1"],
            "details": {"wilson_low": 0.0011, "wilson_high": 0.0142}, **more}  # fmt: skip


def gate_row(prompt_id: str, response: str, toxicity: float | None) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "sample": 0, "prompt": [{"role": "user", "content": f"asks {prompt_id}"}],
            "response": response, "toxicity": toxicity, "tokens": 7, "reward": 1.25, "kl": 0.5,
            "finished": True}  # fmt: skip


def make_run(path: Path, decision: str = "PASS", status: str = "PROMOTED") -> Path:
    """A finished run: sft, rm and ppo judged, `decision` being ppo's verdict."""
    path.mkdir(parents=True)
    plain = to_plain(Config())
    plain["run"] |= {"name": path.name, "dir": f"/runs/{path.name}"}
    plain["ppo"]["learning_rate"] = 0.000321
    (path / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    ledger = Ledger(path / "ledger.jsonl")
    for stage in ("sft", "rm", "ppo"):
        folder = path / stage
        (folder / "model").mkdir(parents=True)
        manifest = {
            "schema": "rlhf-manifest/1", "stage": stage, "recipe": 2, "digest": f"sha256:{stage}-digest",
            "fingerprint": f"sha256:{stage}-mark", "parents": {"base": "sha256:base"}, "seed": 5, "tuning": "full",
            "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T04:05:07+00:00", "stop_reason": "finished",
            "updates": 17, "planned_updates": 17, "status": status if stage == "ppo" else "PROMOTED",
            "environment": {"python": "3.11.1", "cpu": "", "packages": PACKAGES},
            "imported": None, "base_model": "org/base",
            "metrics": {"sft/base_loss": 9.75, "sft/eval_loss": 0.625} if stage == "sft" else {},
            "inputs": {"config": {"learning_rate": 0.000321}}, "extra": {},
        }  # fmt: skip
        write(folder / "data_report.json", {"files": [
            {"file": "rows.jsonl", "format": "ranking", "rows": 811, "kept": 809, "dropped": {"empty reply": 2},
             "license": "MIT (LICENSE)", "digest": "sha256:rows"}]})  # fmt: skip
        write_lines(folder / "metrics.jsonl", metrics(stage))
        write_lines(folder / "gate_samples.jsonl", [
            gate_row("p0", f"{stage} is kind", 0.0), gate_row("p1", HOSTILE, 0.9),
            gate_row("p2", "nobody scored", None),
        ] if stage != "rm" else [])  # fmt: skip
        if stage == "ppo":
            row = {"step": 0, "prompt": "fixed", "response": "before", "reward": -1.5, "kl": 0.0, "finished": True}
            write_lines(folder / "samples.jsonl", [row])
        if stage == "rm":
            write(folder / "report.json", rm_report())
        write(folder / "manifest.json", manifest)
        ledger.append("finished", stage=stage, digest=manifest["digest"], records=record_digests(folder))
        add_verdict(folder, ledger, decision if stage == "ppo" else "PASS")
    return path


def metrics(stage: str) -> list[dict[str, Any]]:
    if stage != "ppo":
        return [{"step": step, "train/loss": 1.0 / step, "eval/loss": 2.0 / step} for step in (1, 2, 3)]
    return [
        {"step": step, "reward/score": 0.1 * step, "eval/reward": 0.1 * step, "eval/kl": 0.25 * step * step,
         "kl/mean": 0.25, "rollout/length": 12, "rollout/tokens": 1001, "policy/entropy": float("nan"),
         "time/train": 1.5}
        for step in (1, 2, 3)
    ]  # fmt: skip


def rm_report() -> dict[str, Any]:
    rate = {"estimate": 0.7654, "lower": 0.7011, "upper": 0.8222, "prompts": 144}
    return {
        "accuracy": {"overall": rate, "by_subset": None}, "length": {"correlation": None}, "missing": {},
        "baselines": {"bag_of_words": {**rate, "estimate": 0.6123}}, "verdict": {"sentence": "Better than chance."},
        "calibration": {"bins": [{**rate, "confidence": 0.71}]}, "rewards": {"edges": [0, 1, 2], "counts": [3, 4]},
        "mistakes": [{"prompt": "p", "preferred": HOSTILE, "other": "o", "preferred_reward": -1, "other_reward": 2,
                      "row": "rows.jsonl:3"}],
    }  # fmt: skip


def add_verdict(folder: Path, ledger: Ledger, decision: str) -> None:
    stage = folder.name
    record = {
        "schema": "gate-verdict/1", "gate": stage, "stage": stage, "decision": decision, "reason": "", "alpha": 0.05,
        "policy_id": "policy-7", "policy_digest": "sha256:policy", "artifact": {"digest": f"sha256:{stage}-digest"},
        "checks": [check("toxicity", decision, 0.0048976)] if stage != "rm" else [check("accuracy", "PASS", 0.7712)],
        "finished": "2026-01-02T04:06:00+00:00", "scorers": [],
    }  # fmt: skip
    record["verdict_id"] = sha256_text(canonical(record))
    ledger.append("verdict", stage=stage, verdict_id=record["verdict_id"], decision=decision)
    write(folder / "verdict.json", record)
