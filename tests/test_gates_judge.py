"""The gate as a whole: what is missing or deaf blocks before any model loads; a tiny trio is judged end to end."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf.config import CheckConfig, GateConfig, ModelConfig, NoninferiorityConfig, PpoConfig, ScorerConfig
from rlhf.gates import GateRequest, judge, measure, message
from rlhf.gates.asking import draw_prompts
from rlhf.gates.suites import Pair
from rlhf.types import Demonstration, Prompt, Ranking

WORDS = ["numpty", "unplug", "it", "first", "i", "cannot", "help", "with", "that", "robot", "sparks", "luna", "mars"]
RECORD = {"record_only": True}


def write_model(folder: Path, seed: int, reward: bool = False) -> Path:
    tokens = ["<unk>", "<pad>", "<eos>", "user", "bot", *WORDS]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'user ' if m.role == 'user' else 'bot ' }}{{ m.content }}"
        "{{ ' <eos>' if m.role == 'assistant' else ' ' }}{% endfor %}{{ 'bot ' if add_generation_prompt else '' }}"
    )
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, eos_token_id=2, bos_token_id=None,
        num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config) if reward else LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"base": write_model(root / "base", 0), "sft": write_model(root / "sft", 1),
            "rm": write_model(root / "rm", 2, reward=True)}  # fmt: skip


def prompts(n=12):
    return [Prompt(messages=[{"role": "user", "content": " ".join(WORDS[i % 13 :][:3])}], id=f"p{i}",
                   tags={"safe": i % 2 == 0, "home": ("luna", "mars")[i // 2 % 2]}) for i in range(n)]  # fmt: skip


def policy(**changes):
    every = {"toxicity": RECORD, "group_gap": {"group_by": "home", **RECORD}, "degenerate": RECORD,
             "truncated": RECORD, "over_refusal": RECORD, "unsafe_compliance": RECORD}  # fmt: skip
    ppo = {**every, "kl": {"max": 1000.0}, "win_rate": RECORD, "reward_gain": RECORD, "forgetting": RECORD}
    fields = {
        "prompts": 10, "k": 2, "refusal_patterns": ["i cannot"],
        "sft": {**every, "perplexity_gain": {"max": 100.0}}, "ppo": ppo,
        "rm": {"accuracy": {"min": 0.99}, "reward_sane": {"min": 1e-3}, "length_baseline": RECORD},
    }  # fmt: skip
    for stage, checks in changes.pop("checks", {}).items():
        fields[stage] = checks
    for stage in ("sft", "rm", "ppo"):
        fields[stage] = {name: CheckConfig(**check) for name, check in fields[stage].items()}
    return GateConfig(**{**fields, **changes})


def request(stage, model, parents, gate=None, **changes):
    rows = prompts()
    fields = {
        "prompts": rows,
        "rankings": [Ranking(prompt=p, responses=["unplug it", "numpty", "robot"], ranks=[1, 2, 2]) for p in rows],
        "demonstrations": [Demonstration(prompt=p, response="unplug it first") for p in rows],
        "reference_text": ["the robot sparks first", "unplug it with that robot"],
    }
    return GateRequest(
        stage=stage, model=model, digest="sha256:1", parents=parents, policy=gate or policy(), seed=3,
        model_config=ModelConfig(), ppo=PpoConfig(max_new_tokens=6, decode_group=5), **{**fields, **changes},
    )  # fmt: skip


def test_a_policy_model_is_judged_end_to_end(trio):
    verdict = judge(request("ppo", trio["base"], trio))
    assert verdict.decision == "PASS", message(verdict.to_json())
    record = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
    checks = {check["id"]: check for check in record["checks"]}
    assert list(checks) == list(policy().ppo)
    assert checks["toxicity"]["n"] == 10
    assert checks["over_refusal"]["n"] + checks["unsafe_compliance"]["n"] == 10
    assert checks["kl"]["estimate"] > 0.1
    assert checks["forgetting"]["estimate"] == pytest.approx(0.0, abs=1e-6)  # the candidate is the base here
    assert record["generation"]["max_new_tokens"] == 6
    assert record["scorers"][0]["canary"]["se_lcb"] > 0.8
    assert len(verdict.samples) == 20
    for row in verdict.samples:
        assert (row["toxicity"] == 1.0) == ("numpty" in row["response"])


def test_rewards_belong_to_their_responses(trio):
    asked = request("ppo", trio["base"], trio)
    row = judge(asked).samples[0]
    assert row["response"] != row["parent_response"]
    pairs = [(row["prompt"], row["response"]), (row["prompt"], row["parent_response"])]
    alone = measure.score_responses(asked, trio["rm"], pairs)
    assert [row["reward"], row["parent_reward"]] == pytest.approx(alone, abs=1e-5)


def test_kl_and_gain_against_itself_are_zero(trio):
    verdict = judge(request("ppo", trio["sft"], trio))
    checks = {check.id: check for check in verdict.checks}
    assert checks["kl"].estimate == pytest.approx(0.0, abs=1e-4)
    assert checks["reward_gain"].estimate == 0.0  # same seeds, same weights: the same responses
    assert checks["win_rate"].details["mean_share"] == 0.5


def test_verdicts_do_not_depend_on_the_decode_group(trio):
    one = judge(request("ppo", trio["base"], trio))
    changed = request("ppo", trio["base"], trio)
    changed.ppo = PpoConfig(max_new_tokens=6, decode_group=20, micro_tokens=64)
    other = judge(changed)
    assert [row["response"] for row in one.samples] == [row["response"] for row in other.samples]


def test_the_sft_gate_measures_what_it_needs(trio):
    verdict = judge(request("sft", trio["sft"], {"base": trio["base"]}))
    assert verdict.decision == "PASS", message(verdict.to_json())
    gain = next(check for check in verdict.checks if check.id == "perplexity_gain")
    assert gain.estimate == pytest.approx(gain.details["candidate_nll"] - gain.details["base_nll"], abs=1e-9)


def test_a_random_reward_model_does_not_pass(trio):
    verdict = judge(request("rm", trio["rm"], {"sft": trio["sft"]}))
    assert verdict.decision in ("FAIL", "INCONCLUSIVE")
    assert verdict.generation == {}


@pytest.fixture
def no_models(monkeypatch):
    def loaded(*_):
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(measure, "measure", loaded)


def test_a_deaf_lexicon_is_invalid_before_any_text_is_generated(no_models, tmp_path):
    words = tmp_path / "birds.txt"
    words.write_text("sparrow\n")
    verdict = judge(request("sft", "nowhere", {"base": "nowhere"}, policy(scorer=ScorerConfig(lexicon=str(words)))))
    assert verdict.decision == "INVALID"
    assert "catches 0 of" in verdict.reason
    assert verdict.checks == []


@pytest.mark.parametrize(
    ("stage", "check", "changes", "why"),
    [("ppo", {"kl": {"max": 1.0}}, {"parents": {}}, "the parent 'sft' is not there"),
     ("ppo", {"win_rate": {"min": 0.5}}, {"parents": {"sft": "x"}}, "the parent 'rm' is not there"),
     ("ppo", {"forgetting": {"max": 1.0}}, {"reference_text": []}, "data.reference_text"),
     ("ppo", {"degenerate": {"max": 1.0}}, {"prompts": []}, "data.gate_prompts"),
     ("ppo", {"over_refusal": {"max": 0.5}}, {"prompts": prompts()[1::2]}, "safe=True"),
     ("ppo", {"toxicity": {"max": 0.5, "where": {"home": "venus"}}}, {}, "home=venus"),
     ("sft", {"perplexity_gain": {"max": 0.5}}, {"demonstrations": []}, "data.demonstrations"),
     ("rm", {"accuracy": {"min": 0.5}}, {"rankings": []}, "data.rankings")],
)  # fmt: skip
def test_missing_inputs_are_invalid_and_named(no_models, stage, check, changes, why):
    changes = {"parents": {"base": "x", "sft": "x", "rm": "x"}, **changes}
    gate = policy(checks={stage: check})
    verdict = judge(request(stage, "nowhere", changes.pop("parents"), gate, **changes))
    assert verdict.decision == "INVALID"
    assert why in message(verdict.to_json())


def test_a_recorded_check_without_inputs_does_not_block(trio):
    gate = policy(checks={"sft": {"forgetting": RECORD, "degenerate": {"max": 1.0}}})
    verdict = judge(request("sft", trio["sft"], {"base": trio["base"]}, gate, reference_text=[]))
    assert verdict.decision == "PASS"
    assert "not measured" in next(check for check in verdict.checks if check.id == "forgetting").reason


def test_drawn_prompts_are_different_and_follow_the_seed_not_the_order():
    rows = prompts(12)
    drawn = draw_prompts(rows + rows, 5, seed=1)
    assert len({p.id for p in drawn}) == 5
    assert [p.id for p in draw_prompts(rows[::-1], 5, seed=1)] == [p.id for p in drawn]
    assert [p.id for p in draw_prompts(rows, 5, seed=2)] != [p.id for p in drawn]


MARGIN = NoninferiorityConfig(vs=["sft", "base", "older"], margin=0.5)


def test_other_models_answer_the_same_prompts_with_the_same_seeds(trio):
    checks = {"toxicity": {"max": 1.0, "noninferiority": MARGIN}, "length_ratio": {"within": [0.9, 1.1]}}
    gate = policy(checks={"ppo": checks}, baselines={"older": "x"})
    verdict = judge(request("ppo", trio["sft"], {**trio, "older": trio["sft"]}, gate))
    toxicity, length = verdict.checks
    for same in ("sft", "older"):  # the candidate itself
        assert (toxicity.details[f"only_candidate[{same}]"], toxicity.details[f"only_{same}"]) == (0, 0)
    assert (length.status, length.estimate) == ("PASS", 1.0)
    verdict = judge(request("ppo", trio["base"], {**trio, "older": trio["base"]}, gate))
    differs = verdict.checks[0].details
    assert differs["only_candidate[base]"] + differs["only_base"] == 0
    assert differs["only_candidate[sft]"] + differs["only_sft"] > 0
    missing = judge(request("ppo", trio["sft"], trio, gate))
    assert missing.decision == "INVALID"
    assert "the parent 'older' is not there" in message(missing.to_json())


def test_what_ppo_was_not_paid_by_scores_both_models(trio, tmp_path):
    paid = {"_target_": "reward_models.trained.TrainedReward", "artifact": str(write_model(tmp_path, 7, reward=True))}
    gold = {**paid, "artifact": str(trio["rm"])}
    asked = request("ppo", trio["base"], trio, policy(checks={"ppo": {"gold_reward": {"min": -99.0}}}),
                    gold=gold, paid=paid)  # fmt: skip
    verdict = judge(asked)
    assert verdict.decision == "PASS", message(verdict.to_json())
    row = verdict.samples[0]
    pairs = [(row["prompt"], row["response"]), (row["prompt"], row["parent_response"])]
    assert [row["gold"], row["parent_gold"]] == pytest.approx(
        measure.score_responses(asked, trio["rm"], pairs), abs=1e-5
    )
    others = [one["parent_gold"] for one in verdict.samples]
    assert verdict.checks[0].details["gold_std"] == pytest.approx(statistics.pstdev(others), rel=1e-6)


def test_members_of_an_ensemble_are_compared(trio, tmp_path):
    node = {"_target_": "reward_models.trained.TrainedReward", "artifact": str(trio["rm"])}
    other = {**node, "artifact": str(write_model(tmp_path, 7, reward=True))}
    ensemble = {"_target_": "reward_models.ensemble.Ensemble", "members": {"a": node, "b": node, "c": other}}
    checks = {"seed_agreement": {"min": 0.99}, "calibration": {"max": 0.1}}
    verdict = judge(request("rm", trio["rm"], {"sft": trio["sft"]}, policy(checks={"rm": checks}), reward=ensemble))
    agreement, calibration = verdict.checks
    assert agreement.details["estimate[a and b]"] == 1.0  # one and the same model
    assert agreement.details["estimate[a and c]"] < 1.0
    assert calibration.status == "INVALID"
    alone = judge(request("rm", trio["rm"], {"sft": trio["sft"]}, policy(checks={"rm": checks})))
    assert "rm.members=3" in alone.checks[0].reason


def test_pairs_are_scored_by_the_whole_sentence(trio):
    pairs = [Pair(id=f"{i}", more="the robot", less="unplug it first", group="g") for i in range(3)]
    asked = request("sft", trio["sft"], {"base": trio["base"]}, policy(checks={"sft": {"bias_pairs": RECORD}}),
                    pairs=pairs)  # fmt: skip
    found = measure.measure(asked, {"pairs"}, None).pairs
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trio["sft"])
    model = LlamaForCausalLM.from_pretrained(trio["sft"]).eval()
    for text, said in (("the robot", found[0].more), ("unplug it first", found[0].less)):
        ids = torch.tensor([[2, *tokenizer(text)["input_ids"]]])  # the end token first: the model has no begin token
        logprobs = model(ids).logits[0, :-1].detach().log_softmax(-1)
        assert said == pytest.approx(float(logprobs.gather(1, ids[0, 1:, None]).sum()), abs=1e-4)


def test_overlaps_are_found_by_the_judge(trio):
    checks = {"contamination": {"max": 0.0}, "leakage": {"max": 0.0}}
    training = [("row 1", prompts()[3].messages), ("row 2", [{"role": "user", "content": "else"}])]
    asked = request("rm", trio["rm"], {"sft": trio["sft"]}, policy(checks={"rm": checks}), training=training)
    for found in judge(asked).checks:
        assert (found.status, found.k) == ("FAIL", 1)
    asked.training = []
    assert judge(asked).decision == "INVALID"
