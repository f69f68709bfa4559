"""Models: what does not fit is refused by name, what is saved opens again as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from supervised_toys import CPU, make_tokenizer, tiny_base

from rlhf.config import Dtype, LaunchConfig, ModelConfig
from rlhf.errors import ConfigError, TrainingError
from rlhf.models import check_vocabulary, ensure_pad, load_policy, load_reward_model, pick_device, save_model
from rlhf.scoring import micro_batches, score_ids


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


def rewrite(folder: Path, drop: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[drop]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_named(base: Path) -> None:
    rewrite(base, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_policy(base, ModelConfig(), CPU)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj"):
        load_reward_model(base, ModelConfig(), CPU, init_head=True)


def test_missing_folder_and_misfit_shape_are_config_errors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        load_policy(tmp_path / "nowhere", ModelConfig(), CPU)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(17, 16)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        load_policy(base, ModelConfig(), CPU)


def test_dtype_is_the_configured_one_not_the_files(base: Path) -> None:
    load_policy(base, ModelConfig(), CPU).half().save_pretrained(base)
    assert load_policy(base, ModelConfig(), CPU).dtype is torch.float32
    assert load_policy(base, ModelConfig(dtype=Dtype.bfloat16), CPU).dtype is torch.bfloat16


def test_tokenizer_larger_than_the_embedding_is_refused(base: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one more"])
    with pytest.raises(ConfigError, match="17 tokens, the embedding 16 rows"):
        check_vocabulary(load_policy(base, ModelConfig(), CPU), tokenizer, base)


def test_save_refuses_weights_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    model = load_policy(base, ModelConfig(), CPU)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"lm_head\.weight"):
        save_model(model, make_tokenizer(), tmp_path / "out")


def test_save_notices_what_was_not_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_policy(base, ModelConfig(), CPU)
    write = model.save_pretrained

    def hollow(folder: Path) -> None:
        write(folder)
        rewrite(folder, "lm_head.weight")

    monkeypatch.setattr(model, "save_pretrained", hollow)
    with pytest.raises(TrainingError, match=r"lm_head\.weight"):
        save_model(model, make_tokenizer(), tmp_path / "out")


def test_pad_is_made_when_it_is_the_end_token(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base", pad="<eos>")
    model = load_reward_model(folder, ModelConfig(), CPU, init_head=True)
    tokenizer = make_tokenizer("<eos>")
    before = score_ids(model, [[2, 5, 3, 6, 0], [2, 3, 0]], 64)
    ensure_pad(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 16
    assert model.get_input_embeddings().weight.shape[0] == 17
    assert score_ids(model, [[2, 5, 3, 6, 0], [2, 3, 0]], 64) == before


def test_score_does_not_depend_on_the_batch(base: Path) -> None:
    model = load_reward_model(base, ModelConfig(), CPU, init_head=True)
    rows = [[2, *range(4, 4 + n), 3, 0] for n in (1, 7, 3, 12, 2)]
    alone = [score_ids(model, [row], 1)[0] for row in rows]
    assert score_ids(model, rows, 1000) == pytest.approx(alone, abs=1e-5)
    assert micro_batches([3, 9, 4, 14, 4], 12) == [[3], [1], [2, 4, 0]]


def test_device_that_is_not_there() -> None:
    assert pick_device(LaunchConfig(device="cpu")).type == "cpu"
    with pytest.raises(ConfigError, match=r"launch\.device"):
        pick_device(LaunchConfig(device="gpu7"))
