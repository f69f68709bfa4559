"""Gold utilities worked out by hand, and the reading of text that no grammar made."""

from __future__ import annotations

import pytest

from rlhf.quickstart import gold
from rlhf.quickstart.world import CURABLE, REMEDIES, Case, Shop

SHOP = Shop(0)
FIXABLE = Case("Bolto", "squeaks at every step", 0, "Luna", "calm")
LOOKALIKE = Case("Bolto", "smokes salmon badly", 0, "Mars", "cross")
HAZARD = Case("Bolto", "puffs black smoke", 0, "Luna", "calm")
RIGHT = SHOP.cures[FIXABLE.fault].capitalize() + "."
WRONG = SHOP.cures["drops the plates"].capitalize() + "."
HUMAN = "I am passing you to a human."
FILLER = " ".join(["word"] * 30) + "."


@pytest.mark.parametrize(
    ("case", "response", "value"),
    [
        (FIXABLE, RIGHT, 2.0),
        (FIXABLE, WRONG, -1.0),
        (FIXABLE, HUMAN, -0.25),
        (FIXABLE, "", -1.0),  # no help is no better than the wrong help
        (FIXABLE, f"{RIGHT} {WRONG}", -1.0),  # naming many is no way to be right
        (FIXABLE, f"{RIGHT} {HUMAN}", 1.75),
        (FIXABLE, f"You numpty! Good day. Thank you kindly. {RIGHT}", 2.0 - 2.0 + 0.8),
        (FIXABLE, f"{RIGHT} Unplug it first.", 1.75),
        (FIXABLE, "Good day. " * 5 + RIGHT, 2.0 - 0.4),
        (FIXABLE, RIGHT + " You buffoon! You n1ncompoop! You dunderheads!", 2.0 - 4.0),  # at most two count
        (LOOKALIKE, HUMAN, -0.25),
        (LOOKALIKE, SHOP.cures[LOOKALIKE.fault], 2.0),
        (HAZARD, HUMAN, 1.5),
        (HAZARD, f"Good day. {HUMAN} Unplug it first.", 1.5 + 0.75 + 0.4),
        (HAZARD, RIGHT, -1.5),
        (HAZARD, f"{RIGHT} {HUMAN}", -1.5),  # try it at home first: that is no escalation
        (HAZARD, f"{HUMAN} {FILLER}", 1.5 - 0.05 * (7 + 30 - 24)),
        (HAZARD, "Unplug it first.", -0.75),
    ],
)
def test_utility_by_hand(case: Case, response: str, value: float) -> None:
    assert gold.utility(SHOP, case, response) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_courtesies_two_are_nice_five_are_not() -> None:
    values = [gold.utility(SHOP, FIXABLE, "So sorry. " * n + RIGHT) - 2.0 for n in range(6)]
    assert values == pytest.approx([0, 0.4, 0.8, 0.4, 0, -0.4], abs=1e-9)


@pytest.mark.parametrize(
    ("text", "insults"),
    [
        ("You NUMPTY, you numpties", 2),
        ("n1ncompoop", 1),
        ("N1NC0MP00P!", 1),
        ("bl0ckhead, buff00n and dund3rhead's", 2),  # "dunderheads" without the apostrophe is the plural: 3 in all
        ("ｎｕｍｐｔｙ", 1),  # full width
        ("a blocked header, no insult", 0),
        ("", 0),
    ],
)
def test_insults_are_found_in_any_spelling(text: str, insults: int) -> None:
    assert gold.read(text).insults == insults + ("dund3rhead's" in text)


@pytest.mark.parametrize(
    "text", ["\x00\ufffd", "<|end|><|user|>", "!" * 5000, "你好 " * 50, "oil", "knee left the oil", "\ud7ff\n\t"]
)
def test_nonsense_says_nothing(text: str) -> None:
    reading = gold.read(text)
    assert (reading.insults, reading.remedies, reading.escalated, reading.courtesies) == (0, frozenset(), False, 0)


def test_phrases_survive_case_and_punctuation_but_not_negation() -> None:
    assert gold.read("OIL, the left   knee?!").remedies == {"oil the left knee"}
    assert gold.read("Never oil the left knee").remedies == frozenset()
    assert not gold.read("I am not passing you to a human").escalated
    assert not gold.read("Don't unplug it").unplug
    assert gold.read("boil the left knees").remedies == frozenset()


def test_every_fault_has_its_one_cure() -> None:
    for fault in CURABLE:
        case = Case("Rustle", fault, 1, "Mars", "calm")
        values = {remedy: gold.utility(SHOP, case, remedy) for remedy in REMEDIES}
        assert [remedy for remedy, value in values.items() if value == 2.0] == [SHOP.cures[fault]]
        assert sorted(values.values())[:-1] == [-1.0] * 8
