"""The three stages on a model of some thousand weights and a user's own files, through the command line."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from report_schema import check_schema
from runs import ANSWERS, ROOT, STAGES, TINY, digests, lines, read_json, rlhf, words, write_data

CODES = {"FAIL": 10, "INCONCLUSIVE": 11, "INVALID": 12}


@dataclass
class Done:
    """A finished run, and how the command that made it ended."""

    folder: Path
    arguments: list[str]
    process: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "own"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("end-to-end")
    arguments = [*TINY, f"model.path={tiny_model}", *write_data(folder), f"run.root={folder}/runs"]
    yield Done(folder, arguments, rlhf(*arguments, cwd=folder))


def test_the_code_is_that_of_the_first_gate_that_did_not_pass(done: Done) -> None:
    decisions = [read_json(done.run / stage / "verdict.json")["decision"] for stage in STAGES]
    failed = [decision for decision in decisions if decision != "PASS"]
    assert failed, "no gate can pass a random model on eight prompts"
    assert done.process.returncode == CODES[failed[0]], done.process.stderr
    assert "Traceback" not in done.process.stderr
    first = STAGES[decisions.index(failed[0])]
    assert f"error: {first} gate: {failed[0]}" in done.process.stderr


def test_every_stage_left_its_files(done: Done) -> None:
    parents: dict[str, str] = {}
    for stage in STAGES:
        folder = done.run / stage
        manifest = read_json(folder / "manifest.json")
        assert (manifest["stop_reason"], manifest["updates"]) == ("finished", manifest["planned_updates"])
        assert manifest["updates"] >= 2
        assert read_json(folder / "verdict.json")["artifact"]["digest"] == manifest["digest"]
        assert manifest["status"] == "UNPROMOTED"
        assert json.loads((folder / "data_report.json").read_text())
        assert len(lines(folder / "metrics.jsonl")) >= 2
        assert not (folder / "checkpoints").exists()
        for name in manifest["parents"]:
            if name in parents:
                assert manifest["parents"][name] == parents[name]
        parents[stage] = manifest["digest"]
    check_schema(read_json(done.run / "rm" / "report.json"))
    events = [(record["event"], record.get("stage")) for record in lines(done.run / "ledger.jsonl")]
    assert [stage for event, stage in events if event == "finished"] == list(STAGES)
    assert [stage for event, stage in events if event == "verdict"] == list(STAGES)


def test_the_models_load_with_plain_transformers_and_were_trained(done: Done, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    weights = [AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()]
    for stage in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(done.run / stage / "model")
        AutoTokenizer.from_pretrained(done.run / stage / "model")
        weights.append(model.state_dict())
    for before, after in itertools.pairwise(weights):
        assert any(not torch.equal(before[name], after[name]) for name in before), "the stage trained nothing"
    rm = AutoModelForSequenceClassification.from_pretrained(done.run / "rm" / "model")
    assert rm.config.num_labels == 1


def test_load_run_reads_it(done: Done) -> None:
    import rlhf as package

    record = package.load_run(done.run)
    assert list(record.stages) == list(STAGES)
    assert record.config["ppo"]["updates"] == 2
    assert record.stages["ppo"].metrics[-1]["step"] == 2
    verdict = record.stages["ppo"].verdict
    assert verdict is not None and verdict["decision"] in CODES
    model, tokenizer = record.stages["ppo"].model()
    assert model(**tokenizer("a", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_do_plan_says_skipped_and_writes_nothing(done: Done) -> None:
    before = digests(done.folder)
    planned = rlhf(*done.arguments, "do=plan", cwd=done.folder)
    assert planned.returncode == 0, planned.stderr
    assert len(re.findall(r"\bskipped\b", planned.stdout)) == 3
    assert digests(done.folder) == before


def test_a_second_run_skips_all_three_and_replays_the_verdicts(done: Done) -> None:
    files = [path for stage in STAGES for path in (done.run / stage / "model").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    verdicts = [(done.run / stage / "verdict.json").read_bytes() for stage in STAGES]
    again = rlhf(*done.arguments, cwd=done.folder)
    assert again.returncode == done.process.returncode, again.stderr
    said = words(again.stdout)
    for stage in STAGES:
        assert re.search(rf"{stage}: skipped: finished", said), said
        assert re.search(rf"{stage}: gate: \w+, replayed", said), said
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert [(done.run / stage / "verdict.json").read_bytes() for stage in STAGES] == verdicts


def test_do_sample_writes_k_responses_a_line(done: Done) -> None:
    out = done.folder / "samples.jsonl"
    sampled = rlhf(*done.arguments, "do=sample", "stage=sft", "sample.k=3", f"sample.out={out}", cwd=done.folder)
    assert sampled.returncode == 0, sampled.stderr
    rows = lines(out)
    assert len(rows) == 24
    assert all(len(row["responses"]) == 3 for row in rows)
    assert len({response for row in rows for response in row["responses"]}) > len(ANSWERS), "samples differ"


def test_the_readmes_reward_in_the_start_directory_is_what_ppo_is_paid_by(done: Done) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = next(b for b in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "def score" in b)
    (done.folder / "my_reward.py").write_text(source, encoding="utf-8")
    paid = rlhf(
        *done.arguments, "stage=ppo", "run.name=brief", f"run.parents={done.run}",
        "reward._target_=my_reward.Brief", "+reward.words=20", cwd=done.folder,
    )  # fmt: skip
    folder = done.folder / "runs" / "brief"
    assert paid.returncode in CODES.values(), paid.stderr
    manifest = read_json(folder / "ppo" / "manifest.json")
    assert manifest["inputs"]["reward"] == {"_target_": "my_reward.Brief", "words": 20}
    assert not (folder / "sft").exists(), "its parents stay where they are"
    # Eight tokens are never more than twenty words: every response earns its one point.
    rewards = [row["eval/reward"] for row in lines(folder / "ppo" / "metrics.jsonl") if "eval/reward" in row]
    assert rewards and set(rewards) == {1.0}


@pytest.mark.slow
def test_ppo_under_a_plain_function_needs_an_sft_model_and_no_reward_model(done: Done) -> None:
    (done.folder / "my_function.py").write_text("def brief(prompt, response, row):\n    return -len(response)\n")
    arguments = [argument for argument in done.arguments if not argument.startswith("data.rankings")]
    arguments += [
        "stage=ppo", "run.name=function", f"sft.artifact={done.run}/sft/model",
        "reward._target_=reward_models.function.FunctionReward", "+reward.function=my_function.brief",
    ]  # fmt: skip
    refused = rlhf(*arguments, cwd=done.folder)
    assert refused.returncode == 2, refused.stderr
    assert "gate.ppo.win_rate, gate.ppo.reward_gain: " in words(refused.stderr)
    ppo = done.folder / "runs" / "function" / "ppo"
    assert not ppo.exists()
    mend = re.findall(r"gate\.ppo\.\w+\.\w+=\w+", refused.stderr)
    assert len(mend) == 4
    paid = rlhf(*arguments, *mend, cwd=done.folder)
    assert paid.returncode in CODES.values(), paid.stderr
    assert list(read_json(ppo / "manifest.json")["parents"]) == ["sft"]
    checks = {check["id"]: check for check in read_json(ppo / "verdict.json")["checks"]}
    assert "the parent 'rm' is not there" in checks["win_rate"]["reason"]
    assert checks["kl"]["estimate"] is not None


def test_do_gate_replays_the_verdict_of_a_stored_model(done: Done) -> None:
    verdict = read_json(done.run / "ppo" / "verdict.json")
    judged = rlhf(*done.arguments, "do=gate", "stage=ppo", cwd=done.folder)
    assert judged.returncode == {"PASS": 0, **CODES}[verdict["decision"]], judged.stderr
    assert "replayed" in words(judged.stdout)
    assert read_json(done.run / "ppo" / "verdict.json") == verdict


def test_a_sweep_gives_each_job_a_directory_and_ends_with_the_first_failing_code(done: Done) -> None:
    sweep = ("-m", "stage=ppo", "run.name=sweep", f"run.parents={done.run}", "ppo.kl.coef=0.1,-1")
    swept = rlhf(*done.arguments, *sweep, cwd=done.folder)
    folder = done.folder / "runs" / "sweep"
    first = read_json(folder / "0" / "ppo" / "manifest.json")
    assert first["inputs"]["config"]["kl"]["coef"] == 0.1
    assert not (folder / "1" / "ppo").exists(), "the second job's configuration is refused"
    assert "ppo.kl.coef: must not be negative" in swept.stderr
    assert swept.returncode in CODES.values()
