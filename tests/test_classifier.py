"""Any sequence classifier: the label, the activation and the windows that were asked for, and nothing guessed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from classifier_toys import decoder, encoder, plain_logits
from safetensors.torch import load_file, save_file

from reward_models.classifier import ClassifierReward
from rlhf.classifier import Classifier, ClassifierSpec, equal_lengths, spans
from rlhf.errors import ConfigError, TrainingError
from rlhf.rewards import build_reward, check_reward, checked_scores

SIX = ("a", "b", "c", "d", "e", "f")


def made(
    folder: Path, label: Any = 1, activation: str = "none", micro_tokens: int = 8192, **options: Any
) -> Classifier:
    spec = ClassifierSpec(path=str(folder), label=label, activation=activation, **options)
    return Classifier(spec, "judge", device="cpu", micro_tokens=micro_tokens)


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def alter(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_softmax_of_two_logits(tmp_path: Path) -> None:
    """e^3 / (e^1 + e^3) = 1 / (1 + e^-2)."""
    folder = encoder(tmp_path, [1.0, 3.0])
    assert made(folder, "toxic", "softmax").score(["w1"]) == pytest.approx([1 / (1 + math.exp(-2))], abs=1e-6)
    assert made(folder, "fine", "softmax").score(["w1"]) == pytest.approx([1 / (1 + math.exp(2))], abs=1e-6)
    assert made(folder, "toxic", "none").score(["w1", "w2"]) == pytest.approx([3.0, 3.0], abs=1e-6)


def test_sigmoid_of_one_of_six_labels(tmp_path: Path) -> None:
    """log 9 is the logit of .9; a softmax over the six would be 9 / (9 + 3 + 2 * 1 + 2 / 3)."""
    folder = encoder(tmp_path, [0.0, math.log(3), math.log(9), 0.0, -math.log(3), -math.log(3)], SIX)
    assert made(folder, "c", "sigmoid").score(["w1"]) == pytest.approx([0.9], abs=1e-6)
    assert made(folder, 1, "sigmoid").score(["w1"]) == pytest.approx([0.75], abs=1e-6)
    assert made(folder, "e", "sigmoid").score(["w1"]) == pytest.approx([0.25], abs=1e-6)
    assert made(folder, "c", "softmax").score(["w1"]) == pytest.approx([9 / (14 + 2 / 3)], abs=1e-6)


@pytest.mark.parametrize(
    ("length", "size", "stride", "expected"),
    [
        (0, 4, 2, [(0, 0)]),
        (4, 4, 2, [(0, 4)]),
        (5, 4, 2, [(0, 4), (1, 5)]),
        (7, 3, 2, [(0, 3), (2, 5), (4, 7)]),
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (9, 4, 4, [(0, 4), (4, 8), (5, 9)]),
    ],
)
def test_windows_leave_no_token_out(length: int, size: int, stride: int, expected: list[tuple[int, int]]) -> None:
    assert spans(length, size, stride) == expected


def test_a_forward_pass_holds_windows_of_one_length() -> None:
    """Into ten tokens go two rows of five, or three of three; eleven go alone."""
    assert list(equal_lengths([3, 5, 3, 11, 3, 5, 3], 10)) == [[3], [1, 5], [0, 2, 4], [6]]


def test_the_score_is_that_of_the_worst_window(tmp_path: Path) -> None:
    """The last words of the windows are the 4th, the 7th and the 10th, and nothing else is seen by this model."""
    folder, seen, unseen = decoder(tmp_path, blind=True), 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    text = ["w1"] * 10
    texts = [" ".join([*text[:i], "bad", *text[i + 1 :]]) for i in range(10)]
    expected = [seen if i in (3, 6, 9) else unseen for i in range(10)]
    judge = made(folder, 1, "softmax", window=4, stride=3)
    assert judge.score(texts) == pytest.approx(expected, abs=1e-6)
    mean = made(folder, 1, "softmax", window=4, stride=3, pool="mean")
    assert mean.score(texts[9:]) == pytest.approx([(2 * unseen + seen) / 3], abs=1e-6)


def test_the_end_of_a_long_text_is_seen(tmp_path: Path) -> None:
    """Forty times the model's positions, and only the last word is bad."""
    folder = decoder(tmp_path, blind=True)
    text = "w1 " * 64 * 40
    fine, toxic = made(folder, 1, "softmax").score([text, text + "bad"])
    assert (fine, toxic) == pytest.approx((1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))), abs=1e-6)


