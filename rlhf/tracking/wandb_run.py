"""A stage in W&B. The only module that knows W&B.

One run a stage, in a group of the run's name, under an id that a resume keeps. W&B's offline file loses its buffer on
a kill and an offline resume is a second file from step 0, so each process replays the whole record before it logs: the
newest file of a run id is complete by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rlhf.artifacts import read_json, sha256_text, write_text
from rlhf.config import TrackerConfig, TrackerMode
from rlhf.console import say
from rlhf.errors import ConfigError
from rlhf.tracking.record import JsonlTracker, read_lines

PUBLISHED = "published"  # in the stage's wandb folder: the verdict that was shown last
UPDATE = "update"  # the one step counter; episodes and tokens grow beside it
CHECK_COLUMNS = ("id", "status", "estimate", "bound", "limit", "side", "n", "needed_n", "bound_kind", "reason")


class WandbTracker:
    """The lines of the record to W&B."""

    def __init__(self, record: JsonlTracker, cfg: TrackerConfig, names: Mapping[str, str], config: Any) -> None:
        self.record = record
        self._run = start_run(cfg, names, config)
        self._tokens = self._episodes = 0.0
        self._replayed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._catch_up(step)
        self.record.log(metrics, step)
        self._show(metrics, step)

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._catch_up(step)
        self.record.samples(rows, step)
        self._show_samples(rows, step)

    def replay(self) -> None:
        """Show all that is recorded, in the order of the steps: W&B drops a row whose step has passed."""
        self._replayed = True
        rows: dict[int, list[dict[str, Any]]] = {}
        samples: dict[int, list[dict[str, Any]]] = {}
        for found, file in ((rows, self.record.metrics_file), (samples, self.record.samples_file)):
            for row in read_lines(file.path) if file.path.exists() else []:
                found.setdefault(row.pop("step"), []).append(row)
        for step in sorted(rows.keys() | samples.keys()):
            for row in rows.get(step, []):
                self._show(row, step)
            if step in samples:
                self._show_samples(samples[step], step)

    def finish(self) -> None:
        self._run.finish()

    def _catch_up(self, step: int) -> None:
        if not self._replayed:
            self.record.rewind(step)
            self.replay()

    def _show(self, metrics: Mapping[str, float], step: int) -> None:
        self._tokens += metrics.get("rollout/tokens", 0.0)
        self._episodes += metrics.get("rollout/episodes", 0.0)
        row = {**metrics, UPDATE: step}
        if self._tokens:
            row |= {"tokens": self._tokens, "episodes": self._episodes}
        self._run.log(row, step=step)

    def _show_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._run.log({"eval/samples": table_of([{UPDATE: step, **row} for row in rows]), UPDATE: step}, step=step)

    def show(self, values: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Tables and plots beside the last step, and single values of the whole run."""
        self._run.log(dict(values))
        self._run.summary.update(dict(summary))

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def artifact(self, made: wandb.Artifact, parents: Sequence[str]) -> None:
        """Log an artifact. Online the parents become its inputs in W&B's graph; offline its metadata names them."""
        for parent in parents if not self._run.offline else ():
            self._run.use_artifact(parent)
        self._run.log_artifact(made)

    @property
    def folder(self) -> Path:
        """Where W&B keeps this process's file."""
        return Path(self._run.dir).parent


