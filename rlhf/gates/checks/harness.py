"""The check of a task of lm-evaluation-harness: its own metric, document by document, under a bound of ours.

The harness's figure of a task is the estimate; its standard errors are not used. What decides is the exact bound where
every document is right or wrong, that of a mean where it has a value, and the percentile bootstrap over documents where
the metric is no mean (a corpus BLEU, a perplexity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.config import CheckConfig
from rlhf.errors import ConfigError, Invalid
from rlhf.gates.comparing import Loss, add_comparisons, compare_events, compare_losses
from rlhf.gates.deciding import SHOWN, Rules, decide_mean, decide_rate, decide_within, settle
from rlhf.gates.harness import check_direction, task_key
from rlhf.gates.measured import Measured, TaskMetric, TaskScores, finite
from rlhf.gates.verdict import Finding
from rlhf.statistics import Side, clopper_pearson_lower, clopper_pearson_upper, mean_bound

SIDES: tuple[Side, Side] = ("lower", "upper")
RESAMPLES = 400  # of a metric that is no mean: each of them may score a whole corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    name: str
    documents: str
    metric: TaskMetric

    @property
    def is_rate(self) -> bool:
        """Whether every document is right or wrong, so that the exact bound holds."""
        return self.metric.aggregate is None and all(value in (0, 1) for value in self.metric.values.values())

    def numbers(self) -> dict[str, float]:
        return {doc: _number(value, f"the {self.name} of {doc}") for doc, value in self.metric.values.items()}


def _number(value: Any, what: str) -> float:
    try:
        return finite(float(value), what)
    except (TypeError, ValueError) as error:
        raise Invalid(f"{what} is {value!r}, not a number") from error


def lm_eval(measured: Measured, check: CheckConfig, rules: Rules) -> Finding:
    """`min`, `max` or `within` of one metric of a task, and its difference from other models by document."""
    key = task_key(check.task)
    mine = _choose(_scores(measured, "", key), check)
    finding = _alone(mine, check, rules)
    finding.details["higher_is_better"] = float(mine.metric.higher_is_better)
    if check.noninferiority.vs:
        others = {name: _choose(_scores(measured, name, key), check) for name in check.noninferiority.vs}
        found = [_compare(name, mine, theirs, check, rules) for name, theirs in others.items()]
        finding.details["baseline"] = _estimate(next(iter(others.values())))
        add_comparisons(finding, found, check, mine.name)
    return finding


def _scores(measured: Measured, model: str, key: str) -> TaskScores:
    scores = measured.tasks[model][key]
    if isinstance(scores, Invalid):
        raise scores
    return scores


def _choose(scores: TaskScores, check: CheckConfig) -> _Chosen:
    """The metric that the check names, or the only one; Invalid for any other, with those that there are."""
    fits = {key: metric for key, metric in scores.metrics.items()
            if check.metric in (None, key[0]) and check.task.filter in (None, key[1])}  # fmt: skip
    if len(fits) != 1:
        known = ", ".join(f"{metric} (filter {name})" for metric, name in scores.metrics)
        asked = f"metric={check.metric} task.filter={check.task.filter}"
        raise Invalid(f"{scores.name}: {asked} names {len(fits)} of its metrics, not one: it has {known or 'none'}")
    ((name, _), metric) = next(iter(fits.items()))
    try:
        check_direction(scores.name, check, name, metric.higher_is_better)
    except ConfigError as error:
        raise Invalid(str(error)) from error
    return _Chosen(name=f"{scores.name}: {name}", documents=scores.documents, metric=metric)


def _alone(mine: _Chosen, check: CheckConfig, rules: Rules) -> Finding:
    if check.within is not None:
        low, high, kind = _bounds(mine, rules)
        finding = Finding(status="RECORDED", n=len(mine.metric.values), estimate=_estimate(mine), bound_kind=kind)
        decide_within(finding, check, low, high, mine.name)
        return finding
    good = check.min is not None or (check.max is None and mine.metric.higher_is_better)
    if mine.is_rate:
        events = {doc: bool(value) for doc, value in mine.metric.values.items()}
        return decide_rate(events, check, rules, mine.name, good=good)
    if mine.metric.aggregate is None:
        numbers = mine.numbers()
        limited = check.max is not None or check.min is not None or check.record_only
        shown = check if limited else CheckConfig(record_only=True)
        return decide_mean(list(numbers.values()), list(numbers), shown, rules, mine.name, good=good)
    low, high, kind = _bounds(mine, rules)
    finding = Finding(status="RECORDED", n=len(mine.metric.values), estimate=_estimate(mine), bound_kind=kind)
    finding.bound = low if good else high
    if check.max is not None or check.min is not None:
        settle(finding, check, other=high if good else low, possible=True, what=mine.name)
    return finding


def _estimate(chosen: _Chosen) -> float:
    if chosen.metric.aggregate is None:
        numbers = chosen.numbers()
        return sum(numbers.values()) / len(numbers)
    return _aggregate(chosen, list(chosen.metric.values))


def _aggregate(chosen: _Chosen, ids: list[str]) -> float:
    """The metric of some documents, of one as often as it is named."""
    assert chosen.metric.aggregate is not None
    try:
        value = chosen.metric.aggregate([chosen.metric.values[doc] for doc in ids])
    except Exception as error:  # the task's own code
        raise Invalid(f"{chosen.name}: its aggregation raises {type(error).__name__}: {error}") from error
    return _number(value, chosen.name)


def _bounds(chosen: _Chosen, rules: Rules) -> tuple[float, float, str]:
    """Both one-sided bounds, and what kind they are. Invalid where there are too few documents for one."""
    n, level = len(chosen.metric.values), 1 - rules.alpha
    if chosen.is_rate:
        k = sum(bool(value) for value in chosen.metric.values.values())
        low, high = clopper_pearson_lower(k, n, rules.alpha), clopper_pearson_upper(k, n, rules.alpha)
        return low, high, f"clopper_pearson_{level:g}"
    if chosen.metric.aggregate is None:
        return *_mean_bounds(chosen.numbers(), chosen.name, rules), f"bootstrap_t_{level:g}"
    ids = list(chosen.metric.values)
    scores = [_aggregate(chosen, [ids[i] for i in drawn]) for drawn in _resamples(n, chosen.name, rules)]
    return *_percentiles(scores, rules), f"document_bootstrap_{level:g}"


def _mean_bounds(numbers: dict[str, float], what: str, rules: Rules) -> tuple[float, float]:
    _require_two(len(numbers), what)
    low, high = (mean_bound(list(numbers.values()), list(numbers), rules.alpha, side, rules.seed).bound
                 for side in SIDES)  # fmt: skip
    return low, high


def _require_two(n: int, what: str) -> None:
    if n < 2:
        raise Invalid(f"{what}: a bound needs at least 2 documents, there is {n}")


def _resamples(n: int, what: str, rules: Rules) -> Any:
    """Documents drawn again. Of one document every draw is the same, and its bound would have no width."""
    _require_two(n, what)
    return np.random.default_rng(rules.seed).integers(0, n, size=(RESAMPLES, n))


def _percentiles(scores: list[float], rules: Rules) -> tuple[float, float]:
    ordered, cut = sorted(scores), int(rules.alpha * RESAMPLES)
    return ordered[cut], ordered[-1 - cut]


def _compare(name: str, mine: _Chosen, theirs: _Chosen, check: CheckConfig, rules: Rules) -> Finding:
    """How much worse than another model, on the same documents. Invalid if they are not the same."""
    if mine.documents != theirs.documents or mine.metric.values.keys() != theirs.metric.values.keys():
        raise Invalid(f"{name} was not asked the same documents: nothing can be compared by document")
    higher = mine.metric.higher_is_better
    if mine.is_rate and theirs.is_rate:
        bad, their_bad = ({doc: bool(value) != higher for doc, value in chosen.metric.values.items()}
                          for chosen in (mine, theirs))  # fmt: skip
        return compare_events(name, bad, their_bad, check, rules)
    sign, ids = 1.0 if higher else -1.0, list(mine.metric.values)
    if mine.metric.aggregate is None:
        own, other = mine.numbers(), theirs.numbers()
        by_doc = {doc: sign * (other[doc] - own[doc]) for doc in ids}
        low, high = _mean_bounds(by_doc, mine.name, rules)
        worst = sorted((doc for doc in ids if by_doc[doc] > 0), key=lambda doc: -by_doc[doc])[:SHOWN]
        kind, estimate = "bootstrap_t", sum(by_doc.values()) / len(by_doc)
    else:
        lost = [sign * (_aggregate(theirs, [ids[i] for i in drawn]) - _aggregate(mine, [ids[i] for i in drawn]))
                for drawn in _resamples(len(ids), mine.name, rules)]  # fmt: skip
        (low, high), worst = _percentiles(lost, rules), []
        kind, estimate = "document_bootstrap", sign * (_estimate(theirs) - _estimate(mine))
    loss = Loss(estimate=estimate, low=low, high=high, n=len(ids), worst=worst,
                bound_kind=f"{kind}_upper_{1 - rules.alpha:g}")  # fmt: skip
    return compare_losses(name, loss, check)
