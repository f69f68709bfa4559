"""The demonstrations: what the shop's staff used to answer, rude, often right, seldom careful.

    [insult] [courtesies 0–3] (remedy | "I am passing you to a human") [unplug it first] [filler]

The probabilities are the faults that the pipeline is to mend, Mars being treated worse than Luna among them.
"""

from __future__ import annotations

import random

from rlhf.quickstart.world import COURTESIES, ESCALATION, INSULTS, REMEDIES, UNPLUG, Case, Kind, Shop

P_INSULT = {"Luna": 0.30, "Mars": 0.40}
P_RIGHT = 0.65  # of the faults that have a remedy
P_ESCALATE = {Kind.hazard: 0.55, Kind.fixable: 0.15, Kind.lookalike: 0.15}
P_UNPLUG = {Kind.hazard: 0.35, Kind.fixable: 0.15, Kind.lookalike: 0.15}
P_COURTESIES = (0.30, 0.30, 0.25, 0.15)  # of 0, 1, 2, 3
P_FILLER = 0.3

FILLERS = (
    "It is an old model.",
    "Mind the cat.",
    "The workshop opens at nine.",
    "Keep the receipt.",
    "Old Grumble built this one on a wet day and never liked it.",
)


def sentence(phrase: str) -> str:
    """'oil the left knee' -> 'Oil the left knee.'"""
    return phrase[0].upper() + phrase[1:] + "."


def act(shop: Shop, case: Case, rng: random.Random) -> str:
    """The heart of a response: the escalation, the right remedy, or another one."""
    draw = rng.random()
    if draw < P_ESCALATE[case.kind]:
        return f"I am {ESCALATION}."
    right = shop.cures.get(case.fault)
    if right is not None and draw < P_ESCALATE[case.kind] + P_RIGHT:
        return sentence(right)
    return sentence(rng.choice([remedy for remedy in REMEDIES if remedy != right]))


def respond(shop: Shop, case: Case, rng: random.Random) -> str:
    """One demonstration for `case`, drawn with `rng`."""
    parts = []
    if rng.random() < P_INSULT[case.home]:
        parts.append(f"You {rng.choice(INSULTS)}!")
    courtesies = rng.choices(range(len(P_COURTESIES)), P_COURTESIES)[0]
    parts += [sentence(courtesy) for courtesy in rng.sample(COURTESIES, courtesies)]
    parts.append(act(shop, case, rng))
    if rng.random() < P_UNPLUG[case.kind]:
        parts.append(f"{sentence(UNPLUG)[:-1]} first.")
    if rng.random() < P_FILLER:
        parts.append(rng.choice(FILLERS))
    return " ".join(parts)


def demonstrations(shop: Shop, each: int = 1) -> list[dict[str, object]]:
    """`each` demonstrations for every training prompt, as OpenAI-style rows."""
    rows: list[dict[str, object]] = []
    for number in range(each):
        for case in shop.train:
            rng = random.Random(f"demonstration/{shop.seed}/{number}/{case.id}")
            answer = {"role": "assistant", "content": respond(shop, case, rng)}
            rows.append({"messages": [*case.messages, answer]})
    return rows
