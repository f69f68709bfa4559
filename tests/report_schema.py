"""What every report.json of a reward model must hold, whatever could be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PARTS = {
    "": {"schema", "seed", "missing", "rows", "accuracy", "ties", "calibration", "temperature", "length", "baselines",
         "agreement", "rewards", "mistakes", "verdict"},
    "accuracy": {"overall", "by_subset", "by_annotator", "by_file", "by_rank_distance", "by_reward_difference"},
    "length": {"correlation", "preferred_is_longer", "preferred_is_shorter", "same"},
    "baselines": {"length", "bag_of_words"},
    "agreement": {"ranks", "pairs"},
    "temperature": {"fitted", "cross_fitted"},
    "rows": {"rankings", "prompts", "strict_pairs", "tied_pairs", "training_rankings"},
}  # fmt: skip
RATE = {"right", "prompts", "estimate", "lower", "upper", "pairs", "over_all_pairs"}


def check_schema(report: Any) -> None:
    """All parts are there, a null has its reason and a reason its null, and rates lie in their intervals."""
    for name, parts in PARTS.items():
        assert set(report[name] if name else report) == parts, name
    nulls = {name for name in set(PARTS[""]) - set(PARTS) if report[name] is None}
    for above in set(PARTS) - {"", "rows"}:
        nulls |= {f"{above}.{name}" for name, part in report[above].items() if part is None}
    assert nulls == set(report["missing"]) and all(report["missing"].values())
    accuracy = report["accuracy"]
    rates = [accuracy["overall"], *(report["length"][name] for name in PARTS["length"] - {"correlation"})]
    rates += [rated for name in ("by_subset", "by_annotator", "by_file", "by_rank_distance")
              for rated in (accuracy[name] or {}).values()]  # fmt: skip
    rates += [*(accuracy["by_reward_difference"] or []), *report["baselines"].values(), report["agreement"]["pairs"]]
    for rated in filter(None, rates):
        assert set(rated) >= RATE and 0 <= rated["lower"] <= rated["estimate"] <= rated["upper"] <= 1
        assert rated["estimate"] == rated["right"] / rated["prompts"] and rated["prompts"] <= rated["pairs"]
    assert report["schema"] == "rlhf-reward-report/1" and len(report["mistakes"] or []) <= 20
    assert sum(report["rewards"]["counts"]) == report["rewards"]["responses"]


def read(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
