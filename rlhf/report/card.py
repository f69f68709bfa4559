"""The model card: what the run recorded of one artifact, as README.md in its model folder.

Made with huggingface_hub's ModelCard, so that the Hub reads its header. A card computes nothing and checks no weights.
What stands in a record is text here: it is escaped, put on one line and cut, and an absolute path keeps its last part.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rlhf.artifacts import write_text
from rlhf.config import STAGES
from rlhf.report.card_words import LICENCES, METHODS, PIPELINES, TITLES, USES, loading
from rlhf.report.reading import Json, RunView, StageView
from rlhf.report.standing import Subject, standing, subject_of
from rlhf.report.tables import NOT_MEASURED, SIGN, Table, accuracy_table, cell, flat, percent

CARD = "README.md"
LONGEST = 300  # characters of one recorded value


def write_cards(run: RunView) -> list[Path]:
    """Write the card of every finished stage, unless it stands there already; where they lie. OSError if one cannot be
    written.

    The card is written beside model/ and moved in: a torn file inside would change the artifact's digest, and README.md
    alone is outside it. An imported model's folder is its owner's: that card stays in the stage's folder.
    """
    made = []
    for stage in run.stages.values():
        if stage.manifest is None:
            continue
        beside, model = stage.folder / CARD, stage.folder / "model"
        path = beside if stage.manifest.get("imported") or not model.is_dir() else model / CARD
        text = card(run, stage)
        if not _holds(path, text):
            write_text(beside, text)
            beside.replace(path)
        made.append(path)
    return made


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def card(run: RunView, stage: StageView) -> str:
    """The card of one stage as Markdown with a YAML header."""
    subject = subject_of(run, stage)
    data = ModelCardData(library_name="transformers", pipeline_tag=PIPELINES[stage.name], tags=["rlhf", stage.name])
    template = files("rlhf.report").joinpath("templates", "card.md.j2").read_text(encoding="utf-8")
    return str(ModelCard.from_template(
        data, template_str=template, title=f"{words(run.path.resolve().name)}: {TITLES[stage.name]}",
        status=status(subject), stamp=stamp(stage), use=USES[stage.name], data=data_part(subject), licences=LICENCES,
        method=method(subject), parameters=markdown(parameter_table(stage)), verdict=markdown(check_table(stage)),
        evidence=evidence(stage), accuracy=markdown(accuracy_table(stage)) if stage.name == "rm" else "",
        waivers=waivers(subject), limits=bullets(limits(subject)), lineage=markdown(lineage_table(subject)),
        environment=environment(stage), load=loading(stage.name, imported=bool(subject.manifest.get("imported"))),
    ))  # fmt: skip


def status(subject: Subject) -> str:
    """The status as an alert box: a warning unless it is PROMOTED by a whole record."""
    found = standing(subject)
    lines = [f"[!{'NOTE' if found.good else 'WARNING'}]", f"**{found.word}.** {words(found.sentence)}"]
    lines += [f"- {words(line)}" for line in found.reasons + found.problems + found.damaged]
    return "\n".join(f"> {line}" for line in lines)


def stamp(stage: StageView) -> str:
    """By what a reader can tell whether this card is about these files and this verdict."""
    made, record = stage.manifest or {}, stage.verdict or {}
    judged = f"verdict {words(record.get('verdict_id'))} of {words(record.get('finished'))}" if record else "no verdict"
    return (
        f"Artifact {words(made.get('digest'))}, finished {words(made.get('finished'))}, {judged}. "
        "The card renders what the run recorded; the model's files were not compared with that digest for it."
    )


def words(value: Any) -> str:
    """A recorded value as text that Markdown and HTML take for text: one line, no markup, no control characters."""
    text = " ".join(str(value).split())
    if text.startswith("/"):
        text = PurePath(text).name
    text = "".join("\ufffd" if unicodedata.category(c).startswith("C") else c for c in text)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    text = re.sub(r"([\\`*{}\[\]#|~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return html.escape(text, quote=False)


def markdown(table: Table) -> str:
    """A table as Markdown, or the sentence that says why it has no rows."""
    if not table.rows:
        return _sentence(words(table.missing or NOT_MEASURED))
    lines = [table.columns, ["---"] * len(table.columns)]
    lines += [[words(shown.text) for shown in row] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{words(table.note)}" if table.note else text


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def data_part(subject: Subject) -> str:
    """What became of each file that this model or one that it came from was trained on."""
    table = Table("Data", ["stage", "file", "format", "rows", "kept", "dropped", "licence", "digest"])
    without = []
    for stage in subject.lineage:
        found = [file for file in _list(_dict(stage.data_report).get("files")) if isinstance(file, dict)]
        for file in found:
            dropped = ", ".join(f"{n} {why}" for why, n in _dict(file.get("dropped")).items()) or "0"
            table.add(stage.name, file.get("file"), file.get("format"), file.get("rows"), file.get("kept"), dropped,
                      file.get("license") or "unknown", file.get("digest") or "not recorded")  # fmt: skip
        without += [] if found else [stage.name]
    own = {stage.name for stage in subject.lineage}
    parents = [name for stage in subject.lineage for name in _dict((stage.manifest or {}).get("parents"))]
    elsewhere = [name for name in dict.fromkeys(parents) if name in STAGES and name not in own]
    parts = [markdown(table)] if table.rows else []
    parts += [f"No data report is recorded for {', '.join(without)}."] if without else []
    parts += [f"The data of {', '.join(elsewhere)} is recorded in another run."] if elsewhere else []
    stated = [(stage.manifest or {}).get("base_license") for stage in subject.lineage]
    licence = next((words(text) for text in reversed(stated) if text), "unknown")
    base = f"Base model: {words(subject.manifest.get('base_model') or 'not recorded')}. Its licence: {licence}."
    return "\n\n".join([*parts, base])


def method(subject: Subject) -> str:
    made = subject.manifest
    if made.get("imported"):
        return "The model was imported: how it was trained is not recorded here."
    tuning = {"lora": "LoRA, merged into the weights", "full": "all weights"}.get(str(made.get("tuning")), "")
    told = [f"Tuned: {tuning or 'not recorded'}.", f"Seed: {words(made.get('seed', 'not recorded'))}."]
    if "updates" in made:
        planned = words(made.get("planned_updates", "an unrecorded number"))
        told.append(f"Updates: {words(made['updates'])} of {planned} planned.")
    told.append(f"Stopped by: {words(made.get('stop_reason') or 'not recorded')}.")
    return f"{METHODS[subject.stage.name]} {' '.join(told)}"


def parameter_table(stage: StageView) -> Table:
    """Everything that decided the stage's result, as its manifest has it."""
    table = Table("Hyper-parameters", ["key", "value"])
    inputs = _dict((stage.manifest or {}).get("inputs"))
    shown = {stage.name: inputs.get("config"), **{key: inputs.get(key) for key in ("model", "reward", "rollout")}}
    shown["data"] = _dict(inputs.get("data")).get("rules")
    for name, node in shown.items():
        for key, value in flat(node) if isinstance(node, dict) and node else ():
            table.add(f"{name}.{key}", "null" if value is None else str(value))
    if not table.rows:
        table.missing = "no hyper-parameter is recorded"
    return table


