"""What a check is, and which samples it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf.config import CheckConfig
from rlhf.errors import Invalid
from rlhf.gates.comparing import decide_noninferior
from rlhf.gates.deciding import Rules, decide_rate
from rlhf.gates.measured import Measured, Sample
from rlhf.gates.verdict import Finding
from rlhf.types import Prompt

SAFE, UNSAFE = {"safe": True}, {"safe": False}  # the tag that a row of gate prompts says it with

Check = Callable[[Measured, CheckConfig, Rules], Finding]
Bad = Callable[[Sample], bool]


@dataclass(frozen=True, slots=True)
class Kind:
    run: Check
    needs: tuple[str, ...]  # names of judge.SOURCES
    limit: str | None  # "max", "min", "within", "any" of them, or None: can only be recorded
    stages: tuple[str, ...] = ("sft", "ppo")
    where: dict[str, Any] = field(default_factory=dict)  # tags that its prompts must have, beside the policy's
    paired: bool = False  # a rate of bad responses, which `noninferiority` can compare with that of other models


def same(tag: Any, wanted: Any) -> bool:
    """Tags from CSV are text: True, "true" and "True" are the same value."""
    return bool(tag == wanted) or str(tag).lower() == str(wanted).lower()


def has_tags(prompt: Prompt, where: dict[str, Any]) -> bool:
    return all(key in prompt.tags and same(prompt.tags[key], value) for key, value in where.items())


def select(samples: Iterable[Sample], where: dict[str, Any]) -> list[Sample]:
    """The samples whose prompt has all the tags of `where`; Invalid if there are none: nothing passes on nothing."""
    chosen = [sample for sample in samples if has_tags(sample.prompt, where)]
    if not chosen:
        raise Invalid(no_prompts(where))
    return chosen


def no_prompts(where: dict[str, Any]) -> str:
    tags = ", ".join(f"{key}={value}" for key, value in where.items())
    return f"no gate prompt has the tags {tags}: give prompts that do, or take the check out of the policy"


def any_of_k(samples: Iterable[Sample], bad: Bad) -> dict[str, bool]:
    """By prompt, whether any of its samples is bad: the k answers to one prompt are not independent, prompts are."""
    units: dict[str, bool] = {}
    for sample in samples:
        units[sample.prompt.id] = units.get(sample.prompt.id, False) or bad(sample)
    return units


def bad_rate(
    measured: Measured, check: CheckConfig, rules: Rules, what: str, where: dict[str, Any],
    bad_of: Callable[[list[Sample]], Bad],
) -> Finding:  # fmt: skip
    """Judge the rate of prompts with a bad response, by `max` and, if the check has it, against other models.

    bad_of: from all the samples of one model to what is bad among them.
    """
    chosen = select(measured.samples, where)
    events = any_of_k(chosen, bad_of(chosen))
    finding = decide_rate(events, check, rules, what)
    if check.noninferiority.vs:
        others = {name: select(measured.others[name], where) for name in check.noninferiority.vs}
        theirs = {name: any_of_k(samples, bad_of(samples)) for name, samples in others.items()}
        decide_noninferior(finding, events, theirs, check, rules, what)
    return finding
