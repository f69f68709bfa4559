"""Paired non-inferiority: is the candidate's rate of bad prompts at most a margin above that of another model?

The prompts and the seeds are the same, so only the prompts on which the two differ say anything. Tango's score bound
decides. That two rates are "not significantly different" is no evidence that they are alike and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.config import CheckConfig
from rlhf.errors import Invalid
from rlhf.gates.deciding import SHOWN, Rules, units_needed, worst_status
from rlhf.gates.verdict import Finding
from rlhf.statistics import pairs_needed, tango_interval

Events = Mapping[str, bool]


def decide_noninferior(
    finding: Finding, events: Events, others: Mapping[str, Events], check: CheckConfig, rules: Rules, what: str
) -> None:
    """Add the comparison with each of `others` to `finding`, whose status becomes the worst of all.

    Where the check has no limit of its own, the difference from the other that is nearest to its margin (or farthest
    beyond it) stands for estimate and bound.
    """
    first = next(iter(others.values()))
    finding.details["baseline"] = sum(first.values()) / len(first)
    found = [compare_events(name, events, theirs, check, rules) for name, theirs in others.items()]
    add_comparisons(finding, found, check, what)


def add_comparisons(finding: Finding, found: list[Finding], check: CheckConfig, what: str) -> None:
    """Make the status of `finding` the worst of its own and of those of the comparisons `found`."""
    alone = check.max is None and check.min is None and check.within is None
    for one in found:
        finding.details |= one.details
    worst = max(found, key=lambda one: (worst_status([one.status]), one.bound or 0.0))
    if alone:
        finding.k, finding.estimate, finding.bound = None, worst.estimate, worst.bound
        finding.bound_kind, finding.limit, finding.side = worst.bound_kind, worst.limit, "max"
        finding.status, finding.reason, finding.needed_n = worst.status, f"{what}: {worst.reason}", worst.needed_n
        finding.worst = worst.worst
        return
    if worst_status([worst.status]) > worst_status([finding.status]):
        finding.status, finding.needed_n = worst.status, worst.needed_n
        finding.worst = worst.worst or finding.worst
    if worst.status != "PASS":
        finding.reason += f"; {worst.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """By how much a model does worse than another on the same units, with a bound on each side."""

    estimate: float
    low: float
    high: float
    n: int
    worst: list[str]  # units to look at
    bound_kind: str


def compare_losses(name: str, lost: Loss, check: CheckConfig) -> Finding:
    """Judge a paired loss that is no difference of rates by the margin."""
    margin = check.noninferiority.margin
    assert margin is not None  # where there is a `vs`
    finding = Finding(
        status="PASS", n=lost.n, estimate=lost.estimate, bound=lost.high if math.isfinite(lost.high) else None,
        bound_kind=lost.bound_kind, limit=margin, side="max", worst=lost.worst,
        needed_n=units_needed(lost.n, lost.estimate, lost.high, margin),
        details={f"difference[{name}]": lost.estimate, f"margin[{name}]": margin},
    )  # fmt: skip
    if finding.bound is not None:
        finding.details[f"bound[{name}]"] = finding.bound
    figures = f"against {name}: worse by {lost.estimate:.4f}, bound {lost.high:.4f}, margin {margin:g}"
    few = "too few units differ" if finding.bound is None else ""
    _judge(finding, check, (lost.low, lost.high), figures, few=few, rate="this difference")
    return finding


def compare_events(name: str, events: Events, theirs: Events, check: CheckConfig, rules: Rules) -> Finding:
    """Judge the difference of two rates on the same units, the candidate's `events` less those of `name`."""
    margin = check.noninferiority.margin
    assert margin is not None  # where there is a `vs`
    if events.keys() != theirs.keys():
        raise Invalid(f"{name} was not measured on the same prompts: nothing can be compared by prompt")
    n = len(events)
    only_mine = [unit for unit, bad in events.items() if bad and not theirs[unit]]
    b, c = len(only_mine), sum(bad and not events[unit] for unit, bad in theirs.items())
    low, high = tango_interval(b, c, n, 2 * rules.alpha)
    finding = Finding(
        status="PASS", n=n, estimate=(b - c) / n, bound=high, bound_kind=f"tango_upper_{1 - rules.alpha:g}",
        limit=margin, side="max", needed_n=pairs_needed(b, c, n, margin, rules.alpha), worst=only_mine[:SHOWN],
        details={f"only_candidate[{name}]": b, f"only_{name}": c, f"difference[{name}]": (b - c) / n,
                 f"bound[{name}]": high, f"margin[{name}]": margin},
    )  # fmt: skip
    least = pairs_needed(0, 0, n, margin, rules.alpha)
    figures = f"against {name}: {b} prompts are bad with the candidate alone, {c} with {name} alone: difference "
    figures += f"{finding.estimate:.4f}, bound {high:.4f}, margin {margin:g}"
    few = least is not None and n < least
    hint = f"n={n} is too few; n >= {least} is needed at the least: raise gate.prompts"
    _judge(finding, check, (low, high), figures, few=hint if few else "", rate="these rates")
    return finding


def _judge(
    finding: Finding, check: CheckConfig, interval: tuple[float, float], figures: str, *, few: str, rate: str
) -> None:
    """Hold both bounds of a difference against the margin, which is the finding's limit.

    few: why n is too small to show anything, if it is; rate: at what `needed_n` would do.
    """
    low, high = interval
    margin = finding.limit
    assert margin is not None
    if low > margin:
        finding.status, finding.reason = "FAIL", f"{figures}: shown to be worse"
    elif finding.n < check.min_n:
        finding.status, finding.reason = "INCONCLUSIVE", f"{figures}: n={finding.n} is below min_n={check.min_n}"
    elif high <= margin:
        finding.reason = f"{figures}: the bound keeps the margin"
    elif few:
        finding.status, finding.reason = "INCONCLUSIVE", f"{figures}: {few}"
    else:
        more = f"; at {rate} about n={finding.needed_n} would do" if finding.needed_n else ""
        finding.status, finding.reason = "FAIL", f"{figures}: not shown to be no worse{more}"