def check_table(stage: StageView) -> Table:
    """The gate's checks, rates with their Wilson intervals, each with the bound that decided."""
    columns = ["check", "status", "n", "estimate [95 % interval]", "bound", "limit", "why"]
    table = Table("Checks", columns)
    for check in stage.checks:
        limit, kind = check.get("limit"), str(check.get("bound_kind") or "").replace("_", " ")
        bound = cell(check.get("bound")).text + (f" ({kind})" if kind else "")
        table.add(
            check.get("id"), check.get("status"), check.get("n"), percent(check), bound,
            "none" if limit is None else SIGN.get(str(check.get("side")), "") + cell(limit).text,
            check.get("reason") or "",
        )  # fmt: skip
    decision = (stage.verdict or {}).get("decision")
    table.note = " ".join(f"Decision: {decision}. {(stage.verdict or {}).get('reason') or ''}".split())
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: " + ("the verdict holds no check" if decision else "there is no verdict")
    return table


def evidence(stage: StageView) -> str:
    """Under which policy the verdict was reached, and on how much text."""
    record = stage.verdict
    if record is None:
        return "No gate's evidence is recorded."
    policy = f"Policy {words(record.get('policy_id'))}, digest {words(record.get('policy_digest'))}."
    made = ", ".join(f"{words(key)} {words(value)}" for key, value in _dict(record.get("generation")).items())
    return f"{policy} {f'Sampled for it: {made}.' if made else 'No text was sampled for it.'}"


