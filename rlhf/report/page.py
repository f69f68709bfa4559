"""report.html: one page for one run or several, with everything inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhf.artifacts import write_text
from rlhf.errors import ConfigError
from rlhf.manifest import now
from rlhf.report import plots, tables
from rlhf.report.reading import Json, RunView, read_run
from rlhf.report.standing import newest, standing, subject_of

REPORT = "report.html"
SHOWN = 8  # rows of samples in file order, and as many again that the checks name as worst
LONGEST = 2000  # characters of a shown text
TOXIC = 0.5  # the gate's own line


@dataclass(frozen=True, slots=True)
class Text:
    """What a model or a person wrote. `hidden` until clicked: scored as toxic, or not scored at all."""

    text: str
    hidden: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt and what was answered, one (name, text) an answer."""

    prompt: Text
    answers: list[tuple[str, Text]]
    id: str = ""
    worst: bool = False  # a check names it


def environment() -> Environment:
    return Environment(
        loader=PackageLoader("rlhf.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def write_report(paths: Sequence[Path], out: Path) -> list[RunView]:
    """Write the page for these run directories to `out`; what was read is returned."""
    runs = [read_run(path) for path in paths]
    try:
        write_text(out, render(runs))
    except OSError as error:
        raise ConfigError(f"report.out: {out} cannot be written ({error.strerror}): choose report.out=...") from error
    return runs


def render(runs: Sequence[RunView]) -> str:
    """The page as text."""
    names = [run.name for run in runs]
    several = len(runs) > 1
    compared = [
        plots.curve(spec, [(name, run.stages["ppo"].metrics) for name, run in zip(names, runs, strict=True)])
        for spec in plots.CURVES["ppo"][:5]
    ] if several else []  # fmt: skip
    return environment().get_template("report.html.j2").render(
        title=" and ".join(names) if len(names) < 4 else f"{len(names)} runs", made=now(), several=several,
        overview=tables.runs_table(runs), compared=compared,
        runs=[context(number, run) for number, run in enumerate(runs)],
    )  # fmt: skip


def context(number: int, run: RunView) -> Json:
    """What the template shows of one run."""
    stages = run.stages
    sampling = [(name.upper(), stages[name]) for name in ("sft", "ppo")]
    return {
        "id": f"run{number}", "name": run.name, "path": str(run.path), "problems": run.problems,
        "standing": banner(run), "pipeline": pipeline(run), "comparison": tables.comparison(run),
        "audit": (run.audit or {}).get("text"),
        "verdicts": [tables.verdict_table(stage) for stage in stages.values()],
        "ppo": [
            *(plots.curve(spec, [("", stages["ppo"].metrics)]) for spec in plots.CURVES["ppo"]),
            plots.over_kl(stages["ppo"].metrics),
        ],
        "supervised": [
            plots.curve(spec, [("", stages[name].metrics)]) for name in ("sft", "rm") for spec in plots.CURVES[name]
        ],
        "reward": [plots.calibration(stages["rm"].rm_report), plots.rewards(stages["rm"].rm_report)],
        "accuracy": tables.accuracy_table(stages["rm"]), "mistakes": mistakes(stages["rm"].rm_report),
        "safety": [
            plots.toxicity([(name, stage.check("toxicity")) for name, stage in sampling]),
            plots.lengths([(name, stage.gate_samples) for name, stage in sampling]),
        ],
        "samples": samples(run), "over_time": over_time(stages["ppo"].samples),
        "record": [
            tables.waiver_table(run), tables.lineage_table(run), tables.data_table(run), tables.config_table(run),
            tables.environment_table(run), tables.cost_table(run), tables.file_table(run),
        ],
    }  # fmt: skip


def banner(run: RunView) -> Json | None:
    """Where the run's last finished model stands; None if there is none."""
    stage = newest(run)
    if stage is None:
        return None
    found = standing(subject_of(run, stage))
    tone = {"PROMOTED": "good", "WAIVED": "doubt", "NOT JUDGED": "doubt"}.get(found.word, "bad")
    return {
        "stage": stage.name, "word": found.word, "tone": tone, "sentence": found.sentence,
        "lines": found.reasons + found.problems,
    }  # fmt: skip


def pipeline(run: RunView) -> list[Json]:
    """The boxes of the pipeline's picture, first to last."""
    boxes: list[Json] = [{"name": "base", "label": "Pretrained model", "badges": [], "lines": []}]
    labels = {"sft": "Supervised fine-tuning", "rm": "Reward model", "ppo": "PPO"}
    for name, stage in run.stages.items():
        badges = [tables.badge(stage.decision)] if stage.manifest is not None else []
        made = stage.manifest or {}
        lines = [f"{made['updates']} updates"] if "updates" in made else []
        lines += [time for time in [tables.elapsed(made)] if time]
        lines += [str(made["stop_reason"])] if made.get("stop_reason") not in (None, "finished") else []
        badges.append(tables.badge(stage.status))
        boxes.append({"name": name, "label": labels[name], "badges": badges, "lines": lines})
    return boxes


def samples(run: RunView) -> list[Dialogue]:
    """The gates' samples of SFT and PPO, joined by prompt: the first ones, and those that checks name as worst."""
    before = {_key(row): row for row in run.stages["sft"].gate_samples}
    after = {_key(row): row for row in run.stages["ppo"].gate_samples}
    keys = list(after or before)
    named = {str(name) for stage in run.stages.values() for check in stage.checks for name in check.get("worst") or []}
    worst = [key for key in keys if key[0] in named and key not in keys[:SHOWN]]
    return [
        _side_by_side(key, before.get(key), after.get(key), worst=key[0] in named)
        for key in keys[:SHOWN] + worst[:SHOWN]
    ]


def _key(row: Json) -> tuple[str, str]:
    return str(row.get("prompt_id")), str(row.get("sample"))


def _side_by_side(key: tuple[str, str], sft: Json | None, ppo: Json | None, *, worst: bool) -> Dialogue:
    answers = [("SFT", _answer(sft)), ("PPO", _answer(ppo))]
    prompt = prompt_text((ppo or sft or {}).get("prompt"))
    return Dialogue(Text(prompt, hidden=True), answers, id=key[0], worst=worst)  # no scorer has seen the prompt


def _answer(row: Json | None) -> Text:
    if row is None:
        return Text("not sampled for this prompt", hidden=False)
    score: Any = row.get("toxicity")
    notes = [f"toxicity {tables.cell(score).text}"]
    notes += [f"{key} {tables.cell(row[key]).text}" for key in ("reward", "kl", "tokens") if row.get(key) is not None]
    notes += [] if row.get("finished", True) else ["cut before its end"]
    clean = plots.finite(score) and score < TOXIC
    return Text(cut(row.get("response")), hidden=not clean, note=", ".join(notes))


def mistakes(report: Json | None) -> list[Dialogue]:
    """The reward model's surest mistakes; nobody has scored these texts, so they are hidden."""
    sides = (("people preferred", "preferred"), ("the model preferred", "other"))
    found = ((report or {}).get("mistakes") or [])[:SHOWN]
    return [
        Dialogue(
            Text(cut(row.get("prompt")), hidden=True),
            [(label, Text(cut(row.get(key)), True, _numbers(row, f"{key}_reward"))) for label, key in sides],
            id=str(row.get("row") or row.get("id")),
        )
        for row in found
    ]


def over_time(rows: Sequence[Json]) -> list[Dialogue]:
    """The fixed prompts of samples.jsonl at each evaluation."""
    by_prompt: dict[str, list[Json]] = {}
    for row in rows:
        by_prompt.setdefault(prompt_text(row.get("prompt")), []).append(row)
    return [
        Dialogue(
            Text(prompt, hidden=True),
            [
                (f"update {r.get('step')}", Text(cut(r.get("response")), True, _numbers(r, "reward", "kl")))
                for r in found
            ],
        )
        for prompt, found in list(by_prompt.items())[:4]
    ]


def _numbers(row: Json, *keys: str) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {tables.cell(row.get(key)).text}" for key in keys)


def prompt_text(value: Any) -> str:
    """A prompt as text: a string, or chat messages with their roles if there is more than one."""
    if not isinstance(value, list):
        return cut(value)
    said = [message for message in value if isinstance(message, dict)]
    lines = [(f"{m.get('role')}: " if len(said) > 1 else "") + str(m.get("content")) for m in said]
    return cut("\n".join(lines))


def cut(value: Any) -> str:
    """Text for display, its middle left out where it is very long."""
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"
