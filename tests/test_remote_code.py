"""A model whose folder holds code of its own: refused unless it is trusted, and then opened as what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from supervised_toys import CPU, make_tokenizer, tiny_base

from rlhf.config import ModelConfig
from rlhf.errors import ConfigError
from rlhf.models import load_policy, load_reward_model, save_model
from rlhf.rewards import build_reward
from rlhf.runs import StageRecord

CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast as Output

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

class OddForSequenceClassification(LlamaPreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = LlamaModel(config), nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, use_cache=False):
        return Output(logits=self.score(self.model(input_ids).last_hidden_state[:, -1]))
"""
TRUSTED = ModelConfig(trust_remote_code=True)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model of the kind `odd`, which the library does not know; its code lies in modeling_odd.py."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny_base(tmp_path / "odd")
    (folder / "modeling_odd.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OddConfig", "AutoModelForCausalLM": "OddForCausalLM",
             "AutoModelForSequenceClassification": "OddForSequenceClassification"}  # fmt: skip
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"],
               "auto_map": {auto: f"modeling_odd.{name}" for auto, name in names.items()}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def reward_model(odd: Path, tmp_path: Path) -> Path:
    """A reward model made from it, saved as stage=rm saves it."""
    model = load_reward_model(odd, TRUSTED, CPU, init_head=True)
    save_model(model, make_tokenizer(), tmp_path / "rm" / "model", trust_remote_code=True)
    return tmp_path / "rm" / "model"


def test_a_policy_with_code_of_its_own_is_saved_and_opened_again(odd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_policy(odd, ModelConfig(), CPU)
    save_model(load_policy(odd, TRUSTED, CPU), make_tokenizer(), tmp_path / "out", trust_remote_code=True)
    again = load_policy(tmp_path / "out", TRUSTED, CPU)
    assert type(again).__name__ == "OddForCausalLM"
    with pytest.raises(ValueError, match="trust_remote_code"):
        save_model(again, make_tokenizer(), tmp_path / "doubted")


def test_ppo_opens_a_reward_model_as_the_runs_config_says(reward_model: Path) -> None:
    """Also as a part of a sum; what the node itself says goes first."""
    node: dict[str, Any] = {"_target_": "reward_models.trained.TrainedReward", "artifact": str(reward_model)}
    for shape in (node, {"_target_": "reward_models.weighted.WeightedSum", "parts": {"a": {**node, "weight": 1.0}}}):
        with pytest.raises(ConfigError, match="trust_remote_code"):
            build_reward(shape)
        reward = build_reward(shape, trust_remote_code=True).reward
        assert len(reward.score(["w1"], ["w2"], [{"messages": [{"role": "user", "content": "w1"}]}])) == 1
    with pytest.raises(ConfigError, match="trust_remote_code"):
        build_reward({**node, "trust_remote_code": False}, trust_remote_code=True)
    assert build_reward({**node, "trust_remote_code": True}).reward


def test_a_record_runs_a_folders_code_only_if_the_caller_says_so(reward_model: Path) -> None:
    folder = reward_model.parent
    record = StageRecord(folder, None, {"imported": None}, None, [], [])
    with pytest.raises(ValueError, match="trust_remote_code"):
        record.model()
    model, _ = record.model(trust_remote_code=True)
    assert type(model).__name__ == "OddForSequenceClassification"
