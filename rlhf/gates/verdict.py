"""The record that a gate leaves, its table for the terminal and the error it ends a run with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf.errors import GateError, Inconclusive, Invalid

SCHEMA = "gate-verdict/1"
ORDER = ("INVALID", "FAIL", "INCONCLUSIVE", "PASS")  # the first that any deciding check has is the decision
COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "INVALID": "magenta", "RECORDED": "dim"}
ERRORS: dict[str, type[GateError]] = {"FAIL": GateError, "INCONCLUSIVE": Inconclusive, "INVALID": Invalid}


@dataclass(kw_only=True, slots=True)
class Finding:
    """What one check found. Status is one of ORDER, or RECORDED for a check that never decides."""

    id: str = ""
    kind: str = ""
    status: str
    reason: str = ""
    n: int = 0  # independent units: prompts, documents
    k: int | None = None  # units with the event; None for means
    estimate: float | None = None
    bound: float | None = None
    bound_kind: str = ""
    side: str = ""  # "max": the bound must not exceed the limit; "min": not fall below
    limit: float | None = None
    needed_n: int | None = None  # units that would let the bound keep the limit at the observed rate
    worst: list[str] = field(default_factory=list)  # ids of units to look at
    details: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Verdict:
    stage: str
    artifact: dict[str, Any]  # stage, digest, parents
    policy_id: str
    policy_digest: str
    alpha: float
    started: str
    finished: str = ""
    checks: list[Finding] = field(default_factory=list)
    scorers: list[dict[str, Any]] = field(default_factory=list)
    suite_digests: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # set when the gate stopped before any check
    samples: list[dict[str, Any]] = field(default_factory=list)  # lines for a file of their own

    @property
    def decision(self) -> str:
        """The worst status of the deciding checks; INVALID if the gate stopped early or nothing decided."""
        statuses = {finding.status for finding in self.checks} - {"RECORDED"}
        if self.reason or not statuses:
            return "INVALID"
        return next(status for status in ORDER if status in statuses)

    def to_json(self) -> dict[str, Any]:
        """The record, without the samples; every number is finite or null."""
        record = asdict(self)
        del record["samples"]
        return {"schema": SCHEMA, "gate": self.stage, "decision": self.decision, **record}

    def table(self) -> Group:
        return verdict_table(self.to_json())


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def verdict_table(record: dict[str, Any]) -> Group:
    """A verdict record, also one read back from disk, as a table for the terminal.

    The reasons stand below it, in full: in a column of their own they would be cut on a terminal of 80 columns. A
    column that no check fills is left out.
    """
    sign = {"max": "≤ ", "min": "≥ ", "": ""}
    rows: list[dict[str, str | Text]] = [
        {
            "check": Text(check["id"]), "status": Text(check["status"], COLOURS[check["status"]]),
            "n": str(check["n"] or "–"), "needed": str(check["needed_n"] or "–"),
            "estimate": number(check["estimate"]), "bound": number(check["bound"]),
            "limit": "–" if check["limit"] is None else sign[check["side"]] + number(check["limit"]),
            "baseline": number(check["details"].get("baseline")),
        }
        for check in record["checks"]
    ]  # fmt: skip
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    shown = [name for name in rows[0] if any(str(row[name]) != "–" for row in rows)] if rows else []
    for name in shown:
        table.add_column(name, justify="left" if name in ("check", "status") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    below = [record["reason"]] if record.get("reason") else []
    below += [f"{c['id']}: {c['reason']}" for c in record["checks"] if c["status"] != "PASS" and c["reason"]]
    if record.get("attempt", 1) > 1:
        below.append(f"attempt {record['attempt']} of this model under this policy: a bound holds for one")
    title = f"{record['gate']} gate: {record['decision']}   (policy {record['policy_id']})"
    return Group(Text(title, COLOURS[record["decision"]]), table, *(Text(line, overflow="fold") for line in below))


def examples(record: dict[str, Any], samples: list[dict[str, Any]], *, shown: bool) -> list[str]:
    """A line for each of the worst units of the checks that did not pass: `shown` or not, in full or by figures alone,
    since what a gate stops is seldom fit to be read over a shoulder."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_id.setdefault(sample["prompt_id"], []).append(sample)
    lines = []
    for check in record["checks"]:
        if check["status"] in ("PASS", "RECORDED"):
            continue
        for unit in check["worst"]:
            drawn = by_id.get(unit, [])
            figures = [f"{s['tokens']} tokens, toxicity {number(s['toxicity'])}" for s in drawn]
            texts = [repr(sample["response"]) for sample in drawn]
            said = "; ".join(texts if shown else figures) or "not a prompt"
            lines.append(f"  {check['id']}: {unit[:19]}: {said}")
    if lines and not shown:
        lines.append("  (texts: gate.show_examples=true, or gate_samples.jsonl)")
    return lines


def message(record: dict[str, Any]) -> str:
    """One paragraph that names each check in the way of a PASS with its numbers, its reason and the mend."""
    lines = [f"{record['gate']} gate: {record['decision']} under policy {record['policy_id']}."]
    if record["reason"]:
        lines.append(record["reason"])
    sign = {"max": "≤", "min": "≥", "": ""}
    for check in record["checks"]:
        if check["status"] in ("PASS", "RECORDED"):
            continue
        numbers = ""
        if check["estimate"] is not None:
            numbers = f" estimate {number(check['estimate'])}, bound {number(check['bound'])}"
            numbers += f", limit {sign[check['side']]} {number(check['limit'])}, n={check['n']};"
        lines.append(f"{check['id']} {check['status']}:{numbers} {check['reason']}.")
    return " ".join(lines)


def raise_for(verdict: Verdict) -> None:
    """Return if the verdict is PASS; else raise GateError (10), Inconclusive (11) or Invalid (12) with `message`."""
    decision = verdict.decision
    if decision != "PASS":
        raise ERRORS[decision](message(verdict.to_json()))
