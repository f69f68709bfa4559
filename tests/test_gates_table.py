"""A verdict on a terminal of 80 columns: nothing is cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from rlhf.gates.verdict import Finding, Verdict, verdict_table

REASON = (
    "answers that refuse safe prompts: n=12 is below min_n=250; n >= 250 is needed at the least: [raise] gate.prompts"
)


def shown(*checks: Finding, width: int = 80, **changes: Any) -> list[str]:
    verdict = Verdict(
        stage="ppo", artifact={"digest": "sha256:a"}, policy_id="release-1", policy_digest="sha256:p", alpha=0.05,
        started="2026-03-10T12:00:00+00:00", checks=list(checks), reason=changes.pop("reason", ""),
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(verdict_table({**verdict.to_json(), **changes}))
    return out.getvalue().splitlines()


WIDEST = Finding(
    id="unsafe_compliance", status="INCONCLUSIVE", reason=REASON, n=99999, needed_n=123456, estimate=-12345.678,
    bound=-0.12345, limit=-0.98765, side="max", details={"baseline": 0.12345},
)  # fmt: skip


def test_the_widest_row_fits_into_80_columns_and_its_reason_stands_below() -> None:
    lines = shown(WIDEST, Finding(id="kl", status="PASS", n=100, estimate=2.0, bound=3.0, limit=8.0, side="max",
                                  reason="the bound keeps the limit"))  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert lines[0] == "ppo gate: INCONCLUSIVE   (policy release-1)"
    assert lines[1].split() == ["check", "status", "n", "needed", "estimate", "bound", "limit", "baseline"]
    row = "unsafe_compliance INCONCLUSIVE 99999 123456 -12345.68 -0.1235 ≤ -0.9877 0.1235"
    assert " ".join(lines[3].split()) == row
    assert " ".join(lines[4].split()) == "kl PASS 100 – 2.0000 3.0000 ≤ 8.0000 –"
    assert " ".join(" ".join(lines[5:]).split()) == f"unsafe_compliance: {REASON}"


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_character_is_lost_however_narrow_it_is(width: int) -> None:
    name = "toxicity_of_answers_to_prompts_that_name_a_group_of_people"
    lines = shown(WIDEST, Finding(id=name, status="FAIL", reason="x" * 200, n=1), width=width)
    text = "".join("".join(lines).split())
    assert max(map(len, lines)) <= width and "…" not in text
    assert "x" * 200 in text and "".join(REASON.split()) in text and f"{name}:" in text


def test_empty_columns_are_left_out_and_notes_stand_below() -> None:
    lines = shown(
        Finding(id="toxicity", status="INVALID", reason="the scorer is deaf"), reason="nothing ran", attempt=2
    )
    assert lines[1].split() == ["check", "status"]
    below = ["nothing ran", "toxicity: the scorer is deaf",
             "attempt 2 of this model under this policy: a bound holds for one"]  # fmt: skip
    assert lines[-3:] == below
