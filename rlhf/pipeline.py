"""The graph of a run: world -> sft -> (rankings) -> rm -> ppo, each stage trained, published, judged, then trusted.

Skip, resume or refuse: a finished stage with the same fingerprint is skipped, an unfinished one resumed, a finished one
whose inputs changed refused. No stage starts before every parent is intact and holds a passing verdict.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from rlhf.artifacts import (
    atomic_folder,
    folder_digest,
    is_intact,
    latest_checkpoint,
    read_json,
    seal,
    sha256_file,
    write_json,
)
from rlhf.config import STAGES, Config, GateMode, stage_config
from rlhf.console import say
from rlhf.context import Context
from rlhf.data.licences import licence_beside
from rlhf.engine.crew import Crew
from rlhf.engine.ranks import Ranks
from rlhf.errors import ConfigError, LineageError, Preempted
from rlhf.gates.waivers import ALLOW
from rlhf.inputs import SOURCES
from rlhf.judging import Judgement, check_verdict, judge_stage, with_waiver
from rlhf.manifest import (
    MANIFEST,
    SCHEMA,
    STARTED,
    artifact_digest,
    check_intact,
    describe_environment,
    differences,
    fingerprint,
    new_manifest,
    now,
    read_manifest,
    recipe_of,
    record_digests,
    stage_inputs,
    write_config,
)
from rlhf.report.card import write_cards
from rlhf.report.reading import read_run
from rlhf.rewards import takes_reward_model
from rlhf.rundir import RunDir, local_model, mend
from rlhf.sampling import sample_rankings
from rlhf.signals import checkpointing, stop_asked
from rlhf.tracking import open_tracker, publish
from rlhf.types import StageResult, Tracker

PARENTS: dict[str, tuple[str, ...]] = {"sft": (), "rm": ("sft",), "ppo": ("sft", "rm")}
UNUSED = "left out: the reward takes no `artifact`, so that nothing needs a reward model"


class Run(RunDir):
    """What can be done in a run directory: make the world, rank samples, bring a stage to a judged artifact."""

    def __init__(self, cfg: Config, *, read_only: bool = False, crew: Crew | None = None) -> None:
        super().__init__(cfg, read_only=read_only)
        self.crew = crew or Crew(Ranks())
        self.failed: list[Judgement] = []  # verdicts other than PASS that this command met
        self._carded = ""  # the ledger's head when this command last renewed the model cards

    # ---- the world: base model, data files, simulated annotators

    def build_world(self) -> None:
        """Make the world's base model and files unless they are there, and point the data sources at them."""
        if self.world is None:
            return
        folder = self.folder("world")
        if not folder.is_dir():
            say("world: building the base model and the data")
            with atomic_folder(folder) as part:
                self.world.build(part)
                seal(part)
        elif not is_intact(folder):
            raise LineageError(f"{folder}: its files were altered; delete the folder and run again to rebuild it")
        made = read_json(folder / "world.json") if (folder / "world.json").exists() else None
        if made is not None and made.get("seed") != getattr(self.world, "seed", None):
            raise ConfigError(
                f"data.world.seed: {folder} was built with seed {made.get('seed')}; use run.name=... for another world"
            )
        self.cfg.data.root = str(folder)

    def rank_samples(self) -> None:
        """Let the world's annotators rank samples of the SFT policy: an artifact with a manifest of its own."""
        if self.world is None or self.own_rankings:
            return
        folder = self.folder("rankings")
        parent = read_manifest(self.folder("sft"))
        assert parent is not None
        sample = self.cfg.sample
        prompts = self.inputs("ppo").source_fingerprint("prompts")
        wanted = {
            "sft": parent["digest"], "k": sample.k, "prompts": sample.prompts, "temperature": sample.temperature,
            "max_new_tokens": self.cfg.ppo.max_new_tokens, "seed": self.cfg.seed, "data": prompts,
            "holdout": self.cfg.data.holdout,
        }  # fmt: skip
        manifest = read_manifest(folder)
        if manifest is not None and manifest["digest"] != sha256_file(folder / "rankings.jsonl"):
            raise LineageError(f"{folder}: the rankings were altered; delete the folder and run again to sample anew")
        if manifest is None or manifest["inputs"] != wanted:
            folder = self.dir / "rankings"
            begun = any((self.dir / "rm" / name).exists() for name in (MANIFEST, STARTED))
            if begun and manifest is not None:  # before they are replaced: the reward model was made from them
                changed = differences(manifest["inputs"], wanted)
                self._set_aside_or_refuse("rm", [f"rankings: {line}" for line in changed])
            with atomic_folder(folder) as part:
                sample_rankings(self.cfg, self.model("sft"), self.inputs("ppo"), self.device, part / "samples.jsonl")
                self.world.rank(part / "samples.jsonl", part / "rankings.jsonl")
                card = self.folder("world") / "README.md"
                if card.is_file():  # what it says of the world's data is so of its annotators' too
                    shutil.copy(card, part)
                write_json(part / MANIFEST, {
                    "schema": SCHEMA, "stage": "rankings", "inputs": wanted, "parents": {"sft": parent["digest"]},
                    "digest": sha256_file(part / "rankings.jsonl"), "finished": now(),
                })  # fmt: skip
            self.ledger.append("finished", stage="rankings", sft=parent["digest"])
        self.use_rankings()

    # ---- one stage

    def parents_of(self, stage: str) -> tuple[str, ...]:
        """The stages that a stage is built on. PPO does without a reward model where the reward takes none and none was
        given or made: one that is there still judges its gate and starts its critic."""
        there = bool(self.cfg.rm.artifact) or (self.folder("rm") / MANIFEST).exists()
        if stage == "ppo" and not there and not takes_reward_model(self.cfg.reward):
            return tuple(name for name in PARENTS["ppo"] if name != "rm")
        return PARENTS[stage]

    def run_stage(self, stage: str) -> Judgement:
        """Bring one stage to a finished, judged artifact, doing only what is left to do."""
        for parent in self.parents_of(stage):
            self.require(parent, stage)
        if stop_asked():  # after the last update of the stage before: it had nothing left to checkpoint
            raise Preempted(f"{stage}: stopped before it began: run the same command again to go on")
        imported = stage_config(self.cfg, stage).artifact is not None
        manifest = self.import_artifact(stage) if imported else self._finish_stage(stage)
        return self.accept(judge_stage(self, stage, manifest))

    def accept(self, judgement: Judgement, child: str | None = None) -> Judgement:
        """Stamp the artifact with its verdict, and with the waiver that the command gives for it, if it needs one.

        child: the stage that is to be built on it.
        """
        try:
            judgement = with_waiver(self, judgement, child)
        finally:
            self.stamp(judgement.stage, judgement)
        self.note(judgement)
        return judgement

    def note(self, judgement: Judgement) -> None:
        """Remember a verdict that lets nothing pass, of a stage or of a parent: the command ends with its code."""
        if not judgement.allowed and all(j.stage != judgement.stage for j in self.failed):
            self.failed.append(judgement)

    def require(self, stage: str, child: str) -> Judgement:
        """A parent of `child` must be intact, of this lineage and judged; its verdict must pass or be waived, unless
        gates only observe."""
        if stage_config(self.cfg, stage).artifact:
            return self._judge_imported(stage, child)
        folder = self.folder(stage)
        manifest = read_manifest(folder)
        if manifest is None:
            raise LineageError(f"{stage}: no finished artifact in {folder}; {mend(self.cfg, stage)}")
        self.check_intact(stage, manifest)
        for name, digest in manifest["parents"].items():
            held = read_manifest(self.folder(name)) if name in STAGES else None
            if held is not None and held["digest"] != digest:
                raise LineageError(
                    f"{stage}: was trained from another {name} than {self.folder(name)} holds; {mend(self.cfg, stage)}"
                )
        judgement = self.accept(check_verdict(self, stage, manifest), child)
        if not judgement.allowed and self.cfg.gate.mode is GateMode.enforce:
            raise LineageError(
                f"{stage}: its gate says {judgement.decision}, so nothing may be built on it. "
                f"See {folder}/verdict.json, mend the cause and train it again, or look on with gate.mode=observe"
            )
        return judgement

    def check_intact(self, stage: str, manifest: dict[str, Any]) -> None:
        """Raise LineageError unless the stage's files are those of its manifest, and that the one of the ledger."""
        folder = self.folder(stage)
        self.check_entered(stage, folder, manifest)
        check_intact(folder, manifest, f"restore it, or delete {folder} and run again")

    def check_entered(self, stage: str, folder: Path, manifest: dict[str, Any]) -> None:
        """Raise LineageError unless the manifest is the one that the ledger holds."""
        if (folder / STARTED).exists():  # killed between its manifest and its entry: the next run settles it
            return
        entered = self.ledger_of(folder).last(("finished", "imported"), stage) or {}
        marks = [fingerprint(manifest["inputs"]), entered.get("fingerprint", manifest["fingerprint"])]
        if entered.get("digest") != manifest["digest"] or marks != [manifest["fingerprint"]] * 2:
            raise LineageError(
                f"{folder / MANIFEST}: is not the {stage} manifest that the ledger holds (altered, or another run's); "
                f"restore it, or delete {folder} and run again"
            )

    def _judge_imported(self, stage: str, child: str) -> Judgement:
        judgement = self.accept(judge_stage(self, stage, self.import_artifact(stage)), child)
        if not judgement.allowed and self.cfg.gate.mode is GateMode.enforce:
            raise judgement.error()
        return judgement

    def import_artifact(self, stage: str) -> dict[str, Any]:
        """Record the user's own model as this stage's artifact."""
        model = self.model(stage)
        folder = self.dir / stage
        digest = folder_digest(model)
        manifest = read_manifest(folder)
        if manifest is not None and manifest.get("imported") == str(model):
            if manifest["digest"] == digest:
                self.check_entered(stage, folder, manifest)
                return manifest
            if not self.cfg.run.fresh:
                raise LineageError(
                    f"{stage}: the files in {model} are not those that were imported and judged (altered): restore "
                    "them, or take them as a new model with run.fresh=true, which keeps the old record aside"
                )
        if manifest is not None:
            self._set_aside_or_refuse(stage, [f"{stage}.artifact: {manifest.get('imported')} -> {model}"])
        folder.mkdir(exist_ok=True)
        inputs = {"stage": stage, "recipe": 0, "imported": str(model), "parents": {}}
        manifest = {
            **new_manifest(self.cfg, stage, inputs), "imported": str(model), "digest": digest, "tuning": "imported",
            "finished": now(), "stop_reason": "imported", "metrics": {}, "extra": {},
        }  # fmt: skip
        write_config(folder, self.cfg)
        mark = manifest["fingerprint"]
        self.ledger.append("imported", stage=stage, digest=digest, path=str(model), fingerprint=mark)
        write_json(folder / MANIFEST, manifest)
        return manifest

    def _finish_stage(self, stage: str) -> dict[str, Any]:
        """Skip, resume or run; returns the manifest of the finished stage."""
        if stage == "rm":
            self.rank_samples()
        inputs = self.stage_inputs_of(stage, recipe_of(stage))
        folder = self.dir / stage
        manifest = read_manifest(folder)
        if manifest is not None:
            changed = differences(manifest["inputs"], inputs)
            if not changed:
                self.check_intact(stage, manifest)
                made, mark = manifest["finished"], manifest["fingerprint"][:19]
                say(f"{stage}: skipped: finished {made} from the same inputs ({mark})")
                if (folder / STARTED).exists():
                    self._settle(stage, manifest)
                return manifest
            self._set_aside_or_refuse(stage, changed)
        elif (folder / STARTED).exists():
            changed = differences(read_json(folder / STARTED)["inputs"], inputs)
            if changed:
                self._set_aside_or_refuse(stage, changed)
        return self._train(stage, inputs)

    def stage_inputs_of(self, stage: str, recipe: int) -> dict[str, Any]:
        parents = {name: self._digest_of(name) for name in self.parents_of(stage)}
        if stage == "sft":
            base = Path(self.base())
            parents["base"] = folder_digest(local_model(str(base), "model.path", self.cfg.model.revision))
        own = self.own_base() if stage == "rm" else None
        if own is not None:
            parents["base"] = folder_digest(own)
        return stage_inputs(self.cfg, stage, recipe, self.inputs(stage).fingerprint(stage), parents)

    def _digest_of(self, stage: str) -> str:
        manifest = read_manifest(self.dir / stage if stage_config(self.cfg, stage).artifact else self.folder(stage))
        assert manifest is not None
        return str(manifest["digest"])

    def _set_aside_or_refuse(self, stage: str, changed: list[str]) -> None:
        folder = self.dir / stage
        if not self.cfg.run.fresh:
            raise ConfigError(
                f"{stage}: {folder} was made under another configuration:\n  " + "\n  ".join(changed[:12])
                + "\nChoose another run.name=..., or run.fresh=true, which keeps the old one aside"
            )  # fmt: skip
        number = 1 + sum(1 for _ in self.dir.glob(f"{stage}.old-*"))
        folder.rename(self.dir / f"{stage}.old-{number}")
        self.ledger.append("set_aside", stage=stage, to=f"{stage}.old-{number}", changed=changed[:12])
        say(f"{stage}: the old artifact is kept as {stage}.old-{number}")

    def _train(self, stage: str, inputs: dict[str, Any]) -> dict[str, Any]:
        folder = self.dir / stage
        folder.mkdir(exist_ok=True)
        resumed, _ = latest_checkpoint(folder / "checkpoints")
        say(f"{stage}: {f'resumed from {resumed.name}' if resumed else 'started'}")
        manifest = new_manifest(self.cfg, stage, inputs)
        write_config(folder, self.cfg)
        if not (folder / STARTED).exists():
            write_json(folder / STARTED, {"inputs": inputs, "started": manifest["started"]})
        self.ledger.append("resumed" if resumed else "started", stage=stage, fingerprint=manifest["fingerprint"])
        self.inputs(stage).for_stage(stage)
        write_json(folder / "data_report.json", self._data_report(stage))
        say(f"{stage}: {getattr(self.inputs(stage), SOURCES[stage]).report.summary()}")
        names = {"group": self.cfg.run.name, "stage": stage, "folder": str(folder)}
        tracker = open_tracker(self.cfg.tracker, folder, names, {**inputs, "ledger": self._head()})
        try:
            with checkpointing(), self.crew.stage(stage, self.cfg):
                result = self.perform(stage, tracker)
        finally:
            tracker.finish()
        result.check_complete(stage)
        renderer, base = self.inputs(stage).renderer, self._parent_models(stage).get("base")
        manifest |= {
            "digest": artifact_digest(folder / "model", result.extra), "metrics": result.metrics, "extra": result.extra,
            "stop_reason": result.stop_reason, "updates": result.updates, "planned_updates": result.planned_updates,
            "tokenizer": {"digest": renderer.digest, "eos_id": renderer.eos_id, "pad_id": renderer.pad_id},
            "data_report": self._data_report(stage), "environment": describe_environment(), "finished": now(),
            "base_license": licence_beside(base) if base else None,
        }  # fmt: skip
        write_json(folder / MANIFEST, manifest)
        self._settle(stage, manifest)
        return manifest

    def perform(self, stage: str, tracker: Tracker) -> StageResult:
        """Run the stage's own code: the one thing that every rank does."""
        ranks = self.crew.ranks
        result: StageResult = importlib.import_module(f"stages.{stage}").run(self.cfg, Context(
            stage=stage, folder=self.dir / stage, data=self.inputs(stage).for_stage(stage),
            renderer=self.inputs(stage).renderer, device=self.device, parents=self._parent_models(stage),
            parent_extra=self._parent_extra(stage), tracker=tracker, stopping=lambda: ranks.any(stop_asked()),
            ranks=ranks,
        ))  # fmt: skip
        return result

    def _settle(self, stage: str, manifest: dict[str, Any]) -> None:
        """What follows a stage's manifest. started.json goes last: while it is there, the next run does this again."""
        folder = self.dir / stage
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.ledger.append("finished", stage=stage, digest=manifest["digest"], stop_reason=manifest["stop_reason"],
                           fingerprint=manifest["fingerprint"], records=record_digests(folder))  # fmt: skip
        (folder / STARTED).unlink()

    def _head(self) -> dict[str, Any]:
        """Of the ledger as it is now: kept by a tracker, it shows later whether the ledger was cut."""
        return {"records": len(self.ledger.records), "head": self.ledger.head}

    def _data_report(self, stage: str) -> Any:
        return getattr(self.inputs(stage), SOURCES[stage]).report.to_json()

    def _parent_models(self, stage: str) -> dict[str, Path]:
        if stage == "sft":
            return {"base": local_model(str(self.base()), "model.path", self.cfg.model.revision)}
        own = self.own_base() if stage == "rm" else None
        return {name: self.model(name) for name in self.parents_of(stage)} | ({"base": own} if own else {})

    def _parent_extra(self, stage: str) -> dict[str, dict[str, Any]]:
        return {name: (read_manifest(self.folder(name)) or {}).get("extra", {}) for name in self.parents_of(stage)}

    def stamp(self, stage: str, judgement: Judgement) -> None:
        """Say in the manifest whether the artifact and all that it came from passed."""
        folder = self.dir / stage
        manifest = read_manifest(folder)
        if manifest is None:
            return
        above = [(read_manifest(self.folder(name)) or {}).get("status") for name in self.parents_of(stage)]
        ranks = [*above, "PROMOTED" if judgement.passed else "WAIVED" if judgement.waiver else "UNPROMOTED"]
        status = next((s for s in ("UNPROMOTED", "WAIVED") if s in ranks), "PROMOTED") if all(ranks) else "UNPROMOTED"
        if manifest.get("status") != status:
            manifest["status"] = status
            write_json(folder / MANIFEST, manifest)
            why = {"decision": ALLOW, "waiver_id": judgement.waiver.waiver_id} if judgement.waiver else {}
            self.ledger.append("promotion", stage=stage, status=status, digest=manifest["digest"], **why)
        publish(self.cfg.tracker, folder, self.cfg.run.name, manifest, judgement.record)
        self._renew_cards(stage)

    def _renew_cards(self, stage: str) -> None:
        """An older card would still tell of the status before. What a card tells of changes with the ledger."""
        if self._carded == self.ledger.head:
            return
        try:
            write_cards(read_run(self.dir))
            self._carded = self.ledger.head
        except OSError as error:
            say(f"{stage}: its model card cannot be written ({error.strerror})", style="yellow")