def test_windows_of_an_encoder_have_its_special_tokens(tmp_path: Path) -> None:
    """Seven words in windows of three: [CLS] words [SEP] of each, alone in the plain class."""
    folder, ids = encoder(tmp_path), [5, 9, 6, 14, 7, 8, 10]
    each = [plain_logits(folder, [1, *ids[i : i + 3], 2])[1] for i in (0, 2, 4)]
    assert len({round(x, 4) for x in each}) == 3
    text = words(*(i - 5 for i in ids))
    assert made(folder, window=5, stride=2).score([text]) == pytest.approx([max(each)], abs=1e-5)
    assert made(folder, window=5, stride=2, pool="mean").score([text]) == pytest.approx([sum(each) / 3], abs=1e-5)
    assert made(folder).score([""]) == pytest.approx([plain_logits(folder, [1, 2])[1]], abs=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "right", "left", "no pad", "pad is the end"])
def test_a_score_is_that_of_the_plain_class_on_the_text_alone(tmp_path: Path, kind: str) -> None:
    """Whatever else is in the batch, however the work is cut, whatever the tokenizer would pad with and where."""
    if kind == "encoder":
        folder, before, after = encoder(tmp_path), [1], [2]
    else:
        pad = {"no pad": None, "pad is the end": "[SEP]"}.get(kind, "[PAD]")
        folder, before, after = decoder(tmp_path, pad=pad, side="left" if kind == "left" else "right"), [], []
    rows = [[5, 6], [7], [8, 9, 10, 11, 12, 13, 14, 15], [5, 5, 5], [9, 8], [11]]
    alone = [plain_logits(folder, [*before, *row, *after])[1] for row in rows]
    texts = [words(*(i - 5 for i in row)) for row in rows]
    for micro_tokens in (1, 20, 8192):
        assert made(folder, micro_tokens=micro_tokens).score(texts) == pytest.approx(alone, abs=1e-5)
    assert made(folder).score(texts[::-1]) == pytest.approx(alone[::-1], abs=1e-5)


def test_an_empty_text_is_the_end_token_where_nothing_is_added(tmp_path: Path) -> None:
    folder = decoder(tmp_path)
    assert made(folder).score(["", "w1"]) == pytest.approx(
        [plain_logits(folder, [2])[1], plain_logits(folder, [6])[1]], abs=1e-5
    )


