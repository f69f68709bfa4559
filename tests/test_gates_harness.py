"""Tasks of lm-evaluation-harness: how they are found and bound, what is made of their scores, and a real run of two.

The fast tests put a small stand-in for the library's index into the path, and scores by hand; the slow one, which
skips where the library is not installed, runs it on a toy model.
"""

import importlib
import json
import re
import statistics
import sys

import pytest
from test_gates_judge import RECORD, WORDS, policy, request, trio  # noqa: F401  # a fixture

from rlhf.config import CheckConfig, NoninferiorityConfig, TaskConfig, check_all
from rlhf.errors import ConfigError, DataError, Invalid
from rlhf.gates import harness, judge, message, policy_digest
from rlhf.gates.checks import KINDS
from rlhf.gates.deciding import Rules
from rlhf.gates.harness import collect, task_key
from rlhf.gates.measured import Measured, TaskMetric, TaskScores
from rlhf.gates.policy import needs_of_check, validate
from rlhf.statistics import clopper_pearson_lower, mean_bound, samples_needed, tango_upper

RULES = Rules(alpha=0.05)
TASK = TaskConfig(name="sums")
STAND_IN = """
from pathlib import Path
from types import SimpleNamespace
import yaml


class Loader(yaml.SafeLoader): ...


Loader.add_constructor("!function", lambda loader, node: node.value)


class TaskManager:
    def __init__(self, include_path=None, include_defaults=True):
        self.task_index = {}
        for path in sorted(Path(include_path).glob("*.yaml")) if include_path else []:
            cfg = yaml.load(path.read_text(), Loader=Loader)
            name = cfg.get("group") or cfg.get("task")
            if name:
                self.task_index[name] = SimpleNamespace(name=name, yaml_path=path, cfg=cfg, tags=set())
        if include_defaults:
            self.task_index["arc_easy"] = SimpleNamespace(name="arc_easy", yaml_path=None, cfg={}, tags=set())
        self.all_tasks = sorted(self.task_index)
"""
YAML = """
task: sums
include: common.txt
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: tasks/utils.length, aggregation: mean, higher_is_better: true}
  - {metric: slips, aggregation: mean, higher_is_better: false}
process_results: !function utils.score
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task, its include, code and data, and the stand-in for the library."""
    library = tmp_path / "library"
    (library / "lm_eval").mkdir(parents=True)
    (library / "lm_eval-0.0.dist-info").mkdir()
    (library / "lm_eval-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.0\n")
    (library / "lm_eval" / "__init__.py").write_text("")
    (library / "lm_eval" / "tasks.py").write_text(STAND_IN)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(library))
    importlib.invalidate_caches()
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {"sums.yaml": YAML, "common.txt": "output_type: generate_until\n", "utils.py": "def score(): ...\n",
             "both.yaml": "group: both\ntask: [{group: inner, task: [{task: sums, num_fewshot: 0}]}]\n"}  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    (tmp_path / "sums.jsonl").write_text('{"q": "1+1", "a": "2"}\n')
    monkeypatch.chdir(tmp_path)
    yield folder
    harness._with_defaults.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def sft(**check):
    return policy(checks={"sft": {"sums": {"kind": "lm_eval", **check}}})


def of(folder, **task):
    return TaskConfig(**{"name": "sums", "include_path": str(folder), **task})


def digest(task):
    return policy_digest(sft(task=task, metric="acc", min=0.5), "sft")


