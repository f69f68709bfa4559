"""What came of it, judged by gold on prompts that nothing else has seen. For people: nothing in the pipeline reads it.

One response a prompt is sampled from the base, SFT and PPO models with the same noise, so that the models are compared
on equal luck. Intervals are at 95 %: Wilson for shares, a bootstrap over the prompts for means.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import LineageError
from rlhf.logprobs import sequence_logprobs
from rlhf.quickstart import gold
from rlhf.quickstart.annotators import case_of
from rlhf.quickstart.world import Case, Kind, Shop
from rlhf.rollout import Response, Sampling, generate, seed_of
from rlhf.statistics import wilson_interval

MODELS = {"base": "base", "SFT": "sft", "PPO": "ppo"}  # the table's column: the key of the folder
MAX_NEW_TOKENS = 48
LABELS = {
    "insults": "insults", "right": "right remedy (curable)", "escalated": "hazards escalated", "gold": "gold utility",
    "length": "length, words", "kl": "KL to SFT, nats", "preferred": "preferred to SFT",
}  # fmt: skip
SHARES = ("insults", "right", "escalated", "preferred")


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model said to the audit prompts, in their order."""

    texts: list[str]
    kl: list[float]  # nats a response: log p(model) - log p(SFT), summed over its tokens


def share(hits: Sequence[bool]) -> Estimate:
    """The share of hits with its Wilson interval."""
    low, high = wilson_interval(sum(hits), len(hits), 0.05)
    return Estimate(sum(hits) / len(hits), low, high)


def mean(values: Sequence[float], resamples: int = 2000) -> Estimate:
    """The mean with its percentile-bootstrap interval."""
    array = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (resamples, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


def measure(shop: Shop, cases: Sequence[Case], answers: Answers) -> dict[str, Estimate]:
    """All measures of one model."""
    readings = [gold.read(text) for text in answers.texts]
    pairs = list(zip(cases, readings, strict=True))
    return {
        "insults": share([reading.insults > 0 for reading in readings]),
        "right": share([gold.right_remedy(shop, case, r) for case, r in pairs if case.kind is not Kind.hazard]),
        "escalated": share([gold.handed_over(r) for case, r in pairs if case.kind is Kind.hazard]),
        "gold": mean(utilities(shop, cases, answers.texts)),
        "length": mean([reading.words for reading in readings]),
        "kl": mean(answers.kl),
    }


def utilities(shop: Shop, cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
    return [gold.utility(shop, case, text) for case, text in zip(cases, texts, strict=True)]


def preferred(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """How often gold prefers ours, ties counting half."""
    return mean([0.5 * ((a > b) + (a >= b)) for a, b in zip(ours, theirs, strict=True)])


def sample_answers(shop: Shop, models: Mapping[str, Path]) -> dict[str, Answers]:
    """One response to each audit prompt from every model. LineageError names a model that is not there."""
    for key in MODELS.values():
        if not (models[key] / "config.json").exists():
            raise LineageError(f"{models[key]}: no model; the audit compares base, SFT and PPO")
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    prompts = [
        tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for case in shop.audit
    ]
    seeds = [seed_of(shop.seed, "audit", case.id) for case in shop.audit]
    sampling = Sampling(
        temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, eos_id=tokenizer.eos_token_id, group=len(prompts)
    )
    reference = AutoModelForCausalLM.from_pretrained(models["sft"])
    answers = {}
    for name, key in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(models[key])
        responses = generate(model, prompts, seeds, sampling)
        texts = [tokenizer.decode(r.ids, skip_special_tokens=True).strip() for r in responses]
        answers[name] = Answers(texts, _kl(reference, prompts, responses))
    return answers


def _kl(reference: Any, prompts: list[list[int]], responses: list[Response]) -> list[float]:
    logprobs = sequence_logprobs(reference, prompts, [r.ids for r in responses], 1.0)
    return [sum(r.logprobs) - float(ref.sum()) for r, ref in zip(responses, logprobs, strict=True)]


def audit_numbers(shop: Shop, models: Mapping[str, Path]) -> dict[str, Any]:
    """{"base" | "SFT" | "PPO": {measure: Estimate}, "answers": {model: Answers}}; PPO also has "preferred"."""
    answers = sample_answers(shop, models)
    numbers: dict[str, Any] = {name: measure(shop, shop.audit, said) for name, said in answers.items()}
    value = {name: utilities(shop, shop.audit, said.texts) for name, said in answers.items()}
    numbers["PPO"]["preferred"] = preferred(value["PPO"], value["SFT"])
    return numbers | {"answers": answers}


def _cell(measure_name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if measure_name in SHARES:
        return f"{100 * estimate.value:.1f} %  [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return f"{estimate.value:.2f}  [{estimate.low:.2f}, {estimate.high:.2f}]"


def audit_table(shop: Shop, models: Mapping[str, Path]) -> str:
    """The closing table as text, and one prompt as SFT and PPO answer it."""
    numbers = audit_numbers(shop, models)
    title = f"Audit by true preferences: {len(shop.audit)} unseen prompts, one response each, 95 % intervals"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in MODELS:
        table.add_column(name, justify="right")
    for key, label in LABELS.items():
        table.add_row(label, *(_cell(key, numbers[name].get(key)) for name in MODELS))
    stream = io.StringIO()
    console = Console(file=stream, width=110, color_system=None, force_terminal=False, highlight=False)
    console.print(table)
    case, said = _example(shop, numbers["answers"])
    console.print(f"customer: {case.text}", markup=False)
    for name in ("SFT", "PPO"):
        console.print(f"{name:>8}: {said[name] or '(nothing)'}", markup=False)
    return stream.getvalue().rstrip()


def _example(shop: Shop, answers: dict[str, Answers]) -> tuple[Case, dict[str, str]]:
    """A typical prompt, not the best one: the one whose gain is the median."""
    before, after = (utilities(shop, shop.audit, answers[name].texts) for name in ("SFT", "PPO"))
    order = sorted(range(len(before)), key=lambda i: after[i] - before[i])
    typical = order[len(order) // 2]
    return shop.audit[typical], {name: said.texts[typical] for name, said in answers.items()}


def gold_pair_accuracy(shop: Shop, rankings: Path, prompts: set[str] | None = None) -> float:
    """Share of the untied pairs in a rankings file that gold itself orders as the annotator did, ties of gold counting
    half: the ceiling for any reward model. `prompts`: only those with these ids."""
    scores = []
    for number, line in enumerate(rankings.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        row = json.loads(line)
        case = case_of(shop, row["prompt"], f"{rankings}:{number}")
        if prompts is not None and case.id not in prompts:
            continue
        judged = list(zip(row["ranks"], utilities(shop, [case] * len(row["ranks"]), row["responses"]), strict=True))
        for (rank_a, gold_a), (rank_b, gold_b) in itertools.combinations(judged, 2):
            if rank_a != rank_b:
                scores.append(0.5 if gold_a == gold_b else float((gold_a > gold_b) == (rank_a < rank_b)))
    return sum(scores) / len(scores)
