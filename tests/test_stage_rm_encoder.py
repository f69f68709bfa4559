"""A reward model on a base of its own, above all an encoder: its ids, its mask, its head, its export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import TINY, lines, read_json, rlhf, write_data
from supervised_toys import CPU, WORDS, make_config, make_context, tiny_base

from reward_models.trained import TrainedReward
from rlhf.config import Config, CriticInit, Estimator, LoraConfig, ModelConfig, RmConfig, check_all
from rlhf.encoders import check_scorer, is_encoder
from rlhf.errors import ConfigError, Preempted
from rlhf.lora import open_adapter
from rlhf.models import check_positions, load_reward_model
from rlhf.render import Renderer, load_tokenizer
from rlhf.scoring import score_ids
from stages import rm

SPECIAL = ["<s>", "<pad>", "</s>"]  # 0, 1, 2; the words w0, w1, ... follow


def tiny_encoder(folder: Path, kind: str = "bert", dropout: float = 0.0) -> Path:
    """A masked language model without a classifier (the BERT also without a pooler), and its tokenizer, which has
    neither a chat template nor an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS[4:]])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="w0"
    )
    sizes = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": None,
        "eos_token_id": None, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(BertConfig(**sizes)) if kind == "bert" else RobertaForMaskedLM(RobertaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def renderer_of(base: Path) -> Renderer:
    return Renderer(load_tokenizer(base, ModelConfig(), only_reads=True))


def setting(folder: Path, base: Path, stop_at: int | None = None, **optim: Any) -> tuple[Any, Any]:
    cfg, context = make_config(**optim), make_context(folder, base, stop_at=stop_at)
    cfg.rm.base, context.renderer = str(base), renderer_of(base)
    return cfg, context


@pytest.fixture(scope="module", params=["bert", "roberta", "bert-lora", "roberta-lora"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny_encoder(folder / "base", request.param.split("-")[0])
    cfg, context = setting(folder / "rm", base, epochs=20)
    if request.param.endswith("lora"):
        cfg.rm.lora = LoraConfig(enabled=True, r=4, alpha=8)
    return SimpleNamespace(base=base, context=context, result=rm.run(cfg, context), model=folder / "rm" / "model")


def rows_of(run: Any) -> list[list[int]]:
    renderer = Renderer(load_tokenizer(run.model, ModelConfig()))
    held = run.context.data.rankings.heldout
    return [renderer.full_ids(row.prompt.messages, text)[0] for row in held for text in row.responses]


def test_a_tokenizer_without_a_template_reads_messages_between_separators(whole: Any) -> None:
    """w1 is 4, w2 is 5, w5 is 8. What the tokenizer was given is saved with the model."""
    for renderer in (renderer_of(whole.base), Renderer(load_tokenizer(whole.model, ModelConfig()))):
        asked = [{"role": "user", "content": "w1 w2"}]
        assert renderer.prompt_ids(asked) == [0, 4, 5, 2]
        assert renderer.full_ids(asked, "w5") == ([0, 4, 5, 2, 8, 2], 4)
        assert renderer.full_ids(asked, "w5 </s> w5") == ([0, 4, 5, 2, 8, 8, 2], 4)
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(whole.base, ModelConfig())


def test_it_learns_the_order(whole: Any) -> None:
    assert whole.result.metrics["rm/accuracy"] >= 0.8


def test_padding_is_masked(whole: Any) -> None:
    """An encoder looks at what stands to the right: without a mask a row's score depends on its neighbours."""
    model, rows = load_reward_model(whole.model, ModelConfig(), CPU), rows_of(whole)
    assert is_encoder(model) and len({len(row) for row in rows}) > 2
    assert score_ids(model, rows, 1) == pytest.approx(score_ids(model, rows, 4096), abs=1e-5)


def test_export_scores_alike_through_the_plain_class(whole: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(whole.model).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(whole.model), rows_of(whole)
    with torch.no_grad():
        plain = model(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0].tolist()
    assert plain == pytest.approx(score_ids(load_reward_model(whole.model, ModelConfig(), CPU), rows, 64), abs=1e-5)
    held = [(row.prompt.messages, text) for row in whole.context.data.rankings.heldout for text in row.responses]
    reward = TrainedReward(str(whole.model))
    found = reward.score([""] * len(held), [text for _, text in held], [{"messages": m} for m, _ in held])
    assert found == pytest.approx(plain, abs=1e-5)


def test_an_adapter_opens_on_the_base_with_its_head(whole: Any) -> None:
    """The head and the pooler are the adapter's own, whatever the base's are drawn as."""
    folder = whole.context.folder / "adapter"
    if not folder.is_dir():
        pytest.skip("trained in full")
    adapter = open_adapter(load_reward_model(whole.base, ModelConfig(), CPU, init_head=True, seed=5), folder).eval()
    merged, rows = load_reward_model(whole.model, ModelConfig(), CPU), rows_of(whole)
    assert score_ids(adapter, rows, 64) == pytest.approx(score_ids(merged, rows, 64), abs=1e-5)
    trained = [name for name, p in adapter.named_parameters() if "lora_" in name or "modules_to_save" in name]
    assert all(("lora_" in name) is not any(part in name for part in ("classifier", "pooler")) for name in trained)
    assert any("lora_" in name for name in trained) and any("classifier" in name for name in trained)


def test_what_is_missing_is_drawn_once_with_the_seed_and_must_then_be_there(whole: Any) -> None:
    first, again, other = (
        load_reward_model(whole.base, ModelConfig(), CPU, init_head=True, seed=s).state_dict() for s in (1, 1, 2)
    )
    drawn = {key for key in first if not torch.equal(first[key], other[key])}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert drawn and all("classifier" in key or "pooler" in key for key in drawn)
    with pytest.raises(ConfigError, match="the weights lack"):
        load_reward_model(whole.base, ModelConfig(), CPU)


def test_a_classifier_of_other_labels_gets_a_head_of_its_own(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = tiny_encoder(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(base)
    with pytest.raises(ConfigError, match="shapes of classifier"):
        load_reward_model(base, ModelConfig(), CPU)
    assert load_reward_model(base, ModelConfig(), CPU, init_head=True).classifier.weight.shape == (1, 16)


def test_resumed_run_ends_as_the_unbroken_one_with_dropout(tmp_path: Path) -> None:
    base = tiny_encoder(tmp_path / "base", dropout=0.1)
    unbroken = rm.run(*setting(tmp_path / "a", base))
    with pytest.raises(Preempted):
        rm.run(*setting(tmp_path / "b", base, stop_at=4))
    resumed = rm.run(*setting(tmp_path / "b", base))
    assert (resumed.metrics, resumed.extra) == (unbroken.metrics, unbroken.extra)


def test_what_cannot_be_is_told_before_anything_starts(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    check_scorer(encoder, ModelConfig())
    check_scorer(tiny_base(tmp_path / "decoder"), ModelConfig())
    (tmp_path / "config.json").write_text(
        '{"model_type": "t5", "num_layers": 1, "d_model": 8, "num_heads": 1, "d_ff": 8}'
    )
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        check_scorer(tmp_path, ModelConfig())
    with pytest.raises(ConfigError, match=r"rm\.base: is what"):
        check_all(RmConfig(base="x", artifact="y"), "rm")
    cfg = Config(model=ModelConfig(path="x"))
    cfg.rm.base, cfg.data.max_prompt_length = str(encoder), 1
    with pytest.raises(ConfigError, match=r"rm\.base: .*ppo\.critic_init=policy"):
        cfg.check("")
    cfg.ppo.critic_init = CriticInit.policy
    cfg.check("")
    cfg.ppo.critic_init, cfg.ppo.estimator, cfg.ppo.group = CriticInit.reward, Estimator.rloo, 2
    cfg.check("")


def test_positions_that_the_pad_token_shifts_are_fewer(tmp_path: Path) -> None:
    """66 positions: RoBERTa's first is pad_token_id + 1 = 2, BERT's is 0."""
    bert, roberta = tiny_encoder(tmp_path / "bert"), tiny_encoder(tmp_path / "roberta", "roberta")
    check_positions(bert, ModelConfig(), 66, key="rm.base")
    check_positions(roberta, ModelConfig(), 64, key="rm.base")
    with pytest.raises(ConfigError, match="exceeds the 64 positions"):
        check_positions(roberta, ModelConfig(), 65, key="rm.base")
    ids = [[0, *[4] * 62, 2]]
    model = load_reward_model(roberta, ModelConfig(), CPU, init_head=True)
    assert len(score_ids(model, ids, 64)) == 1


@pytest.mark.slow
def test_a_whole_run_is_paid_by_an_encoder(tmp_path: Path, tiny_model: Path) -> None:
    """The tokenizer is the toy's: all other words are unknown to it, so that responses differ by their length."""
    base = tiny_encoder(tmp_path / "encoder")
    small = [o for o in TINY if not o.startswith(("data.max_prompt_length", "data.max_length"))]
    arguments = [
        *small, "data.max_prompt_length=40", "data.max_length=66", f"model.path={tiny_model}", *write_data(tmp_path),
        f"rm.base={base}", "rm.optim.learning_rate=1e-3", "ppo.critic_init=policy", f"run.root={tmp_path}/runs",
        "run.name=run",
    ]  # fmt: skip
    done = rlhf(*arguments, cwd=tmp_path)
    assert done.returncode in {10, 11, 12}, done.stderr
    run = tmp_path / "runs" / "run"
    manifest = read_json(run / "rm" / "manifest.json")
    assert set(manifest["parents"]) == {"sft", "base"}
    rows = lines(run / "ppo" / "samples.jsonl")
    reward = TrainedReward(str(run / "rm" / "model"))
    asked = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    expected = reward.score([""] * len(rows), [row["response"] for row in rows], asked)
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
    again = rlhf(*arguments, cwd=tmp_path)
    assert all(f"{stage}: skipped" in again.stdout for stage in ("sft", "rm", "ppo")), again.stdout