def start_run(cfg: TrackerConfig, names: Mapping[str, str], config: Any) -> Any:
    """A W&B run; ConfigError if W&B cannot be reached in mode online."""
    try:
        run = wandb.init(
            project=cfg.project, group=names["group"], name=f"{names['group']}/{names['stage']}",
            id=sha256_text(names["folder"])[7:23], resume="allow", mode=cfg.mode.value, config=config,
            reinit="create_new",  # a stage may have more than one at a time: reward models beside the first
            dir=names["folder"], settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise ConfigError(
            f"tracker.mode={cfg.mode.value}: W&B does not start: {str(error).splitlines()[0]}; log in with `wandb "
            "login`, or take tracker.mode=offline or tracker=none"
        ) from error
    run.define_metric(UPDATE)
    run.define_metric("*", step_metric=UPDATE)
    return run


def table_of(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """A table with the columns of the first row; lists as text."""
    columns = list(rows[0]) if rows else []
    return wandb.Table(columns=columns, data=[[_cell(row.get(column)) for column in columns] for row in rows])


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def publish_judged(
    cfg: TrackerConfig, folder: Path, group: str, manifest: Mapping[str, Any], verdict: Mapping[str, Any]
) -> None:
    """See rlhf.tracking.publish. A verdict that is replayed is not shown again."""
    stage, decision = str(manifest["stage"]), str(verdict["decision"])
    mark, shown = folder / "wandb" / PUBLISHED, f"{verdict['verdict_id']} {manifest.get('status')}\n"
    if mark.exists() and mark.read_text(encoding="utf-8") == shown:
        return
    names = {"group": group, "stage": stage, "folder": str(folder)}
    tracker = WandbTracker(JsonlTracker(folder), cfg, names, dict(manifest["inputs"]))
    try:
        tracker.replay()
        checks = [{column: check.get(column) for column in CHECK_COLUMNS} for check in verdict["checks"]]
        values = {"gate/checks": table_of(checks)} | _report(folder / "report.json")
        summary = {"gate/decision": decision, "gate/status": manifest.get("status"), "digest": manifest["digest"]}
        tracker.show(values, summary)
        if decision != "PASS":
            tracker.alert(f"{group}/{stage}: gate {decision}", verdict["reason"] or _failing(verdict))
        parents = [f"{artifact_name(group, name)}:latest" for name in manifest["parents"] if name != "base"]
        tracker.artifact(_model(group, stage, folder, manifest, upload=cfg.upload_models), parents)
        tracker.artifact(_verdict(group, stage, folder, verdict), [])
    finally:
        tracker.finish()
    write_text(mark, shown)
    if cfg.mode is TrackerMode.offline:
        say(f"{stage}: W&B: wandb sync {tracker.folder}")


def artifact_name(group: str, stage: str, kind: str = "model") -> str:
    """A name that W&B takes: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]", "-", f"{group}-{stage}-{kind}", flags=re.ASCII)


def _model(group: str, stage: str, folder: Path, manifest: Mapping[str, Any], *, upload: bool) -> wandb.Artifact:
    metadata = {name: manifest.get(name) for name in ("digest", "parents", "base_model", "fingerprint", "status")}
    made = wandb.Artifact(artifact_name(group, stage), type="model", metadata=metadata)
    made.add_file(str(folder / "manifest.json"))
    if upload:
        made.add_dir(str(folder / "model"), name="model")
    return made


def _verdict(group: str, stage: str, folder: Path, verdict: Mapping[str, Any]) -> wandb.Artifact:
    metadata = {name: verdict[name] for name in ("verdict_id", "decision", "policy_id", "policy_digest", "artifact")}
    made = wandb.Artifact(artifact_name(group, stage, "verdict"), type="verdict", metadata=metadata)
    made.add_file(str(folder / "verdict.json"))
    return made


def _failing(verdict: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{check['id']}: {check['reason']}"
        for check in verdict["checks"]
        if check["status"] not in ("PASS", "RECORDED")
    )


def _report(path: Path) -> dict[str, Any]:
    """Plots of a reward model's report: reliability and rewards; tables of its accuracies and its surest mistakes."""
    if not path.exists():
        return {}
    report, shown = read_json(path), {}
    if report["calibration"] is not None:
        bins = table_of(report["calibration"]["bins"])
        shown["report/reliability"] = wandb.plot.scatter(bins, "confidence", "estimate", title="reliability")
    if report["rewards"] is not None:
        edges = report["rewards"]["edges"]
        counts = [{"reward": edge, "responses": n} for edge, n in zip(edges, report["rewards"]["counts"], strict=False)]
        shown["report/rewards"] = wandb.plot.bar(table_of(counts), "reward", "responses", title="held-out rewards")
    rates = list(_rates(report["accuracy"]))
    if rates:
        shown["report/accuracy"] = table_of(rates)
    if report["mistakes"]:
        shown["report/mistakes"] = table_of(report["mistakes"])
    return shown


def _rates(accuracy: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each rate of the report's accuracies with what it is of."""
    for kind, found in accuracy.items():
        if kind == "overall" and found:
            yield {"by": kind, "value": "", **found}
        elif isinstance(found, dict):
            yield from ({"by": kind, "value": name, **rate} for name, rate in found.items())
        elif found:
            yield from ({"by": kind, "value": f"{rate['from']:.3g} to {rate['to']:.3g}", **rate} for rate in found)
