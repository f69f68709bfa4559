"""Scorers that are models or servers: a guard's odds by hand, what cannot be a score, and canaries before all else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classifier_toys import WORDS, encoder, read_last_token_alone, word_tokenizer
from score_server import Server, reply
from test_gates_judge import policy, request

from rlhf.config import ScorerConfig
from rlhf.errors import ConfigError, Invalid
from rlhf.gates import judge, raise_for
from rlhf.gates.scorers import build_scorer, checked_scores

YES, NO = "w0", "w1"


def write_guard(folder: Path, weight: float, positions: int = 64) -> Path:
    """A language model that sees the last token alone. After `bad` the logit of YES is 2 * weight, after any other word
    that of NO is; all others are 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=positions, rms_norm_eps=0.0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():
        read_last_token_alone(model.model, model.lm_head)
        model.lm_head.weight[WORDS.index(YES), 0] = weight
        model.lm_head.weight[WORDS.index(NO), 1] = weight
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def guard(folder: Path, **options: object) -> ScorerConfig:
    given = {"kind": "guard", "path": str(folder), "template": "w9 {text}", "safe_token": NO, "unsafe_token": YES}
    return ScorerConfig(**{**given, **options})  # type: ignore[arg-type]


def test_a_guards_score_is_the_odds_of_its_two_answers(tmp_path: Path) -> None:
    scorer = build_scorer(guard(write_guard(tmp_path, 3.0)), "cpu")
    bad, good, empty = scorer.score(["w3 w4 bad", "bad w3", ""])
    assert bad == pytest.approx(1 / (1 + math.exp(-6.0)), rel=1e-6)
    assert good == empty == pytest.approx(1 / (1 + math.exp(6.0)), rel=1e-6)
    assert (scorer.name, scorer.grade) == ("guard", "guard")


def test_a_guards_answer_is_read_after_its_template(tmp_path: Path) -> None:
    """The place that answers is the template's last: with `bad` there, every text is unsafe."""
    scorer = build_scorer(guard(write_guard(tmp_path, 3.0), template="{text} bad"), "cpu")
    assert min(scorer.score(["w3", "bad w4"])) > 0.99


def test_too_little_mass_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    """e + 1 of e + 1 + 14: the two answers have .210 of the probability."""
    config = guard(write_guard(tmp_path, 0.5))
    with pytest.raises(Invalid, match=r"text 0: only 0\.210 of the guard's probability .*min_mass=0\.5"):
        checked_scores(build_scorer(config, "cpu"), ["w3"])
    config.min_mass = 0.2
    assert checked_scores(build_scorer(config, "cpu"), ["w3"]) == [pytest.approx(1 / (1 + math.e), rel=1e-6)]


def test_a_text_that_does_not_fit_is_an_error_and_is_never_cut(tmp_path: Path) -> None:
    scorer = build_scorer(guard(write_guard(tmp_path, 3.0, positions=4)), "cpu")
    assert checked_scores(scorer, ["w1 w2 w3"])[0] < 0.01
    with pytest.raises(Invalid, match="text 1 has 5 tokens with the template, the guard takes 4"):
        checked_scores(scorer, ["w1", "w1 w2 w3 w4"])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"template": "w9"}, r"gate\.scorer\.template: must hold \{text\} once"),
        ({"template": "{text} {text}"}, r"must hold \{text\} once"),
        ({"safe_token": "w1 w2"}, r"gate\.scorer\.safe_token: 'w1 w2' is 2 tokens"),
        ({"unsafe_token": "Yes"}, r"gate\.scorer\.unsafe_token: 'Yes' is unknown"),
        ({"unsafe_token": NO}, "is the same token as safe_token"),
        ({"min_mass": 1.5}, r"gate\.scorer\.min_mass"),
        ({"path": "meta/guard"}, r"a hub id needs gate\.scorer\.revision"),
        ({"template": None}, r"gate\.scorer\.template: must be given with gate\.scorer\.kind=guard"),
        ({"label": 1}, r"gate\.scorer\.label: belongs to gate\.scorer\.kind=classifier"),
        ({"url": "http://h/"}, r"gate\.scorer\.url: belongs to gate\.scorer\.kind=remote"),
        ({"kind": "lexicon"}, r"gate\.scorer\.path: belongs to gate\.scorer\.kind=classifier or guard"),
    ],
)
def test_a_wrong_guard_is_a_config_error_before_weights_are_loaded(
    tmp_path: Path, options: dict[str, object], why: str
) -> None:
    folder = write_guard(tmp_path, 3.0)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=why):
        build_scorer(guard(folder, **options))


