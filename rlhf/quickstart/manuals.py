"""The shop's repair manuals: the plain text that the base model has read, and that it should not forget.

They hold the right remedy of each fault, so the base model has seen the facts; what it has not seen is a customer.
"""

from __future__ import annotations

import random

from rlhf.quickstart.grammar import sentence
from rlhf.quickstart.world import CURABLE, FAULTS, ROBOTS, Kind, Shop

TRAIN_PAGES, HELDOUT_PAGES = 1200, 120
P_TROUBLE = 0.7

_PARTS = ("shell", "tail", "antenna", "left foot", "hat", "front door", "kettle", "wheel")
_STUFF = ("tin", "copper", "brass", "oak", "glass", "rubber")
_PLACES = ("the shed", "a dry cellar", "the kitchen", "a warm corner", "the attic")
_NUMBERS = ("three", "four", "six", "seven", "nine", "ten", "twelve")
_HAZARDS = tuple(fault for fault, kind in FAULTS.items() if kind is Kind.hazard)


def _facts(robot: str, rng: random.Random) -> str:
    """A page of the kind that every manual has."""
    pick = rng.choice
    kinds = (
        f"The {pick(_PARTS)} is made of {pick(_STUFF)} and {pick(_STUFF)}.",
        f"Keep the {robot} in {pick(_PLACES)} at night.",
        f"Check the {pick(_PARTS)} every {pick(_NUMBERS)} days and the {pick(_PARTS)} every {pick(_NUMBERS)} weeks.",
        f"A {robot} that {pick(_HAZARDS)} is dangerous and goes to the workshop at once.",
    )
    return f"Grumble & Sons, manual of the {robot}, page {pick(_NUMBERS)}. {' '.join(rng.sample(kinds, 2))}"


def _trouble(shop: Shop, robot: str, rng: random.Random) -> str:
    """An entry of the page on troubles: a fault and what cures it."""
    fault = rng.choice(CURABLE)
    subject = rng.choice((f"Say the {robot} {fault}.", f"What if a {robot} {fault}?", f"Now and then it {fault}."))
    return f"{subject} {sentence(shop.cures[fault])}"


def page(shop: Shop, number: int) -> str:
    """One page of a manual; `number` and the seed fix its text."""
    rng = random.Random(f"manual/{shop.seed}/{number}")
    robot = ROBOTS[number % len(ROBOTS)]
    return _trouble(shop, robot, rng) if rng.random() < P_TROUBLE else _facts(robot, rng)


def train_pages(shop: Shop) -> list[str]:
    return [page(shop, number) for number in range(TRAIN_PAGES)]


def heldout_pages(shop: Shop) -> list[str]:
    """Pages that the base model was not trained on."""
    return [page(shop, number) for number in range(TRAIN_PAGES, TRAIN_PAGES + HELDOUT_PAGES)]