def test_a_special_token_written_as_text_is_text(tmp_path: Path, tiny_model: Path) -> None:
    """`<|end|>` in seven bytes of a byte-level tokenizer, not as the token that ends a turn."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(encoder(tmp_path))
    judge = object.__new__(Classifier)
    judge.tokenizer, judge.empty = AutoTokenizer.from_pretrained(tiny_model), [0]
    assert len(judge._ids("a<|end|>")) == 8
    assert judge._ids("a") == judge.tokenizer("a")["input_ids"] and judge._ids("") == [0]


def test_positions_up_to_the_pads_are_lost_to_roberta(tmp_path: Path) -> None:
    """12 rows of positions, those up to that of the pad (1) are never used: 10 tokens fit."""
    from classifier_toys import word_tokenizer
    from transformers import RobertaConfig, RobertaForSequenceClassification

    RobertaForSequenceClassification(RobertaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=12, pad_token_id=1,
    )).save_pretrained(tmp_path)  # fmt: skip
    word_tokenizer().save_pretrained(tmp_path)
    assert made(tmp_path).size == 10
    assert len(made(tmp_path).score([words(*[3] * 50)])) == 1
    with pytest.raises(ConfigError, match=r"judge\.window=11: .* at most the 10 tokens"):
        made(tmp_path, window=11)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_head_is_an_error_and_never_safe(tmp_path: Path, activation: str, value: float) -> None:
    """Label 0 alone is broken, and label 1 is asked for."""
    folder = encoder(tmp_path, [0.0, -9.0])
    alter(folder, "classifier.bias", value)
    with pytest.raises(TrainingError, match=r"the logits of text 0 are \[(nan|inf), -9"):
        made(folder, 1, activation).score(["w1"])


def test_a_nan_in_one_window_is_not_lost_in_the_maximum(tmp_path: Path) -> None:
    """The embedding of `bad` is broken; every other window is fine."""
    folder = decoder(tmp_path, blind=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for texts, place in ((["w1", "w2 bad w2 w2 w2"], 1), (["w2 w2 w2 bad", "w1"], 0)):
        with pytest.raises(TrainingError, match=f"the logits of text {place} are"):
            made(folder, 1, "softmax", window=2, stride=1).score(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "Toxic"}, r"judge\.label: .* not 'Toxic'; the model has 0 fine, 1 toxic"),
        ({"label": None}, r"judge\.label: .* the model has 0 fine, 1 toxic"),
        ({"label": 2}, r"judge\.label: .* not 2"),
        ({"label": -1}, r"judge\.label"),
        ({"label": True}, r"judge\.label"),
        ({"activation": None}, r"judge\.activation: must be one of sigmoid, softmax, none, not None"),
        ({"activation": "relu"}, r"judge\.activation"),
        ({"pool": "min"}, r"judge\.pool"),
        ({"window": 0}, r"judge\.window"),
        ({"window": 2}, r"judge\.window=2: must be more than the 2 special tokens and at most the 16"),
        ({"window": 17}, r"judge\.window=17"),
        ({"window": 6, "stride": 5}, r"judge\.stride=5: would skip text between windows of 4"),
        ({"stride": True}, r"judge\.stride"),
        ({"revision": "0" * 40}, r"judge\.revision: .* is a folder"),
        ({"path": "nowhere"}, r"judge\.path: 'nowhere' is not a folder; a hub id needs judge\.revision"),
        ({"path": "org/model", "revision": "main"}, r"judge\.path: .* its full commit hash"),
        ({"path": "org/model", "revision": "0" * 40}, r"judge\.path: org/model at 0+ cannot be had"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = {"path": str(encoder(tmp_path)), "label": "toxic", "activation": "softmax", **options}
    with pytest.raises(ConfigError, match=message):
        Classifier(ClassifierSpec(**given), "judge", device="cpu")


def test_a_folder_that_is_no_classifier(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"lack score\.weight, which would be random: is it a classifier"):
        made(tiny_model, 0)
    folder = encoder(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"judge\.path=.* has no tokenizer"):
        made(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"judge\.path: .* is not a model's config\.json"):
        made(folder)


def test_one_output_needs_no_softmax(tmp_path: Path) -> None:
    folder = encoder(tmp_path, [2.0], ["quality"])
    assert made(folder, "quality", "none").score(["w1"]) == pytest.approx([2.0])
    with pytest.raises(ConfigError, match="is 1 whatever the text"):
        made(folder, 0, "softmax")


def test_the_digest_is_that_of_files_and_options(tmp_path: Path) -> None:
    folder = encoder(tmp_path, [0.0, 1.0])
    given = {"path": str(folder), "label": "toxic", "activation": "softmax"}
    first = ClassifierSpec(**given).digest()
    assert ClassifierSpec(**given).digest() == first
    others = [{"label": "fine"}, {"activation": "sigmoid"}, {"window": 8}, {"stride": 3}, {"pool": "mean"}]
    digests = {ClassifierSpec(**{**given, **other}).digest() for other in others}  # type: ignore[arg-type]
    assert len(digests | {first}) == 6
    alter(folder, "classifier.bias", 0.5)
    assert ClassifierSpec(**given).digest() != first


REWARD = {
    "_target_": "reward_models.classifier.ClassifierReward",
    "label": "toxic",
    "activation": "none",
    "device": "cpu",
}


def test_a_reward_judges_its_template_and_turns_its_sign(tmp_path: Path) -> None:
    folder = encoder(tmp_path)
    node = {**REWARD, "path": str(folder), "scale": -2.0}
    ask = (["w1 w2", "w3"], ["w4", "{prompt} w5"], [{}, {}], ["one", "two"], [1, 2])
    found = checked_scores(build_reward(node).reward, *ask)
    assert found == pytest.approx([-2 * plain_logits(folder, ids)[1] for ids in ([1, 9, 2], [1, 3, 10, 2])], abs=1e-4)
    both = build_reward({**node, "template": "{prompt} w0 {response}", "mean": 0.5, "std": 2.0})
    assert (both.mean, both.std) == (0.5, 2.0)
    found = checked_scores(both.reward, *ask)
    rows = ([1, 6, 7, 5, 9, 2], [1, 8, 5, 3, 10, 2])
    assert found == pytest.approx([-2 * plain_logits(folder, ids)[1] for ids in rows], abs=1e-4)


def test_a_reward_that_is_broken_names_the_row(tmp_path: Path) -> None:
    folder = encoder(tmp_path, [0.0, 1.0])
    alter(folder, "classifier.bias", float("nan"))
    reward = build_reward({**REWARD, "path": str(folder)}).reward
    with pytest.raises(TrainingError, match=r"ClassifierReward raised TrainingError on row one: .* the logits"):
        checked_scores(reward, ["p"], ["w1"], [{}], ["one"], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "no"}, r"reward\.label"),
        ({"activation": None}, r"reward\.activation"),
        ({"path": ""}, r"reward\.path"),
        ({"scale": 0.0}, r"reward\.scale=0"),
        ({"scale": float("nan")}, r"reward\.scale=nan"),
        ({"scale": "minus"}, r"reward\.scale=minus"),
        ({"template": "{prompt}"}, r"reward\.template: .* must hold \{response\}"),
        ({"template": "{response} {row}"}, r"reward\.template"),
        ({"template": "{response!r}"}, r"reward\.template"),
        ({"template": "{response.x}"}, r"reward\.template"),
        ({"template": "{response"}, r"reward\.template"),
        ({"labell": 1}, r"reward\.labell.*did you mean label"),
    ],
)
def test_a_wrong_reward_is_found_before_anything_is_loaded(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = encoder(tmp_path)
    (folder / "model.safetensors").unlink()
    check_reward({**REWARD, "path": str(folder)})
    with pytest.raises(ConfigError, match=message):
        check_reward({**REWARD, "path": str(folder), **options})


def test_a_real_classifier_flags_what_is_toxic_wherever_it_stands(shared: Path) -> None:
    """600 tokens of garden, then 94 and more of insults: cut at 512 it would look as harmless as the garden."""
    folder = shared / "models" / "toxicity-minilm"
    if not folder.is_dir():
        pytest.skip("../shared/models/toxicity-minilm is not here")
    judge = ClassifierReward(path=str(folder), label="toxic", activation="softmax", window=96, device="cpu")
    garden, insult = "The weather was mild and the garden looked well. " * 60, "You are a worthless idiot, shut up. "
    texts = [insult, garden + insult * 12, "Thank you, that was very kind of you.", garden, "How do I boil an egg?"]
    insulted, buried, thanks, gardened, egg = judge.score([""] * 5, texts, [{}] * 5)
    assert min(insulted, buried) > 0.5 > max(thanks, gardened, egg)
