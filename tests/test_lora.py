"""LoRA: merged outputs are those of the adapter, and what is frozen stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from supervised_toys import CPU, tiny_base

from rlhf.config import LoraConfig, ModelConfig
from rlhf.errors import ConfigError
from rlhf.lora import add_lora, is_lora, merge_lora
from rlhf.models import load_policy, load_reward_model
from rlhf.scoring import score_ids

LORA = LoraConfig(enabled=True, r=2, alpha=4)


def test_merged_model_gives_the_adapters_outputs(tmp_path: Path) -> None:
    plain = load_reward_model(tiny_base(tmp_path / "base"), ModelConfig(), CPU, init_head=True)
    rows = [[2, 5, 7, 3, 6, 0], [2, 3, 0]]
    before = score_ids(plain, rows, 64)
    model = add_lora(plain, LORA, seed=0)
    assert score_ids(model, rows, 64) == before  # the up-projections start at zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "score" in name
                parameter.add_(0.05)
    adapted = score_ids(model, rows, 64)
    assert abs(adapted[0] - before[0]) > 1e-3
    merged = merge_lora(model)
    assert not is_lora(merged)
    assert score_ids(merged, rows, 64) == pytest.approx(adapted, abs=1e-5)


def test_output_layer_is_not_adapted_and_bad_targets_are_named(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base")
    model = add_lora(load_policy(folder, ModelConfig(), CPU), LORA, seed=0)
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        add_lora(load_policy(folder, ModelConfig(), CPU), LoraConfig(enabled=True, target_modules=["nothing"]), seed=0)
