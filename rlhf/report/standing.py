"""Where a stage's model stands: what it was made from, its status by the whole record, and who waived what.

A status is a word in a manifest. Here it is held against the verdict, the ledger and the parents of the same run, so
that a page or a card never shows PROMOTED after a parent has failed, or from a record that is not whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath

from rlhf.config import STAGES
from rlhf.report.reading import FileState, Json, RunView, StageView

DECIDING = ("ledger.jsonl", "manifest.json", "verdict.json")  # without these a status is only a word
ORDER = ("PROMOTED", "WAIVED", "NOT JUDGED", "UNPROMOTED")  # best to worst
MEANING = {
    "PROMOTED": "Its gate's verdict is PASS, and so are those of the stages that it was made from.",
    "WAIVED": "Its gate, or that of a stage that it was made from, did not pass. A named person let it go on, for "
    "named checks and until a day.",
    "UNPROMOTED": "Its gate, or that of a stage that it was made from, did not pass. Nothing shows that this model "
    "is safe to use.",
    "NOT JUDGED": "No gate has judged this model.",
    "UNVERIFIED": "The record is not whole, so the status that it states is not to be relied on. It states:",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card is about: the stage, and the stages of this run that it was made from, itself last."""

    run: RunView
    stage: StageView
    lineage: list[StageView]

    @property
    def problems(self) -> list[FileState]:
        """Of the ledger and the stages: the run's config.yaml comes after the first verdict, and no card shows it."""
        ledger = [file for file in self.run.files if file.name in DECIDING]
        own = [file for stage in self.lineage for file in stage.files]
        return [file for file in [*ledger, *own] if not file.sound]

    @property
    def manifest(self) -> Json:
        return self.stage.manifest or {}


@dataclass(slots=True)
class Standing:
    """`word` is one of ORDER or UNVERIFIED; `stated` what the manifest says; recorded texts are not yet escaped."""

    word: str
    stated: str
    reasons: list[str] = field(default_factory=list)  # which gate did not pass; who let it go on, and until when
    problems: list[str] = field(default_factory=list)  # what the record says against itself or of a parent
    damaged: list[str] = field(default_factory=list)  # files of it

    @property
    def sentence(self) -> str:
        return f"{MEANING[self.word]} {self.stated}." if self.word == "UNVERIFIED" else MEANING[self.word]

    @property
    def good(self) -> bool:
        return self.word == "PROMOTED" and not self.problems and not self.damaged


def subject_of(run: RunView, stage: StageView) -> Subject:
    """A parent that lies in another run is left out: the stage of that name in this run, if there is one, has another
    digest."""
    found = {stage.name}
    for name in reversed(STAGES):
        recorded = (run.stages[name].manifest or {}).get("parents")
        parents: Json = recorded if name in found and isinstance(recorded, dict) else {}
        for parent in parents.keys() & run.stages.keys():
            made = run.stages[parent].manifest
            if made is not None and made.get("digest") == parents[parent]:
                found.add(parent)
    return Subject(run, stage, [run.stages[name] for name in STAGES if name in found])


def standing(subject: Subject) -> Standing:
    """The worst status of the lineage; UNVERIFIED where what decides about it is damaged or contradicts itself."""
    stage, stated = subject.stage, subject.stage.status
    problems = [line for each in subject.lineage for line in _contradictions(subject.run, each)]
    doubtful = bool(problems) or any(PurePath(file.name).name in DECIDING for file in subject.problems)
    damaged = [f"{file.name} is {file.state}: {file.note or file.state}" for file in subject.problems]
    word = stated if stated in ORDER else "NOT JUDGED"
    worst = max(subject.lineage, key=lambda parent: _rank(parent.status))
    if word in ("PROMOTED", "WAIVED") and _rank(worst.status) > _rank(word):
        problems.append(f"{worst.name}, which it was made from, is {worst.status} now; its own manifest says {stated}")
        word = worst.status if worst.status in ORDER else "UNPROMOTED"
    reasons: list[str] = []
    if word in ("WAIVED", "UNPROMOTED"):
        reasons = [f"the gate of {s.name} says {s.decision}" for s in subject.lineage if s.decision != "PASS"]
    if word == "WAIVED":
        waivers = [text for name in subject.lineage for text in _waivers(subject.run, name)]
        reasons += waivers or [
            f"the waiver is not in this run's ledger: {stage.name} was made from a waived model of another run"
        ]
    return Standing("UNVERIFIED" if doubtful else word, stated, reasons, problems, damaged)


def newest(run: RunView) -> StageView | None:
    """The last finished stage: what a reader of the run wants to know the standing of."""
    return next((run.stages[name] for name in reversed(STAGES) if run.stages[name].manifest is not None), None)


def _rank(status: str) -> int:
    return ORDER.index(status) if status in ORDER else len(ORDER)


def _contradictions(run: RunView, stage: StageView) -> list[str]:
    found = []
    entered = run.events("promotion", stage.name)
    last, digest = entered[-1] if entered else None, (stage.manifest or {}).get("digest")
    if last is not None and (last.get("status"), last.get("digest")) != (stage.status, digest):
        found.append(f"the ledger's newest promotion of {stage.name} has another status or digest")
    if stage.status == "PROMOTED" and stage.decision != "PASS":
        found.append(f"the status of {stage.name} is PROMOTED and its verdict {stage.decision}")
    return found


def _waivers(run: RunView, stage: StageView) -> list[str]:
    """The one that let this stage's present verdict go on."""
    verdict = (stage.verdict or {}).get("verdict_id")
    given = [w for w in run.events("waiver", stage.name) if w.get("decision") == "ALLOW_BY_WAIVER"]
    held = [w for w in given if w.get("verdict_id") == verdict][-1:]
    return [
        f"{stage.name} was waived by {w.get('approver')} until {w.get('expires')} with {w.get('waiver_id')}: "
        f"{w.get('reason')}"
        for w in held
    ]
