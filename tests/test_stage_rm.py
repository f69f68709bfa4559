"""The reward model: its loss by the definition, resume, export, accuracy and scale."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from supervised_toys import CPU, make_config, make_context, tiny_base

from reward_models.trained import TrainedReward
from rlhf.config import LoraConfig, ModelConfig, RmLoss, Ties
from rlhf.errors import ConfigError, DataError, Preempted
from rlhf.models import load_reward_model
from rlhf.ranking_loss import RankingLoss
from rlhf.render import Renderer, load_tokenizer
from rlhf.scoring import score_ids
from rlhf.statistics import clopper_pearson_lower
from stages import rm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_reward_model(folder / "model", ModelConfig(), CPU).state_dict()
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An unbroken run that learns the toy, on a model whose pad token is its end token."""
    folder = tmp_path_factory.mktemp("whole")
    start = tiny_base(folder / "start", pad="<eos>")
    context = make_context(folder, start, pad="<eos>")
    return SimpleNamespace(context=context, result=rm.run(make_config(epochs=20), context))


def test_learns_the_order_and_reports_the_interval(whole: Any) -> None:
    metrics = whole.result.metrics
    assert metrics["rm/accuracy"] >= 0.9
    assert metrics["rm/prompts"] == 8  # one pair from each held-out prompt
    right = round(metrics["rm/one_pair_accuracy"] * 8)
    assert metrics["rm/one_pair_lower"] == pytest.approx(clopper_pearson_lower(right, 8, 0.025))
    assert metrics["rm/one_pair_lower"] < metrics["rm/one_pair_accuracy"] <= metrics["rm/one_pair_upper"]