def test_without_the_extra_it_is_named_before_anything_loads(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gate\.sft\.sums\.task: needs .*'rlhf-pipeline\[lm-eval\]'"):
        validate(sft(task=TASK, min=0.5))


@pytest.mark.parametrize(
    ("check", "why"),
    [
        ({"task": {"name": "smus"}}, r"sums\.task\.name: .* no task 'smus' nor one in .*did you mean sums"),
        ({"task": {"name": "nowhere.yaml"}}, "there is no file nowhere.yaml"),
        ({"task": {"include_path": "nowhere"}}, "include_path: nowhere is not a folder"),
        ({"metric": "bleu"}, r"sums\.metric: sums has no 'bleu'; it has acc, length, slips"),
        ({"metric": None}, r"sums\.metric: sums has acc, length, slips: say which"),
        ({"metric": "slips"}, "of slips, lower is better"),
        ({"min": None, "max": 0.5}, "of acc, higher is better"),
        ({"kind": "degenerate", "min": None, "max": 0.5}, r"task\.name: names the task of lm_eval"),
        ({"task": {"name": None, "include_path": None}}, r"task\.name: names the task of lm_eval"),
    ],
)
def test_a_task_that_is_not_there_or_not_meant_is_refused(tasks, check, why):
    task = of(tasks, **check.get("task", {}))
    with pytest.raises(ConfigError, match=why):
        validate(sft(**{"metric": "acc", "min": 0.5, **check, "task": task}))


def test_a_task_of_its_own_or_of_the_library_is_taken(tasks):
    for task in (of(tasks), of(tasks, name="both"), of(tasks, name=str(tasks / "sums.yaml"), include_path=None),
                 TaskConfig(name="arc_easy")):  # fmt: skip
        validate(sft(task=task, metric="acc", min=0.5))
    (tasks / "sums.yaml").write_text(YAML + "unsafe_code: true\n")
    harness._with_defaults.cache_clear()
    for name in ("sums", "both"):
        with pytest.raises(ConfigError, match="sums runs code that the model writes"):
            validate(sft(task=of(tasks, name=name), metric="acc", min=0.5))


def test_data_that_is_named_and_not_there_is_an_error(tasks):
    (tasks.parent / "sums.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"names the data file sums\.jsonl, and there is none"):
        validate(sft(task=of(tasks), metric="acc", min=0.5))


def test_every_file_of_a_task_is_part_of_the_policy_and_its_place_is_not(tasks):
    first, group = digest(of(tasks)), digest(of(tasks, name="both"))
    for path in (tasks / "sums.yaml", tasks / "common.txt", tasks / "utils.py", tasks.parent / "sums.jsonl"):
        before = path.read_text()
        path.write_text(before + "\n")
        assert digest(of(tasks)) != first, path
        assert digest(of(tasks, name="both")) != group, path
        path.write_text(before)
    assert digest(of(tasks, documents=3)) != first != digest(of(tasks, num_fewshot=1))
    moved = tasks.rename(tasks.parent / "elsewhere")
    assert digest(of(moved)) == first


def test_code_in_folders_below_is_part_of_the_policy(tasks):
    (tasks / "lib").mkdir()
    (tasks / "lib" / "utils.py").write_text("def score(): return 0\n")
    first = digest(of(tasks))
    (tasks / "lib" / "utils.py").write_text("def score(): return 1\n")
    assert digest(of(tasks)) != first


def test_a_pattern_of_data_files_may_be_absolute(tasks):
    (tasks / "sums.yaml").write_text(YAML.replace("sums.jsonl", str(tasks.parent / "su*.jsonl")))
    first = digest(of(tasks))
    (tasks.parent / "sums.jsonl").write_text("{}")
    assert digest(of(tasks)) != first


def test_a_file_whose_name_for_itself_another_file_has_too_is_refused(tasks):
    (tasks / "zz_old.yaml").write_text(YAML)
    with pytest.raises(ConfigError, match=r"sums\.yaml calls itself 'sums'; so does .*zz_old\.yaml"):
        validate(sft(task=TaskConfig(name=str(tasks / "sums.yaml")), metric="acc", min=0.5))


@pytest.mark.parametrize(
    ("task", "why"),
    [(TaskConfig(documents=3), r"task\.name"), (TaskConfig(name="a", documents=0), "documents: must be at least 1"),
     (TaskConfig(name="a", num_fewshot=-1), "num_fewshot: must be at least 0")],
)  # fmt: skip
def test_options_of_a_task_that_mean_nothing_are_refused(task, why):
    with pytest.raises(ConfigError, match=why):
        check_all(sft(task=task, min=0.5), "gate")


# ---- what is made of the scores


def scores(values, documents="d", aggregate=None, higher=True):
    metric = TaskMetric(values={f"sums/{i}": v for i, v in enumerate(values)}, aggregate=aggregate,
                        higher_is_better=higher)  # fmt: skip
    return TaskScores(name="sums", documents=documents, metrics={("m", "none"): metric})


def run(mine, theirs=None, margin=None, **check):
    if margin is not None:
        check["noninferiority"] = NoninferiorityConfig(vs=["sft"], margin=margin)
    asked = CheckConfig(task=TASK, **check)
    models = {"": mine} | ({"sft": theirs} if theirs is not None else {})
    measured = Measured(tasks={name: {task_key(TASK): found} for name, found in models.items()})
    return KINDS["lm_eval"].run(measured, asked, RULES)


def test_right_and_wrong_documents_have_the_exact_bound():
    finding = run(scores([1] * 50 + [0] * 10), min=0.74)
    assert (finding.k, finding.n, finding.status) == (50, 60, "FAIL")
    assert finding.bound == clopper_pearson_lower(50, 60, 0.05) == pytest.approx(0.7337, abs=1e-4)
    assert finding.needed_n == samples_needed(0.74, 0.05, 50 / 60, "lower")
    assert finding.worst == [f"sums/{i}" for i in range(50, 55)]
    assert run(scores([1.0] * 50 + [0.0] * 10), min=0.73).status == "PASS"
    few = run(scores([1] * 10), min=0.9)
    assert few.status == "INCONCLUSIVE" and f"n >= {samples_needed(0.9, 0.05, 1.0, 'lower')} " in few.reason
    assert run(scores([1] * 60), min=0.5, min_n=61).status == "INCONCLUSIVE"
    slips = run(scores([0] * 60, higher=False), max=0.05)
    assert (slips.status, slips.k) == ("PASS", 0) and slips.bound == pytest.approx(1 - 0.05 ** (1 / 60))
    assert run(scores([1] * 30 + [0] * 30), within=[0.35, 0.65]).status == "PASS"
    assert run(scores([1] * 12 + [0] * 48), within=[0.35, 0.65]).status == "FAIL"


@pytest.mark.parametrize("higher", [True, False])
def test_rates_of_two_models_are_compared_by_document(higher):
    """12 documents that the candidate alone gets wrong, none that the other alone does; then 3 and 2."""
    right, wrong = (1, 0) if higher else (0, 1)
    base = scores([right] * 988 + [right] * 12, higher=higher)
    worse = run(scores([right] * 988 + [wrong] * 12, higher=higher), base, margin=0.01)
    assert worse.bound == pytest.approx(tango_upper(12, 0, 1000, 0.05)) == pytest.approx(0.0191, abs=1e-4)
    assert (worse.status, worse.details["baseline"]) == ("FAIL", right)
    mixed = scores([right] * 995 + [wrong] * 3 + [right] * 2, higher=higher)
    other = scores([right] * 998 + [wrong] * 2, higher=higher)
    assert run(mixed, other, margin=0.01).status == "PASS"
    limit = {"min": 0.98} if higher else {"max": 0.02}
    assert run(mixed, other, margin=0.005, **limit).status == "FAIL"
    both = run(mixed, other, margin=0.01, **limit)
    assert (both.status, both.limit, both.estimate) == ("PASS", *limit.values(), abs(right - 0.003))


def test_values_have_the_bound_of_a_mean_and_differences_that_of_theirs():
    mine, theirs = [0.5 + 0.01 * (i % 7) for i in range(60)], [0.52 + 0.01 * (i % 5) for i in range(60)]
    ids = [f"sums/{i}" for i in range(60)]
    lower = mean_bound(mine, ids, 0.05, "lower", 0).bound
    finding = run(scores(mine), min=lower - 0.001)
    assert (finding.status, finding.bound) == ("PASS", pytest.approx(lower))
    assert run(scores(mine), min=lower + 0.001).status == "FAIL"
    lost = mean_bound([b - a for a, b in zip(mine, theirs, strict=True)], ids, 0.05, "upper", 0).bound
    compared = run(scores(mine), scores(theirs), margin=lost + 1e-6)
    assert (compared.status, compared.bound) == ("PASS", pytest.approx(lost))
    assert compared.estimate == pytest.approx(statistics.mean(theirs) - statistics.mean(mine))
    assert run(scores(mine), scores(theirs), margin=lost - 1e-6).status == "FAIL"
    short = run(scores(mine, higher=False), scores(theirs, higher=False), margin=0.001)
    assert short.status == "PASS"  # where lower is better the candidate is the better one


def test_a_metric_that_is_no_mean_is_resampled_by_document():
    """Errors over words, summed before they are divided, as in a corpus metric: 60 of 600."""

    def rate(pairs):
        return sum(errors for errors, _ in pairs) / sum(words for _, words in pairs)

    pairs = [(i % 3, 10) for i in range(60)]
    finding = run(scores(pairs, aggregate=rate, higher=False), max=0.2)
    assert finding.estimate == pytest.approx(0.1) and finding.status == "PASS"
    # 60 documents with the standard deviation .0816 have the standard error .0105: 1.645 of it above .1
    assert finding.bound == pytest.approx(0.1 + 1.645 * 0.0105, abs=0.004)
    assert run(scores(pairs, aggregate=rate, higher=False), max=0.105).status == "FAIL"
    worse = scores([(errors + 1, 10) for errors, _ in pairs], aggregate=rate, higher=False)
    against = run(worse, scores(pairs, aggregate=rate, higher=False), margin=0.11)
    assert (against.status, against.bound) == ("PASS", pytest.approx(0.1))  # the same for every document
    assert run(worse, scores(pairs, aggregate=rate, higher=False), margin=0.09).status == "FAIL"


def test_what_cannot_be_compared_or_counted_is_invalid():
    fine = scores([1, 0, 1])
    with pytest.raises(Invalid, match="not asked the same documents"):
        run(fine, scores([1, 0, 1], documents="others"), margin=0.1)
    for value, why in ((float("nan"), "not a finite number"), (None, "not a number"), ("A", "not a number")):
        with pytest.raises(Invalid, match=f"the sums: m of sums/1 is .*{why}"):
            run(scores([0.5, value, 0.2]), min=0.1)
    two = scores([1, 0, 1])
    two.metrics["m", "strict"] = two.metrics["m", "none"]
    with pytest.raises(Invalid, match=r"names 2 of its metrics, not one: it has m \(filter none\), m \(filter strict"):
        run(two, min=0.1)
    with pytest.raises(Invalid, match="lower is better"):
        run(scores([1, 0, 1], higher=False), min=0.1)


def test_one_document_shows_nothing_by_a_metric_that_is_no_rate():
    """Drawn again it is the same document each time, so its bound has no width."""
    for aggregate in (statistics.mean, None):
        one, other = (scores([value], aggregate=aggregate) for value in (0.9, 0.905))
        asks = [{"within": [0.8, 0.95]}, {"theirs": other, "margin": 0.01}, *([{"min": 0.8}] if aggregate else [])]
        for ask in asks:
            with pytest.raises(Invalid, match="a bound needs at least 2 documents, there is 1"):
                run(one, **ask)


def test_an_aggregation_that_raises_makes_its_check_invalid():
    with pytest.raises(Invalid, match="sums: m: its aggregation raises ZeroDivisionError"):
        run(scores([1, 0, 1], aggregate=lambda values: 1 / 0), min=0.1)


def test_a_task_that_could_not_be_run_is_its_checks_matter_alone():
    kept = Measured(tasks={"": {task_key(TASK): Invalid("its code raises")}})
    with pytest.raises(Invalid, match="its code raises"):
        KINDS["lm_eval"].run(kept, CheckConfig(task=TASK, min=0.5), RULES)


def test_what_must_be_measured_names_the_other_models():
    check = CheckConfig(kind="lm_eval", task=TASK, noninferiority=NoninferiorityConfig(vs=["sft"], margin=0.1))
    assert needs_of_check("sums", check) == ("lm_eval", "lm_eval:sft")


def test_documents_that_did_not_come_back_are_missed():
    class Task:
        def aggregation(self):
            return {"acc": statistics.mean, "f": max}

        def higher_is_better(self):
            return {"acc": True}

    def rows(name, count, *metrics):
        return [{"doc_id": i, "filter": "none", "metrics": list(metrics), "doc_hash": f"{name}{i}", "target_hash": "t",
                 **dict.fromkeys(metrics, i % 2)} for i in range(count)]  # fmt: skip

    both = {"a": rows("a", 4, "acc", "f"), "b": rows("b", 2, "acc", "f")}
    found = collect("g", {"a": Task(), "b": Task()}, both, {"a": 4, "b": 2}, (statistics.mean,))
    assert list(found.metrics) == [("acc", "none")]  # `f` is no mean, so two tasks have none together
    assert found.metrics["acc", "none"].values == {"a/0": 0, "a/1": 1, "a/2": 0, "a/3": 1, "b/0": 0, "b/1": 1}
    alone = collect("a", {"a": Task()}, {"a": both["a"]}, {"a": 4}, (statistics.mean,))
    assert alone.metrics["f", "none"].aggregate is max and alone.documents != found.documents
    with pytest.raises(Invalid, match="3 answers came back for 4 documents"):
        collect("a", {"a": Task()}, {"a": both["a"][:3]}, {"a": 4}, (statistics.mean,))


# ---- the library itself

CHOICE = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {test: which.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["robot", "sparks", "luna", "mars"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: write.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_tasks(trio, tmp_path, monkeypatch):  # noqa: F811
    """Two tasks, of 40 documents each, whose right answers are those of the `sft` model for three of four."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, model = (cls.from_pretrained(trio["sft"]) for cls in (PreTrainedTokenizerFast, LlamaForCausalLM))
    which, write = [], []
    for i in range(40):
        q = f"{WORDS[i % 13]} {WORDS[i * i % 13]} {WORDS[i // 13]}"
        ids = torch.tensor([tokenizer(q)["input_ids"]])
        said = model(ids).logits[0, -1].detach().log_softmax(-1)
        likeliest = max(range(4), key=lambda j: float(said[tokenizer.convert_tokens_to_ids(WORDS[9 + j])]))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        which.append({"q": q, "label": (likeliest + (i % 4 == 0)) % 4})
        write.append({"q": q, "a": "never" if i % 4 == 0 else answer})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, text, rows in (("which", CHOICE, which), ("write", WRITTEN, write)):
        (tmp_path / f"{name}.yaml").write_text(text)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    further = {"unlike": "group: unlike\ntask: [which, write]\n", "alike": "group: alike\ntask: [which, other]\n",
               "other": "include: which.yaml\ntask: other\n"}  # fmt: skip
    for name, text in further.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.slow
def test_the_library_runs_on_a_model_and_its_parent(trio, own_tasks):  # noqa: F811
    def check(name, **options):
        return {"kind": "lm_eval", "task": TaskConfig(name=name, include_path=str(own_tasks)), **options}

    against = NoninferiorityConfig(vs=["base"], margin=0.1)
    few = {"kind": "lm_eval", "task": TaskConfig(name=str(own_tasks / "which.yaml"), documents=7), **RECORD}
    checks = {"which": check("which", min=0.5), "write": check("write", min=0.9), "few": few,
              "kept": check("which", noninferiority=against), "degenerate": {"max": 1.0}}  # fmt: skip
    gate = policy(checks={"sft": checks})
    verdict = judge(request("sft", trio["sft"], {"base": trio["base"]}, gate))
    found = {check.id: check for check in verdict.checks}
    assert (found["which"].estimate, found["which"].n, found["which"].status) == (0.75, 40, "PASS")
    assert found["which"].bound == clopper_pearson_lower(30, 40, 0.05)
    assert (found["write"].estimate, found["write"].k, found["write"].status) == (0.75, 30, "FAIL")
    assert found["few"].n == 7 and set(verdict.suite_digests) == {"which", "write"}
    differing = found["kept"].details["only_candidate[base]"] + found["kept"].details["only_base"]
    assert differing > 0 and found["kept"].status == "PASS", message(verdict.to_json())
    again = judge(request("sft", trio["sft"], {"base": trio["sft"]}, gate))
    same = {check.id: check for check in again.checks}["kept"].details
    assert (same["only_candidate[base]"], same["only_base"]) == (0, 0)


@pytest.mark.slow
def test_a_group_is_all_documents_and_what_the_library_cannot_do_is_invalid(trio, own_tasks):  # noqa: F811
    def verdict(**task):
        wanted = TaskConfig(**{"include_path": str(own_tasks), **task})
        check = {"kind": "lm_eval", "task": wanted, **RECORD}
        gate = policy(checks={"sft": {"task": check, "degenerate": {"max": 1.0}}})
        return judge(request("sft", trio["sft"], {"base": trio["base"]}, gate))

    def why(name):
        """Of a check that only records: the other check is judged all the same."""
        found = verdict(name=name)
        assert [check.status for check in found.checks] == ["RECORDED", "PASS"] and found.decision == "PASS"
        return found.checks[0].reason

    text = (own_tasks / "which.yaml").read_text()
    (own_tasks / "which.yaml").write_text(text + "num_fewshot: 30\n")
    assert "too long for the model" in why("which")
    (own_tasks / "which.yaml").write_text(text.replace("{{label}}", "{{gone}}"))
    assert "lm-evaluation-harness: " in why("which")
    (own_tasks / "which.yaml").write_text(re.sub("dataset_.*\n", "", text) + "dataset_path: nobody/nothing\n")
    with pytest.raises(DataError, match="what the task reads cannot be had"):  # and no verdict that would be replayed
        verdict(name="which")
    (own_tasks / "which.yaml").write_text(text)
    assert "no metric in common" in why("unlike")
    both = verdict(name="alike").checks[0]
    assert (both.n, both.estimate) == (80, 0.75)
    with pytest.raises(ConfigError, match=r"no task 'wich'.* did you mean"):  # of all that the library has
        verdict(name="wich")
