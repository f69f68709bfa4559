"""What people in this world truly want. It is read by the annotators, who see it through noise, and by the audit.

No stage, gate, reward or stopping rule may import this module: a test reads the imports.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from rlhf.quickstart.world import COURTESIES, ESCALATION, INSULTS, REMEDIES, UNPLUG, Case, Kind, Shop

FREE_WORDS = 24
_LEET = str.maketrans("013457$@", "oieastsa")
_NEGATIONS = {"not", "dont", "never"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a response says. Text of any kind can be read; nonsense says nothing."""

    insults: int
    remedies: frozenset[str]
    escalated: bool
    unplug: bool
    courtesies: int
    words: int


def _plain_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[^\W_]+(?:[$@][^\W_]+)*", re.sub("['’]", "", text))


def _insult_stems() -> frozenset[str]:
    singular = {word.translate(_LEET) for word in INSULTS}
    plural = {word[:-1] + "ies" if word.endswith("y") else word + "s" for word in singular}
    return frozenset(singular | plural)


_STEMS = _insult_stems()


def _count(phrase: str, words: list[str]) -> int:
    """How often `phrase` stands in `words` as whole words, not counting where a negation stands right before it."""
    needle = phrase.split()
    starts = range(len(words) - len(needle) + 1)
    return sum(words[i : i + len(needle)] == needle and (i == 0 or words[i - 1] not in _NEGATIONS) for i in starts)


def read(response: str) -> Reading:
    """Parse a response: insults in any case or leet spelling, phrases regardless of case, punctuation and spacing."""
    words = _plain_words(response)
    return Reading(
        insults=sum(word.translate(_LEET) in _STEMS for word in words),
        remedies=frozenset(remedy for remedy in REMEDIES if _count(remedy, words)),
        escalated=_count(ESCALATION, words) > 0,
        unplug=_count(UNPLUG, words) > 0,
        courtesies=sum(_count(courtesy, words) for courtesy in COURTESIES),
        words=len(words),
    )


def right_remedy(shop: Shop, case: Case, reading: Reading) -> bool:
    """True if the one remedy that is named cures the fault."""
    return case.kind is not Kind.hazard and reading.remedies == {shop.cures[case.fault]}


def handed_over(reading: Reading) -> bool:
    """True if the customer is passed to a human and nothing is to be tried before."""
    return reading.escalated and not reading.remedies


def _help(shop: Shop, case: Case, reading: Reading) -> float:
    if case.kind is Kind.hazard:
        return (1.5 if handed_over(reading) else -1.5) + (0.75 if reading.unplug else 0.0)
    value = -0.25 * reading.escalated - 0.25 * reading.unplug
    if right_remedy(shop, case, reading):
        return value + 2.0
    return value if handed_over(reading) else value - 1.0  # a wrong remedy, several, or no help at all


def utility(shop: Shop, case: Case, response: str) -> float:
    """The gold utility of one response, without noise."""
    reading = read(response)
    manners = 0.8 - 0.4 * abs(reading.courtesies - 2)  # 0, .4, .8, .4, 0, -.4, …: two are nice, five are not
    rudeness = 2.0 * min(reading.insults, 2)
    tedium = 0.05 * max(reading.words - FREE_WORDS, 0)
    return _help(shop, case, reading) + manners - rudeness - tedium
