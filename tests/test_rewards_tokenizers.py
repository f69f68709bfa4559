"""A policy and a reward model of different kinds meet in text alone; a saved reward model is the one that trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_tiny import config, context
from runs import environment, lines
from supervised_toys import CPU, make_config, make_context, make_tokenizer, tiny_base

from reward_models.trained import TrainedReward
from rlhf.config import LoraConfig, ModelConfig
from rlhf.models import load_reward_model, save_model
from rlhf.render import Renderer
from rlhf.scoring import score_ids
from stages import ppo, rm

REWARD = {"_target_": "reward_models.trained.TrainedReward"}


def of_words(folder: Path, tiny_model: Path) -> Callable[[str, str], str]:
    """One token a word, pad == eos, the template of supervised_toys."""
    base = tiny_base(folder / "base", pad="<eos>")
    model = load_reward_model(base, ModelConfig(), CPU, init_head=True, seed=3)
    save_model(model, make_tokenizer("<eos>"), folder / "rm")
    return lambda prompt, response: f"<user> {prompt} <bot> {response} <eos>"


def of_bytes_with_bos(folder: Path, tiny_model: Path) -> Callable[[str, str], str]:
    """The policy's bytes, but every text begins with a token of its own and the template writes words."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' / ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    model = load_reward_model(tiny_model, ModelConfig(), CPU, init_head=True, seed=3)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    save_model(model, tokenizer, folder / "rm")
    return lambda prompt, response: f"<|bos|>user: {prompt} / assistant: {response} / <|end|>"


@pytest.mark.parametrize("made", [of_words, of_bytes_with_bos])
def test_ppo_reads_the_scores_that_the_reward_model_gives_alone(made: Any, tmp_path: Path, tiny_model: Path) -> None:
    """Each text written out by hand, through the reward model's tokenizer and forward pass, read at its last token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    written = made(tmp_path, tiny_model)
    cfg = config(updates=2, eval_every=1, eval_prompts=4)
    cfg.reward = REWARD
    given = context(tmp_path / "ppo", tiny_model)
    given.parents["rm"] = tmp_path / "rm"
    ppo.run(cfg, given)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert tokenizer.get_vocab() != given.renderer.tokenizer.get_vocab()
    rows = lines(tmp_path / "ppo" / "samples.jsonl")
    assert len(rows) == 12 and len({row["reward"] for row in rows}) > 2
    for row in rows:
        ids = tokenizer(written(row["prompt"], row["response"]), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            alone = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        assert row["reward"] == pytest.approx(float(alone), abs=1e-5), row


# Opens what its arguments name as a user would, scores the rows, and prints what was missing and the scores.
FRESH = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Model, AutoTokenizer
rows, folders, base = json.loads(sys.argv[1]), sys.argv[2:-1], sys.argv[-1]
found = []
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder + "/model")
    model, info = Model.from_pretrained(folder + "/model", output_loading_info=True)
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(**batch).logits[:, 0].tolist()
    found.append([sorted(info["missing_keys"]), [tokenizer.pad_token_id, tokenizer.eos_token_id], scores])
from peft import PeftModel
start = Model.from_pretrained(base, num_labels=1)
start.config.pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(start, folders[-1] + "/adapter").eval()
with torch.no_grad():
    found.append([[], [], [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in rows]])
print("FOUND" + json.dumps(found))
"""


@pytest.mark.slow
def test_a_fresh_process_scores_as_the_model_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, merged LoRA and the adapter on its base; the base's pad token is its end token, which the export mends."""
    base = tiny_base(tmp_path / "base", pad="<eos>")
    rows = [[2, 5, 3, 6, 0], [2, 4, 5, 6, 7, 3, 8, 9, 0], [2, 5, 3, 0]]
    live: list[list[float]] = []

    def note(model: Any, *arguments: Any, **options: Any) -> None:
        live.append(score_ids(model, rows, 64))
        save_model(model, *arguments, **options)

    monkeypatch.setattr(rm, "save_model", note)
    for name, lora in (("full", False), ("lora", True)):
        cfg = make_config(epochs=1, evals=1)
        cfg.rm.lora = LoraConfig(enabled=lora, r=2, alpha=4)
        rm.run(cfg, make_context(tmp_path / name, base, pad="<eos>"))
    folders = [str(tmp_path / name) for name in ("full", "lora")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(rows), *folders, str(base)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full, merged, adapter = json.loads(done.stdout.split("FOUND")[1])
    for (missing, (pad, end), scores), expected in zip((full, merged), live, strict=True):
        assert missing == [] and pad not in (None, end)
        assert scores == pytest.approx(expected, abs=1e-6)
    assert adapter[2] == pytest.approx(live[1], abs=1e-6)
    untrained = score_ids(load_reward_model(base, ModelConfig(), CPU, init_head=True), rows, 64)
    assert max(abs(a - b) for a, b in zip(untrained, live[1], strict=True)) > 1e-3, "trained, not as it was drawn"
    assert TrainedReward(f"{folders[0]}/model", device="cpu").renderer.eos_id == Renderer(make_tokenizer()).eos_id
