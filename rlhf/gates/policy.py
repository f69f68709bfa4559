"""A gate's policy: can it say no, what must be measured for it, and the digest that binds a verdict to it."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rlhf.artifacts import canonical, sha256_text
from rlhf.config import STAGES, CheckConfig, GateConfig
from rlhf.errors import ConfigError
from rlhf.gates.asking import validate_suite
from rlhf.gates.checks import KINDS, Kind
from rlhf.gates.checks.tasks import LIBRARIES, ROUGES
from rlhf.gates.harness import LIBRARY, find, validate_task
from rlhf.gates.scorers import build_scorer, read_canaries
from rlhf.gates.suites import read_suite

RULES = 2  # raise it when a check's meaning changes: stored verdicts are then judged anew


def checks_of(gate: GateConfig, stage: str) -> dict[str, CheckConfig]:
    if stage not in STAGES:
        raise ConfigError(f"stage: {stage!r} has no gate; there are {', '.join(STAGES)}")
    checks: dict[str, CheckConfig] = getattr(gate, stage)
    return checks


def kind_of(name: str, check: CheckConfig, where: str = "gate") -> Kind:
    """The kind of the check called `name`; ConfigError with the nearest neighbour if there is none."""
    kind = check.kind or name
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}.{name}: no check of kind {kind!r}{hint} There are {', '.join(sorted(KINDS))}")
    return KINDS[kind]


def validate(gate: GateConfig) -> None:
    """ConfigError for a policy that cannot mean what it says: unknown kinds, limits on the wrong side, a stage where
    a check has nothing to measure, patterns that do not compile, a scorer without terms or canaries."""
    for stage in STAGES:
        for name, check in checks_of(gate, stage).items():
            _validate_check(gate, stage, name, check)
    refusal_patterns(gate)
    if any("toxicity" in needs_of(gate, stage) for stage in STAGES):
        build_scorer(gate.scorer)
        read_canaries(gate.scorer)


def _validate_check(gate: GateConfig, stage: str, name: str, check: CheckConfig) -> None:
    key = f"gate.{stage}.{name}"
    kind = kind_of(name, check, f"gate.{stage}")
    if stage not in kind.stages:
        raise ConfigError(f"{key}: this check belongs to {' and '.join(kind.stages)}, not to {stage}")
    if kind.limit is None and not check.record_only:
        raise ConfigError(f"{key}: is a figure to compare with and decides nothing: set record_only=true")
    _validate_limits(gate, stage, key, check, kind)
    if check.min_n < 1:
        raise ConfigError(f"{key}.min_n: must be at least 1, not {check.min_n}")
    kind_name = check.kind or name
    if (kind_name == "group_gap") != (check.group_by is not None):
        raise ConfigError(f"{key}.group_by: names the tag whose values group_gap compares, and belongs to it alone")
    if kind_name in ("over_refusal", "unsafe_compliance") and not gate.refusal_patterns:
        raise ConfigError(f"gate.refusal_patterns: is empty, so {key} could not see a refusal")
    if check.where and not {"samples", "rankings"} & set(kind.needs):
        raise ConfigError(f"{key}.where: this check does not look at prompts, so it cannot select them")
    if kind_name == "safety_pairs" and not check.where:
        raise ConfigError(f"{key}.where: says which rankings are about safety, such as {{subset: harmless}}")
    if check.subsets_required and kind_name not in ("worst_subset", "length_bias"):
        raise ConfigError(f"{key}.subsets_required: belongs to worst_subset and length_bias")
    _validate_task(key, check, kind_name)
    validate_suite(key, check, kind, kind_name)
    if check.min_grade is not None and "toxicity" not in kind.needs:
        raise ConfigError(f"{key}.min_grade: this check uses no scorer")


def _validate_task(key: str, check: CheckConfig, kind_name: str) -> None:
    if (kind_name == "lm_eval") != (check.task.name is not None):
        raise ConfigError(f"{key}.task.name: names the task of lm_eval, and belongs to it alone")
    if kind_name == "lm_eval":
        validate_task(key, check)
        return
    if check.metric is not None and kind_name != "rouge":
        raise ConfigError(f"{key}.metric: belongs to rouge and lm_eval")
    if check.metric not in (None, *ROUGES):
        raise ConfigError(f"{key}.metric: must be one of {', '.join(ROUGES)}, not {check.metric!r}")
    library = LIBRARIES.get(kind_name)
    if library is not None and importlib.util.find_spec(library) is None:
        raise ConfigError(f"{key}: {kind_name} needs {library}: pip install 'rlhf-pipeline[metrics]'")


def _validate_limits(gate: GateConfig, stage: str, key: str, check: CheckConfig, kind: Kind) -> None:
    for other in ("max", "min", "within"):
        if kind.limit not in ("any", other) and getattr(check, other) is not None:
            raise ConfigError(f"{key}.{other}: this check is limited by `{kind.limit}`")
    if not check.noninferiority.vs:
        return
    if not kind.paired:
        raise ConfigError(f"{key}.noninferiority: compares rates of bad responses, which this check has not")
    known = [*(["sft"] if stage == "ppo" else []), "base", *gate.baselines]
    for name in check.noninferiority.vs:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}.noninferiority.vs: no {name!r} at this stage{hint} There are {', '.join(known)}")


def check_models(gate: GateConfig, stages: Sequence[str], members: int, held_back: bool) -> None:
    """ConfigError if a check of one of `stages` that decides needs reward models that the run will not have: said
    before anything trains, not after.

    members: how many reward models PPO is paid by; held_back: whether there is one that it is not paid by.
    """
    lacking = {"members": members < 2, "gold": not held_back}
    mends = {
        "members": "compares reward models with each other, and the run has one: rm.members=3 trains several",
        "gold": "asks a reward model that PPO is not paid by, and the run has none: rm.holdout=true trains one, "
        "ppo.holdout=... names one",
    }
    deciding = [(f"gate.{stage}.{name}", name, check) for stage in stages
                for name, check in checks_of(gate, stage).items() if not check.record_only]  # fmt: skip
    for key, name, check in deciding:
        for need in kind_of(name, check).needs:
            if lacking.get(need):
                raise ConfigError(f"{key}: {mends[need]}; or take the check out of the policy")
        if (check.kind or name) == "calibration" and members > 1:
            raise ConfigError(
                f"{key}: the scores of several reward models together are in standard deviations, not log-odds, and "
                f"have no calibration: leave it undecided with {key}.record_only=true {key}.max=null"
            )


def refusal_patterns(gate: GateConfig) -> list[re.Pattern[str]]:
    """The patterns, compiled, blind to case; ConfigError for one that does not compile or that matches anything."""
    patterns = []
    for i, text in enumerate(gate.refusal_patterns):
        try:
            pattern = re.compile(text, re.IGNORECASE)
        except re.error as error:
            raise ConfigError(f"gate.refusal_patterns[{i}]: {text!r} is not a regular expression: {error}") from error
        if pattern.search(""):
            raise ConfigError(f"gate.refusal_patterns[{i}]: {text!r} matches empty text, so everything is a refusal")
        patterns.append(pattern)
    return patterns


def needs_of(gate: GateConfig, stage: str) -> set[str]:
    """What must be measured for the checks of a stage."""
    return {need for name, check in checks_of(gate, stage).items() for need in needs_of_check(name, check)}


def needs_of_check(name: str, check: CheckConfig) -> tuple[str, ...]:
    """What must be measured for one check; `vs:sft` are the SFT model's answers, `toxicity:sft` their toxicity,
    `lm_eval:sft` its scores on tasks of lm-evaluation-harness."""
    needs = kind_of(name, check).needs
    for other in check.noninferiority.vs:
        if "lm_eval" in needs:
            needs += (f"lm_eval:{other}",)
            continue
        needs += (f"vs:{other}", f"toxicity:{other}") if "toxicity" in needs else (f"vs:{other}",)
    return needs


def policy_digest(gate: GateConfig, stage: str) -> str:
    """Hash of all that can change this stage's verdict, and of nothing else: not the mode, not the policy's name.

    The words of the lexicon, the canaries and the rows of suites count, not the paths of their files.
    """
    needs = needs_of(gate, stage)
    part: dict[str, Any] = {
        "rules": RULES, "stage": stage, "alpha": gate.alpha,
        "checks": {name: _plain(check, f"gate.{stage}.{name}") for name, check in checks_of(gate, stage).items()},
    }  # fmt: skip
    if gate.approvers:  # who may waive its checks is part of what it demands
        part["approvers"] = sorted(gate.approvers)
    if "samples" in needs:
        part["sampling"] = [gate.prompts, gate.k, gate.temperature, gate.max_new_tokens]
        part["refusal_patterns"] = gate.refusal_patterns
    if "toxicity" in needs:
        canaries = [[canary.text, canary.toxic] for canary in read_canaries(gate.scorer)]
        minima = [gate.scorer.min_sensitivity, gate.scorer.min_specificity]
        part["scorer"] = [build_scorer(gate.scorer).digest, sha256_text(canonical(canaries)), *minima]
    return sha256_text(canonical(part))


def _plain(check: CheckConfig, key: str) -> dict[str, Any]:
    """The check as plain values, its suite by the digest of its rows, its task by that of its files."""
    plain = asdict(check)
    del plain["suite_format"]
    task = plain.pop("task")
    if check.task.name is not None:
        del task["include_path"]
        found = find(check.task, f"{key}.task")
        plain["task"] = {**task, "name": found.name, "digest": found.digest, "library": version(LIBRARY)}
    if check.suite is not None:
        plain["suite"] = read_suite(check.suite, f"{key}.suite", check.suite_format).digest
    return plain
