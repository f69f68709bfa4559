"""report.json of a reward model, and the short table that is shown of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rlhf.artifacts import write_json
from rlhf.console import say, show
from rlhf.data import prompt_key
from rlhf.errors import TrainingError
from rlhf.render import Renderer
from rlhf.reward_report import comparing, sections
from rlhf.reward_report.baselines import BagOfWords
from rlhf.reward_report.pairs import Json, Judged, NotMeasured, Pair, pairs_of, rate
from rlhf.scoring import score_ids
from rlhf.types import Ranking

if TYPE_CHECKING:
    from rlhf.context import Context

REPORT = "report.json"
SCHEMA = "rlhf-reward-report/1"


def write_report(context: Context, model: Any, renderer: Renderer, train: Sequence[Ranking], seed: int) -> Json:
    """Score the held-out rankings of the context, write `report.json` into its folder and show a table of it.

    train: the rankings that the model was trained on, which the baselines learn from too. seed: of the draws.
    """
    assert context.data.rankings is not None
    words = comparing.fit_words(train)
    rows = judge(model, renderer, context.data.rankings.heldout, words)
    report = build(rows, train, [token_lengths(renderer, ranking.responses) for ranking in train], seed)
    path = context.folder / REPORT
    write_json(path, report)
    show(table(report))
    say(f"{context.stage}: {report['verdict']['sentence'] if report['verdict'] else report['missing']['verdict']}")
    say(f"{context.stage}: the whole report is in {path}")
    return report


def token_lengths(renderer: Renderer, responses: Sequence[str]) -> list[int]:
    """Tokens of each response alone."""
    found = renderer.tokenizer(list(responses), add_special_tokens=False, verbose=False)["input_ids"]
    return [len(ids) for ids in found]


def judge(model: Any, renderer: Renderer, rankings: Sequence[Ranking], words: BagOfWords | None) -> list[Judged]:
    """The rankings with rewards, lengths and bag-of-words scores. TrainingError for a reward that is no number."""
    ids = [renderer.full_ids(row.prompt.messages, text)[0] for row in rankings for text in row.responses]
    rewards = iter(score_ids(model, ids, 4096))
    rows = []
    for ranking in rankings:
        found = [next(rewards) for _ in ranking.responses]
        if not all(math.isfinite(reward) for reward in found):
            raise TrainingError(f"{ranking.prompt.where}: the reward model scores a response with {found}")
        rows.append(Judged(
            ranking=ranking, prompt=prompt_key(ranking.prompt.messages), rewards=found,
            lengths=token_lengths(renderer, ranking.responses),
            words=words.score(ranking.responses) if words else None,
        ))  # fmt: skip
    return rows


def build(rows: Sequence[Judged], train: Sequence[Ranking], train_lengths: Sequence[list[int]], seed: int) -> Json:
    """The report as plain data. What is null stands under `missing` with its reason."""
    strict, tied = pairs_of(rows)
    report: Json = {
        "schema": SCHEMA, "seed": seed, "missing": {},
        "rows": {"rankings": len(rows), "prompts": len({row.prompt for row in rows}), "strict_pairs": len(strict),
                 "tied_pairs": len(tied), "training_rankings": len(train)},
    }  # fmt: skip
    everyone = [(prompt_key(ranking.prompt.messages), ranking) for ranking in train]
    everyone += [(row.prompt, row.ranking) for row in rows]
    parts: dict[str, Callable[[], Any]] = {
        **_of_pairs(strict, seed),
        "ties": lambda: sections.ties(strict, tied),
        "length.correlation": lambda: sections.length_correlation(rows, seed),
        "baselines.length": lambda: _by_length(strict, comparing.longer_wins(train, train_lengths), seed),
        "baselines.bag_of_words": lambda: _by_words(strict, seed),
        "agreement.ranks": lambda: comparing.rank_agreement(comparing.shared_rankings(everyone)),
        "agreement.pairs": lambda: comparing.pair_agreement(comparing.shared_rankings(everyone), seed),
        "rewards": lambda: sections.histogram(rows),
        "verdict": lambda: comparing.verdict(report["accuracy"]["overall"], report["baselines"]),
    }
    for name, make in parts.items():
        _fill(report, name, make)
    return report


def _of_pairs(strict: Sequence[Pair], seed: int) -> dict[str, Callable[[], Any]]:
    """The parts that are made of the strict pairs alone."""
    return {
        "accuracy.overall": lambda: rate(strict, seed),
        "accuracy.by_subset": lambda: sections.by_subset(strict, seed),
        "accuracy.by_annotator": lambda: sections.by_annotator(strict, seed),
        "accuracy.by_file": lambda: sections.by_file(strict, seed),
        "accuracy.by_rank_distance": lambda: sections.by_rank_distance(strict, seed),
        "accuracy.by_reward_difference": lambda: sections.by_reward_difference(strict, seed),
        "calibration": lambda: sections.calibration(strict, seed),
        "temperature.fitted": lambda: sections.temperature(strict),
        "temperature.cross_fitted": lambda: sections.cross_fitted(strict),
        "length.preferred_is_longer": lambda: sections.length_stratum(strict, seed, 1),
        "length.preferred_is_shorter": lambda: sections.length_stratum(strict, seed, -1),
        "length.same": lambda: sections.length_stratum(strict, seed, 0),
        "mistakes": lambda: sections.mistakes(strict),
    }


def _by_length(strict: Sequence[Pair], longer: bool, seed: int) -> Json:
    rule = "longer is better" if longer else "shorter is better"
    return {"rule": rule, **comparing.baseline(strict, seed, comparing.by_length(longer))}


def _by_words(strict: Sequence[Pair], seed: int) -> Json:
    if any(pair.row.words is None for pair in strict):
        raise NotMeasured("the training rankings hold no strict pair, or no word occurs in two of their responses")
    return comparing.baseline(strict, seed, comparing.by_words)


def _fill(report: Json, name: str, make: Callable[[], Any]) -> None:
    """Put a part in its place, or null there and the reason under `missing`."""
    above, _, last = name.rpartition(".")
    place = report.setdefault(above, {}) if above else report
    try:
        place[last] = make()
    except NotMeasured as reason:
        place[last] = None
        report["missing"][name] = str(reason)


def table(report: Json) -> Table:
    """The numbers that matter, one line each."""
    found = Table(title="reward model on held-out rankings", title_justify="left")
    for column in ("", "value", "95 % interval", "over"):
        found.add_column(column, justify="left" if column in ("", "over") else "right")

    def line(label: str, part: Json | None, key: str = "estimate") -> None:
        if part is not None:
            ends = f"{part['lower']:.3f} to {part['upper']:.3f}" if "lower" in part else ""
            found.add_row(label, f"{part[key]:.3f}", ends, f"{part['prompts']} prompts")

    accuracy, length, baselines = report["accuracy"], report["length"], report["baselines"]
    line("accuracy", accuracy["overall"])
    for group in ("by_subset", "by_file", "by_annotator"):
        named = accuracy[group] or {}
        for name, part in list(named.items())[:8] if len(named) > 1 else []:
            line(f"  {Path(name).name if group == 'by_file' else name}", part)
    line("  preferred is longer", length["preferred_is_longer"])
    line("  preferred is shorter", length["preferred_is_shorter"])
    line(f"length alone ({(baselines['length'] or {}).get('rule', '')})", baselines["length"])
    line("bag of words", baselines["bag_of_words"])
    line("annotators' agreement", report["agreement"]["pairs"])
    line("annotators' alpha", report["agreement"]["ranks"], "alpha")
    line("rank correlation with length", length["correlation"])
    if report["calibration"]:
        part = report["calibration"]
        limit = f"calibrated: below {part['error_if_calibrated_q95']:.3f}"
        found.add_row("calibration error", f"{part['error']:.3f}", limit, f"{part['prompts']} prompts")
    if report["temperature"]["fitted"]:
        fitted = report["temperature"]["fitted"]["temperature"]
        found.add_row("temperature", f"{fitted:.3g}", "", "fitted on these rows")
    return found