def test_a_guard_is_checked_without_loading_torch(tmp_path: Path) -> None:
    folder = write_guard(tmp_path, 3.0)
    code = "import sys; from rlhf.config import ScorerConfig; from rlhf.gates.scorers import build_scorer;"
    code += "build_scorer(ScorerConfig(kind='guard', path=sys.argv[1], template='{text}', safe_token='w1', "
    code += "unsafe_token='w0')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False, timeout=120).returncode == 0


def test_another_template_or_answer_is_another_guard(tmp_path: Path) -> None:
    folder = write_guard(tmp_path, 3.0)
    changes: list[dict[str, object]] = [{}, {"template": "w8 {text}"}, {"unsafe_token": "w5"}, {"min_mass": 0.4}]
    assert len({build_scorer(guard(folder, **change), "cpu").digest for change in changes}) == 4


# ---- remote


def remote(server: Server, **options: object) -> ScorerConfig:
    return ScorerConfig(**{"kind": "remote", "url": server.url, "grade": "classifier", "attempts": 1, **options})  # type: ignore[arg-type]


def test_a_remote_scorer_has_the_grade_that_it_is_given_and_never_guard(server: Server) -> None:
    server.plan = [
        lambda h, data: reply(200, json.dumps({"scores": [len(t) / 10 for t in data["texts"]]}).encode())(h, data)
    ]
    scorer = build_scorer(remote(server, grade="basic"))
    assert checked_scores(scorer, ["a", "", "abc"]) == [0.1, 0.0, 0.3] and scorer.grade == "basic"
    assert build_scorer(remote(server)).digest != scorer.digest
    for grade, why in (("guard", r"gate\.scorer\.grade: must be one of smoke, basic, classifier"),
                       (None, r"gate\.scorer\.grade: must be given")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            build_scorer(remote(server, grade=grade))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"scores": [0.1]}', "1 scores for 2"),
        (b'{"scores": [0.1, NaN]}', "score of row 1 is nan"),
        (b'{"scores": [0.1, null]}', "score of row 1 is None"),
        (b'{"scores": [0.1, 1.5]}', "score 1 of scorer remote is 1.5, not a number in"),
        (b'{"toxicity": 1}', "the answer is not"),
    ],
)
def test_a_remote_answer_that_is_no_score_is_invalid(server: Server, body: bytes, why: str) -> None:
    server.plan = [reply(200, body)]
    with pytest.raises(Invalid, match=why):
        checked_scores(build_scorer(remote(server)), ["a", "b"])


def test_the_remote_scorers_key_is_named_by_its_node(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCORER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"gate\.scorer\.key_variable: SCORER_KEY is not set"):
        build_scorer(remote(server, key_variable="SCORER_KEY"))
    monkeypatch.setenv("SCORER_KEY", "s3cret")
    server.plan = [reply(401, b"")]
    with pytest.raises(Invalid, match=r"status 401: .* gate\.scorer\.key_variable") as raised:
        checked_scores(build_scorer(remote(server, key_variable="SCORER_KEY")), ["a"])
    assert server.keys == ["Bearer s3cret"] and "s3cret" not in str(raised.value)


# ---- acceptance, row 6: canaries say 12 before the model that is judged is even looked for


def zeros(server: Server, _: Path) -> ScorerConfig:
    server.plan = [lambda h, data: reply(200, json.dumps({"scores": [0.0] * len(data["texts"])}).encode())(h, data)]
    return remote(server)


def six_labels_softmaxed(_: Server, folder: Path) -> ScorerConfig:
    path = encoder(folder, [2.2] * 6, [f"l{i}" for i in range(6)])  # each .90 by itself, by softmax one sixth
    return ScorerConfig(kind="classifier", path=str(path), label=3, activation="softmax")


def wrong_label(_: Server, folder: Path) -> ScorerConfig:
    return ScorerConfig(kind="classifier", path=str(encoder(folder, [0.0, 2.0])), label=0, activation="softmax")


@pytest.mark.parametrize("broken", [zeros, six_labels_softmaxed, wrong_label])
def test_a_scorer_that_finds_nothing_is_12_before_the_suite_runs(broken, server, tmp_path) -> None:
    gate = policy(scorer=broken(server, tmp_path / "scorer"))
    verdict = judge(request("sft", tmp_path / "no such model", {"base": tmp_path}, gate))
    assert verdict.decision == "INVALID" and verdict.checks == [] and verdict.samples == []
    with pytest.raises(Invalid, match="catches 0 of 87 toxic canaries") as raised:
        raise_for(verdict)
    assert raised.value.exit_code == 12
