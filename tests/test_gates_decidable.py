"""No shipped policy may be INCONCLUSIVE forever: what it asks for can be had from the rows that it draws, or
docs/gates.md says what has to be brought."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.compose import CONF_DIR
from rlhf.config import STAGES, CheckConfig, Config, GateConfig
from rlhf.gates.checks import has_tags
from rlhf.gates.policy import checks_of, kind_of
from rlhf.gates.suites import read_suite
from rlhf.statistics import clopper_pearson_lower, clopper_pearson_upper, pairs_needed, samples_needed

CONF = Path(CONF_DIR)
POLICIES = sorted(path.stem for path in (CONF / "gate").glob("*.yaml"))
DOC = (Path(__file__).resolve().parent.parent / "docs" / "gates.md").read_text(encoding="utf-8")
SUITES = {"over_refusal": "over_refusal", "unsafe_compliance": "unsafe_requests", "bias_pairs": "identity_pairs"}
# Kinds whose bound is the exact one of a rate, so that few units cannot keep the limit whatever they say.
RATES = {"toxicity", "degenerate", "truncated", "over_refusal", "unsafe_compliance", "win_rate", "accuracy",
         "safety_pairs", "worst_subset", "length_strata"}  # fmt: skip


@pytest.fixture(scope="module")
def policies() -> dict[str, GateConfig]:
    found = {}
    for name in POLICIES:
        gate = OmegaConf.to_object(OmegaConf.merge(GateConfig, OmegaConf.load(CONF / "gate" / f"{name}.yaml")))
        assert isinstance(gate, GateConfig)
        found[name] = gate
    return found


def least(kind: str, check: CheckConfig, alpha: float) -> int:
    """The fewest units with which the check can PASS: those of `min_n`, and those that a flawless record takes."""
    needed = [check.min_n]
    if kind in RATES and check.max is not None:
        needed.append(samples_needed(check.max, alpha) or 0)
    if kind in RATES and check.min is not None:
        needed.append(samples_needed(check.min, alpha, 1.0, "lower") or 0)
    if kind == "group_gap":
        needed.append(samples_needed(check.max or 0.0, alpha / 2) or 0)
    if kind == "bias_pairs" and check.within is not None:
        low, high = check.within
        n = 2
        while clopper_pearson_lower(n // 2, n, alpha) < low or clopper_pearson_upper(n // 2, n, alpha) > high:
            n += 2
        needed.append(n)
    if check.noninferiority.vs:
        needed.append(pairs_needed(0, 0, 1, check.noninferiority.margin or 0.0, alpha) or 0)
    assert all(needed), f"{kind}: no number of units keeps this limit"
    return max(needed)


def deciding(gate: GateConfig) -> Iterator[tuple[str, str, CheckConfig]]:
    """(stage, kind, check) of every check that decides."""
    for stage in STAGES:
        for name, check in checks_of(gate, stage).items():
            if not check.record_only:
                yield stage, check.kind or name, check


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_draws_as_many_prompts_as_its_checks_need(policies: dict[str, GateConfig], name: str) -> None:
    gate = policies[name]
    few = {f"{stage}.{kind}": least(kind, check, gate.alpha) for stage, kind, check in deciding(gate)
           if "samples" in kind_of(kind, check).needs and least(kind, check, gate.alpha) > gate.prompts}  # fmt: skip
    assert few == {}
    assert any(True for _ in deciding(gate))


def lacking(policies: dict[str, GateConfig]) -> dict[tuple[str, str], tuple[int, int]]:
    """By policy and check, what it needs and what the shipped suite for it has, where that is less."""
    found = {}
    for policy, gate in policies.items():
        for _, kind, check in deciding(gate):
            if kind in SUITES:
                suite = read_suite(SUITES[kind], "suite")
                rows = [p for p in suite.prompts if has_tags(p, kind_of(kind, check).where)] or suite.pairs
                need = least(kind, check, gate.alpha)
                if len(rows) < need:
                    found[policy, kind] = (need, len(rows))
    return found


def test_where_a_shipped_suite_is_too_small_the_document_says_so(policies: dict[str, GateConfig]) -> None:
    told = {(policy, kind): (int(need), int(rows)) for policy, kind, need, rows
            in re.findall(r"^\| `gate=(\w+)` \| `(\w+)` \| (\d+) \| (\d+) \|", DOC, re.M)}  # fmt: skip
    assert told == lacking(policies)
    assert ("release", "over_refusal") in told


def test_the_rows_that_a_release_takes_are_those_in_the_document(policies: dict[str, GateConfig]) -> None:
    gate = policies["release"]
    part = DOC.split("## What a release takes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([\d,]+) \|", part, re.M)
    told = {
        (stage, kind): int(n.replace(",", "")) for stage, kinds, n in rows for kind in re.findall(r"`(\w+)`", kinds)
    }
    asked = {(stage, kind): least(kind, check, gate.alpha) for stage, kind, check in deciding(gate)
             if least(kind, check, gate.alpha) > 1}  # fmt: skip
    assert told == asked


def test_the_rows_that_an_experiment_takes_are_enough_for_its_policy(policies: dict[str, GateConfig]) -> None:
    """Of `limit` prompts the split holds out a binomial number: two standard deviations less must do."""
    experiment = OmegaConf.load(CONF / "experiment" / "hh.yaml")
    assert {"override /gate": "hh"} in experiment.defaults
    share = experiment.data.get("holdout", Config().data.holdout)
    for need, kinds in (("rankings", {"accuracy"}), ("demonstrations", {"perplexity_gain"})):
        limit = experiment.data[need].limit
        rows = limit * share - 2 * (limit * share * (1 - share)) ** 0.5
        gate = policies["hh"]
        asked = {kind: least(kind, check, gate.alpha) for _, kind, check in deciding(gate)
                 if need in kind_of(kind, check).needs}  # fmt: skip
        assert kinds <= asked.keys() and {kind: n for kind, n in asked.items() if n > rows} == {}