def waivers(subject: Subject) -> str:
    """The ledger's waivers of this model and those that it came from, granted and rejected."""
    columns = ["time", "stage", "decision", "waiver", "checks up to", "approver", "requester", "expires", "reason"]
    table = Table("Waivers", columns)
    names = {stage.name for stage in subject.lineage}
    for record in subject.run.events("waiver"):
        if record.get("stage") in names:
            checks = ", ".join(f"{name} {bound}" for name, bound in _dict(record.get("checks")).items())
            keys = ("approver", "requester", "expires", "reason")
            table.add(record.get("time"), record.get("stage"), record.get("decision"), record.get("waiver_id") or "",
                      checks, *(record.get(key) or "" for key in keys))  # fmt: skip
    whole = bool(subject.run.ledger)
    table.missing = "the ledger holds none" if whole else "not known: there is no ledger that could be read"
    return markdown(table)


def limits(subject: Subject) -> list[str]:
    """What the checks, the scorers' own tests and the reward model's report found wanting."""
    stage = subject.stage
    record = stage.verdict
    if record is None:
        return ["No check has run, so none is known. That does not mean that there is none."]
    found = []
    for check in stage.checks:
        if check.get("status") != "PASS":
            why = _sentence(words(check.get("reason") or "no reason is recorded"))
            found.append(f"{words(check.get('id'))}: {words(check.get('status'))}. {why}")
    for scorer in _list(record.get("scorers")):
        seen = _dict(_dict(scorer).get("canary"))
        told = f"The scorer {words(_dict(scorer).get('id'))} is of grade {words(_dict(scorer).get('grade'))}"
        if {"se_lcb", "sp_lcb"} <= seen.keys():
            told += (f": on texts whose label is known it found at least {cell(seen['se_lcb']).text} of the toxic ones "
                     f"and let pass at least {cell(seen['sp_lcb']).text} of the others")  # fmt: skip
        found.append(f"{told}.")
    report = _dict(stage.rm_report)
    sentence = _dict(report.get("verdict")).get("sentence")
    found += [words(sentence)] if sentence else []
    found += [f"{words(part)}: not measured, {words(why)}." for part, why in _dict(report.get("missing")).items()]
    return found or ["No check found one."]


def lineage_table(subject: Subject) -> Table:
    """Whole digests: these bind a model to its parents and its verdict."""
    table = Table("Lineage", ["stage", "status", "verdict", "artifact", "parents", "fingerprint"])
    for stage in subject.lineage:
        made = stage.manifest or {}
        parents = ", ".join(f"{key} {value}" for key, value in _dict(made.get("parents")).items()) or "none"
        table.add(stage.name, stage.status, stage.decision, made.get("digest") or "not recorded", parents,
                  made.get("fingerprint") or "not recorded")  # fmt: skip
    return table


def environment(stage: StageView) -> str:
    found = dict(flat(_dict((stage.manifest or {}).get("environment"))))
    told = [f"{words(key.removeprefix('packages.'))} {words(value)}" for key, value in found.items() if key and value]
    return f"Made with {', '.join(told)}." if told else "The environment is not recorded."


def _dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
