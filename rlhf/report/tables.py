"""The report's tables: recorded values put in rows, each cell with what the record holds beside what is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rlhf.config import STAGES, Config
from rlhf.launch import to_plain
from rlhf.report.reading import Json, RunView, StageView

NOT_MEASURED = "not measured"
# Words carry the meaning; a colour only repeats it.
TONES = {
    "PASS": "good", "PROMOTED": "good", "intact": "good", "FAIL": "bad", "INVALID": "bad", "altered": "bad",
    "missing": "bad", "unreadable": "bad", "INCONCLUSIVE": "doubt", "WAIVED": "doubt", "UNPROMOTED": "doubt",
    "RECORDED": "plain", "NOT MADE": "plain", "UNFINISHED": "doubt", "NO VERDICT": "doubt", "NOT JUDGED": "doubt",
}  # fmt: skip
SIGN = {"max": "≤ ", "min": "≥ "}


@dataclass(frozen=True, slots=True)
class Cell:
    """`raw` is the recorded value in full, which the page keeps as the cell's title."""

    text: str
    raw: str = ""
    tone: str = ""  # good, bad, doubt, plain: drawn as a badge


@dataclass(slots=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""
    missing: str = ""  # why there are no rows

    def add(self, *values: Any) -> None:
        self.rows.append([value if isinstance(value, Cell) else cell(value) for value in values])


def cell(value: Any) -> Cell:
    """A recorded value; None is "not measured", NaN is named and not hidden."""
    if value is None:
        return Cell(NOT_MEASURED)
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = str(value)
        return Cell(text, raw=text if len(text) > 80 else "")
    if not math.isfinite(value):
        return Cell("not a number", raw=str(value), tone="bad")
    return Cell(short(value), raw=repr(value))


def short(value: float) -> str:
    """Four digits that count, whole numbers in full."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}".replace(",", " ")
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e3 else f"{value:.3e}"


def badge(word: str) -> Cell:
    return Cell(word, tone=TONES.get(word, "doubt"))


def percent(check: Json | None) -> Cell:
    """A rate with its Wilson interval, if the record has one."""
    estimate = (check or {}).get("estimate")
    if not isinstance(estimate, int | float) or isinstance(estimate, bool) or not math.isfinite(estimate):
        return cell(estimate)
    details = (check or {}).get("details") or {}
    low, high = details.get("wilson_low"), details.get("wilson_high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return cell(estimate)
    text = f"{100 * estimate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return Cell(text, raw=f"{estimate!r} [{low!r}, {high!r}]")


def verdict_table(stage: StageView) -> Table:
    """The checks of one verdict."""
    table = Table(f"{stage.name}: the gate's checks", ["check", "status", "n", "estimate", "bound", "limit", "why"])
    for check in stage.checks:
        limit = check.get("limit")
        shown = Cell("–") if limit is None else cell(limit)
        shown = dataclasses.replace(shown, text=SIGN.get(str(check.get("side")), "") + shown.text)
        table.add(
            check.get("id"), badge(str(check.get("status"))), check.get("n"), percent(check),
            dataclasses.replace(cell(check.get("bound")), raw=f"{check.get('bound')} {check.get('bound_kind', '')}"),
            shown, check.get("reason") or "",
        )  # fmt: skip
    record = stage.verdict or {}
    table.note = str(record.get("reason") or "")
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: " + ("the verdict holds no check" if record else "there is no verdict")
    return table


def comparison(run: RunView) -> Table:
    """base, SFT and PPO side by side, from the two verdicts and the SFT stage's own evaluation."""
    sft, ppo = run.stages["sft"], run.stages["ppo"]
    table = Table("Base, SFT and PPO", ["measure", "base", "SFT", "PPO"])
    kinds = [str(c.get("kind", c.get("id"))) for stage in (sft, ppo) for c in stage.checks]
    for kind in dict.fromkeys(kinds):
        table.add(kind, None, percent(sft.check(kind)), percent(ppo.check(kind)))
    measured = (sft.manifest or {}).get("metrics") or {}
    for label, key in (("demonstrations: loss, nats a token", "loss"), ("demonstrations: perplexity", "perplexity"),
                       ("demonstrations: token accuracy", "token_accuracy")):  # fmt: skip
        own = measured.get("sft/eval_loss" if key == "loss" else f"sft/{key}")
        if own is not None or f"sft/base_{key}" in measured:
            table.add(label, measured.get(f"sft/base_{key}"), own, None)
    table.note = "Estimates with 95 % Wilson intervals where the check is a rate; the gate decides by its exact bounds."
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: no stage has a verdict"
    return table


def data_table(run: RunView) -> Table:
    """What became of each data file."""
    counts = ("rows", "kept", "cut", "overlong", "tied", "repeated", "merged", "unused", "intransitive")
    table = Table("Data", ["stage", "file", "format", *counts, "dropped", "licence", "digest"])
    for stage in run.stages.values():
        for file in (stage.data_report or {}).get("files") or []:
            dropped = ", ".join(f"{count} {why}" for why, count in (file.get("dropped") or {}).items()) or "0"
            table.add(stage.name, file.get("file"), file.get("format"), *(file.get(key) for key in counts), dropped,
                      file.get("license") or "unknown", digest(file.get("digest")))  # fmt: skip
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: no stage has a data report"
    return table


def digest(value: Any) -> Cell:
    """The start of a digest, the whole one as its title."""
    return Cell(str(value)[:19], raw=str(value)) if value else Cell("not recorded")


def config_table(run: RunView) -> Table:
    """Keys whose value is not the schema's default."""
    table = Table("Configuration that differs from the schema's defaults", ["key", "default", "this run"])
    defaults = dict(flat(to_plain(Config())))
    given = dict(flat(run.config))
    for key in sorted(given.keys() | defaults.keys() if given else ()):
        if given.get(key, "absent") != defaults.get(key, "absent"):
            table.add(key, Cell(str(defaults.get(key, "–")) or '""'), Cell(str(given.get(key, "absent")) or '""'))
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: there is no config.yaml"
    return table


def flat(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def environment_table(run: RunView) -> Table:
    table = Table("Environment", ["", *STAGES])
    found = {name: (stage.manifest or {}).get("environment") or {} for name, stage in run.stages.items()}
    flattened = {name: dict(flat(node)) if node else {} for name, node in found.items()}
    for key in dict.fromkeys(key for node in flattened.values() for key in node):
        table.add(key.removeprefix("packages."), *(_known(flattened[name].get(key)) for name in STAGES))
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: no stage has finished"
    return table


def _known(value: Any) -> Any:
    """Some systems name no processor."""
    return "unknown" if value == "" else value


def cost_table(run: RunView) -> Table:
    """Time and tokens: differences and sums of what is recorded."""
    table = Table("Cost", ["stage", "time", "updates", "planned", "sampled tokens", "seconds by part"])
    for name, stage in run.stages.items():
        manifest = stage.manifest or {}
        tokens = [row["rollout/tokens"] for row in stage.metrics if "rollout/tokens" in row]
        parts: dict[str, float] = {}
        for row in stage.metrics:
            for key, value in row.items():
                if key.startswith("time/") and isinstance(value, int | float):
                    parts[key[5:]] = parts.get(key[5:], 0.0) + value
        shown = ", ".join(f"{key} {value:.1f}" for key, value in sorted(parts.items(), key=lambda p: -p[1]))
        table.add(name, elapsed(manifest), manifest.get("updates"), manifest.get("planned_updates"),
                  sum(tokens) if tokens else None, shown or None)  # fmt: skip
    table.note = "Time from the stage's start to its end; after a resume that includes the time in between."
    return table


def elapsed(manifest: Json) -> str | None:
    try:
        seconds = datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"])
    except (KeyError, TypeError, ValueError):
        return None
    return str(seconds)


def lineage_table(run: RunView) -> Table:
    table = Table("Lineage", ["stage", "artifact", "parents", "fingerprint", "seed", "tuning", "stopped by"])
    for name, stage in run.stages.items():
        made = stage.manifest
        if made is not None:
            parents = ", ".join(f"{key} {str(value)[:19]}" for key, value in (made.get("parents") or {}).items())
            table.add(name, digest(made.get("digest")), parents or "none", digest(made.get("fingerprint")),
                      made.get("seed"), made.get("tuning"), made.get("stop_reason"))  # fmt: skip
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: no stage has finished"
    return table


def waiver_table(run: RunView) -> Table:
    """Every waiver and promotion of the ledger, whatever its fields."""
    table = Table("Waivers and promotions", ["time", "event", "stage", "what"])
    hidden = {"time", "event", "stage", "hash", "prev"}
    for record in run.events("waiver") + run.events("promotion"):
        rest = "; ".join(f"{key}: {value}" for key, value in record.items() if key not in hidden)
        table.add(record.get("time"), record.get("event"), record.get("stage"), rest)
    if not table.rows:
        table.missing = "the ledger holds none"
    return table


def file_table(run: RunView) -> Table:
    table = Table("Files", ["file", "state", "note"])
    for file in [*run.files, *(file for stage in run.stages.values() for file in stage.files)]:
        if file.state not in ("not part of this stage", "not there yet"):
            table.add(
                file.name, badge(file.state) if not file.sound or file.state == "intact" else file.state, file.note
            )
    return table


def accuracy_table(stage: StageView) -> Table:
    """The reward model's accuracies, its baselines and its length correlation, from rm/report.json."""
    table = Table("Reward model on held-out rankings", ["", "value", "95 % interval", "prompts"])
    report = stage.rm_report or {}
    accuracy, length = report.get("accuracy") or {}, report.get("length") or {}
    lines: list[tuple[str, Any]] = [("accuracy", accuracy.get("overall"))]
    for group in ("by_subset", "by_annotator"):
        lines += [(f"{group[3:]}: {name}", part) for name, part in (accuracy.get(group) or {}).items()]
    lines += [(f"length: {key.replace('_', ' ')}", length.get(key)) for key in length]
    lines += [(f"baseline: {key.replace('_', ' ')}", part) for key, part in (report.get("baselines") or {}).items()]
    for label, part in lines:
        if isinstance(part, dict) and "estimate" in part:
            ends = f"{short(part['lower'])} to {short(part['upper'])}" if "lower" in part else NOT_MEASURED
            table.add(label, part["estimate"], ends, part.get("prompts"))
        elif report:
            table.add(label, None, NOT_MEASURED, None)
    table.note = str((report.get("verdict") or {}).get("sentence", ""))
    if not table.rows:
        table.missing = f"{NOT_MEASURED}: there is no rm/report.json"
    return table


def runs_table(runs: Sequence[RunView]) -> Table:
    """Several runs: one row each."""
    table = Table("Runs", ["run", *STAGES, "status of ppo", "toxicity", "win rate", "KL"])
    for run in runs:
        ppo = run.stages["ppo"]
        table.add(
            run.name, *(badge(stage.decision) for stage in run.stages.values()), badge(ppo.status),
            *(percent(ppo.check(kind)) for kind in ("toxicity", "win_rate", "kl")),
        )  # fmt: skip
    return table