def test_export_scores_alike_through_the_plain_class(whole: Any) -> None:
    """pad == eos in the SFT model: exported as it is, a padded row would be read one token early."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = whole.context.folder / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [ids for row in whole.context.data.rankings.heldout for ids in
            [Renderer(tokenizer).full_ids(row.prompt.messages, text)[0] for text in row.responses]]  # fmt: skip
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        plain = model(**padded).logits[:, 0].tolist()
    ours = score_ids(load_reward_model(folder, ModelConfig(), CPU), rows, 64)
    assert plain == pytest.approx(ours, abs=1e-6)
    assert len({len(row) for row in rows}) > 2


def test_trained_reward_scores_text_as_training_did(whole: Any) -> None:
    context = whole.context
    reward = TrainedReward(str(context.folder / "model"), micro_tokens=40)
    held = context.data.rankings.heldout
    renderer = Renderer(load_tokenizer(context.folder / "model", ModelConfig()))
    rows = rm.render(held, renderer, RankingLoss(held))
    expected = [value for row in rm.rewards(reward.model, rows) for value in row]
    flat = [(row.prompt.messages, text) for row in held for text in row.responses]
    found = reward.score(["ignored"] * len(flat), [text for _, text in flat], [{"messages": m} for m, _ in flat])
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_scale_is_that_of_held_out_demonstrations(whole: Any) -> None:
    reward = TrainedReward(str(whole.context.folder / "model"))
    held = whole.context.data.demonstrations.heldout
    found = torch.tensor(
        reward.score([""] * 8, [row.response for row in held], [{"messages": row.prompt.messages} for row in held])
    )
    extra = whole.result.extra
    scaled = (found - extra["reward_mean"]) / extra["reward_std"]
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scaled.pow(2).mean()) == pytest.approx(1, abs=1e-4)
    assert extra["normalised_on"] == "held-out demonstrations"


@pytest.mark.parametrize(("kind", "loss"), [("llama", "pairs"), ("gpt2", "pairs"), ("llama", "plackett_luce")])
def test_micro_batch_cannot_change_the_update(tmp_path: Path, kind: str, loss: str) -> None:
    """The loss is a mean over prompts, not over pairs or choices: prompts here have 1, 3 and 6 pairs."""
    base = tiny_base(tmp_path / "base", kind)
    found = []
    for micro in (8, 1):
        cfg = make_config(micro_batch=micro, epochs=1, evals=1, learning_rate=1e-3)
        cfg.rm.center_coef = 0.1
        cfg.rm.loss, cfg.rm.ties = RmLoss(loss), Ties.davidson if loss == "pairs" else Ties.drop
        context = make_context(tmp_path / str(micro), base, train=8)
        context.data.rankings.train[0].weight = 3.0
        rm.run(cfg, context)
        numbers = context.tracker
        found.append((numbers.values("train/loss")[1], numbers.values("train/grad_norm")[1], weights(context.folder)))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5)
    for name, value in found[0][2].items():
        assert torch.allclose(value, found[1][2][name], atol=1e-5), name


def by_definition(context: Any, base: Path, nu: float, margin: float = 0.0) -> list[float]:
    """Each prompt's loss: each response scored alone, each pair's three probabilities written out."""
    model = load_reward_model(base, ModelConfig(), CPU, init_head=True, seed=0)
    train = context.data.rankings.train
    found = []
    for row in rm.render(train, context.renderer, RankingLoss(train)):
        r = [score_ids(model, [ids], 1)[0] for ids in row.ids]
        pairs = []
        for i in range(len(r)):
            for j in range(i + 1, len(r)):
                rank_i, rank_j = row.ranks[i], row.ranks[j]
                assert rank_i is not None and rank_j is not None
                lead = r[i] - r[j] - (margin * (row.scores[i] - row.scores[j]) if row.scores else 0)  # type: ignore[operator]
                weights = {-1: math.exp(lead / 2), 1: math.exp(-lead / 2), 0: nu}
                pairs.append(-math.log(weights[(rank_i > rank_j) - (rank_i < rank_j)] / sum(weights.values())))
        found.append(sum(pairs) / len(pairs))
    return found


def first_loss(context: Any, margin: float = 0.0) -> float:
    cfg = make_config(epochs=1, evals=1, learning_rate=0.0)
    cfg.rm.margin = margin
    rm.run(cfg, context)
    loss: float = context.tracker.values("train/loss")[1]
    return loss


def test_first_loss_is_that_of_the_definition(tmp_path: Path, base: Path) -> None:
    """The mean over pairs, then over prompts. Of 8 prompts, two have four responses, and one tie in six pairs:
    T = 2/6, S = 8 - T, so nu = 2 T / S = 2/23."""
    context = make_context(tmp_path, base, train=8)
    assert first_loss(context) == pytest.approx(sum(by_definition(context, base, nu=2 / 23)) / 8, rel=1e-5)


def test_an_annotators_weight_is_the_prompts(tmp_path: Path, base: Path) -> None:
    """5 for a prompt of two beside seven of 1: the mean weight is 12/8, S = 12 - T, and nu = 2 (2/6) / (12 - 2/6)."""
    context = make_context(tmp_path, base, train=8)
    context.data.rankings.train[0].weight = 5.0
    each = by_definition(context, base, nu=2 / 35)
    assert first_loss(context) == pytest.approx((4 * each[0] + sum(each)) / 12, rel=1e-5)


def test_scores_become_margins(tmp_path: Path, base: Path) -> None:
    context = make_context(tmp_path, base, train=8)
    with pytest.raises(DataError, match=r"rm\.margin: no training ranking has scores"):
        first_loss(context, margin=0.5)
    context.data.rankings.train[0].scores = [2.0, 0.0]  # its ranks are 1 and 2
    expected = sum(by_definition(context, base, nu=2 / 23, margin=0.5)) / 8
    assert first_loss(context, margin=0.5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("lora", "ties"), [(False, "davidson"), (True, "davidson"), (False, "drop")])
def test_resumed_run_ends_as_the_unbroken_one(tmp_path: Path, base: Path, lora: bool, ties: str) -> None:
    """The tie model's parameter too, which the manifest has from the best weights' update."""
    cfg = make_config()
    cfg.rm.lora, cfg.rm.ties = LoraConfig(enabled=lora, r=2, alpha=4), Ties(ties)
    context = make_context(tmp_path / "a", base)
    unbroken = rm.run(cfg, context)
    with pytest.raises(Preempted):
        rm.run(cfg, make_context(tmp_path / "b", base, stop_at=4))
    resumed = rm.run(cfg, make_context(tmp_path / "b", base))
    assert (resumed.metrics, resumed.extra) == (unbroken.metrics, unbroken.extra)
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    nu = context.tracker.values("eval/tie_nu")
    assert (ties == "drop") == (not nu)
    if nu:
        assert len(set(nu.values())) == 2
        found = nu[unbroken.extra["best_update"]]
        assert unbroken.extra["tie_nu"] == unbroken.metrics["rm/tie_nu"] == found
    assert lora == (tmp_path / "a" / "adapter" / "adapter_model.safetensors").exists()


def test_head_is_drawn_once_and_must_then_be_there(base: Path, whole: Any) -> None:
    first, again, other = (load_reward_model(base, ModelConfig(), CPU, init_head=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    with pytest.raises(ConfigError, match=r"lack score\.weight"):
        load_reward_model(base, ModelConfig(), CPU)
    load_reward_model(whole.context.folder / "model", ModelConfig(), CPU)


def test_the_interval_counts_a_prompt_once_whoever_ranked_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three annotators of one prompt and one of another are two observations; each is right here."""
    rows = [rm.Row(prompt=prompt, ids=[[1], [2]], ranks=[1, 2], response_lengths=[1, 1]) for prompt in "aaab"]
    monkeypatch.setattr(rm, "rewards", lambda _model, some: [[1.0, 0.0] for _ in some])
    found = rm.accuracy(None, rows, rows, 0)
    assert (found["rm/pairs"], found["rm/prompts"], found["rm/one_pair_accuracy"]) == (4, 2, 1.0)
    assert found["rm/one_pair_lower"] == pytest.approx(0.025**0.5)  # Clopper-Pearson for 2 of 2: (alpha / 2) ** (1 / n)


def test_ragged_rankings_keep_their_order_through_sorting() -> None:
    rows = [rm.Row(prompt="", ids=[[7] * n for n in sizes], ranks=[1] * len(sizes), response_lengths=list(sizes))
            for sizes in ((5, 1), (2, 4, 3))]  # fmt: skip
    batch = rm.collate(rows, RankingLoss(rows), micro_tokens=8)
    lengths = torch.cat([lengths for _, lengths in batch.chunks])
    assert [ids.shape for ids, _ in batch.chunks] == [(1, 5), (2, 4), (2, 2)]
    assert lengths[batch.back_N].tolist() == [5, 1, 2, 4, 3]
