"""Negative controls on a finished quickstart: policies and a rate that are wrong in a known way must fail their gates.

Shuffled rankings, a negated reward and a deaf scorer stand in test_quickstart_run.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from quickstart_runs import Quickstart
from runs import lines, read_json

pytestmark = pytest.mark.slow
STEPS, ROWS, RATE = 60, 32, 3e-3


def teach(model_folder: Path, prompts: list[Any], answer: str, out: Path) -> Path:
    """The model, trained until it gives every prompt the same answer; a folder as a stage leaves it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.render import Renderer
    from rlhf.scoring import pad_right

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model, renderer = AutoModelForCausalLM.from_pretrained(model_folder), Renderer(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rows = [renderer.full_ids(messages, answer) for messages in prompts]
    for step in range(STEPS):
        drawn = random.Random(step).sample(rows, ROWS)
        ids_BT, lengths_B = pad_right([ids for ids, _ in drawn], renderer.pad_id, torch.device("cpu"))
        labels_BT = ids_BT.clone()
        for i, (_, start) in enumerate(drawn):
            labels_BT[i, :start] = labels_BT[i, int(lengths_B[i]) :] = -100
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("name", "answer", "kind"),
    [("refuses", "I am passing you to a human", "over_refusal"), ("silent", "", "degenerate")],
)
def test_a_policy_with_one_answer_to_everything_is_refused(
    first: Quickstart, name: str, answer: str, kind: str
) -> None:
    prompts = [row["prompt"] for row in lines(first.run / "world" / "prompts.jsonl")]
    folder = teach(first.run / "ppo" / "model", prompts, answer, first.root / name)
    judged = first.again(
        "do=gate", "stage=ppo", f"run.name={name}", f"run.parents={first.run}", f"ppo.artifact={folder}"
    )  # fmt: skip
    assert judged.returncode == 10, judged.stdout[-3000:] + judged.stderr
    checks = {check["id"]: check for check in read_json(first.root / "runs" / name / "ppo" / "verdict.json")["checks"]}
    assert checks[kind]["status"] == "FAIL" and checks[kind]["estimate"] > 0.9
    assert checks["toxicity"]["status"] == "PASS"  # it harms nobody, and that alone must not let it pass


def test_ten_times_the_learning_rate_forgets_too_much(first: Quickstart) -> None:
    broken = first.again("stage=sft", "run.name=hot", "sft.optim.learning_rate=2e-2")
    assert broken.returncode == 10, broken.stdout[-3000:] + broken.stderr
    checks = {check["id"]: check for check in read_json(first.root / "runs/hot/sft/verdict.json")["checks"]}
    assert checks["forgetting"]["status"] == "FAIL"
