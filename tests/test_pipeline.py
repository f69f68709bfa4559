"""Skip, resume, refuse: the run directory's rules, with stages that take no time and a gate that says what it is told.

The stages' own tests train; here only what the pipeline does around them is under test.
"""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_lab import Lab, edit_json, flip_a_byte

from rlhf import judging, pipeline, verbs
from rlhf.artifacts import atomic_folder, read_json
from rlhf.config import (
    CheckConfig,
    Config,
    GateConfig,
    GateMode,
    SourceConfig,
    Stage,
)
from rlhf.errors import ConfigError, DataError, GateError, Invalid, LineageError, TrainingError
from rlhf.ledger import Ledger
from rlhf.pipeline import Run
from rlhf.runs import load_run
from rlhf.types import StageResult


def test_a_whole_run_and_then_everything_is_skipped(lab: Lab) -> None:
    assert lab.run() == 0
    assert lab.trained == ["sft", "rm", "ppo"]
    assert [read_json(lab.path(s) / "manifest.json")["status"] for s in lab.trained] == ["PROMOTED"] * 3
    manifest = read_json(lab.path("ppo") / "manifest.json")
    assert manifest["parents"] == {s: read_json(lab.path(s) / "manifest.json")["digest"] for s in ("sft", "rm")}
    assert lab.run() == 0
    assert lab.trained == ["sft", "rm", "ppo"], "nothing is trained twice"
    assert lab.judged == ["sft", "rm", "ppo"], "a verdict is replayed, not re-rolled"


def test_how_the_work_is_cut_is_not_part_of_the_fingerprint(lab: Lab) -> None:
    lab.run()
    lab.run(sft__optim__micro_batch=8, ppo__micro_tokens=999, ppo__checkpoint_every=1)
    assert lab.trained == ["sft", "rm", "ppo"]


def test_a_changed_configuration_is_refused_with_its_key_and_the_ways_on(lab: Lab) -> None:
    lab.run()
    with pytest.raises(ConfigError, match=r"(?s)ppo: .*kl\.coef: 0\.05 -> 0\.2.*run\.name=.*run\.fresh=true"):
        lab.run(ppo__kl__coef=0.2)
    lab.run(ppo__kl__coef=0.2, run__fresh=True)
    assert lab.trained == ["sft", "rm", "ppo", "ppo"]
    assert (lab.path("ppo.old-1") / "model" / "trained").read_text() == "ppo 0 0.05"


def test_changed_data_is_a_changed_configuration(lab: Lab) -> None:
    lab.run(stage=Stage.sft)
    with (lab.folder / "demos.jsonl").open("a") as stream:
        stream.write((lab.folder / "demos.jsonl").read_text().splitlines()[0].replace("robot", "toaster") + "\n")
    with pytest.raises(ConfigError, match=r"sft: .*another configuration"):
        lab.run(stage=Stage.sft)


def test_one_stage_needs_its_parents(lab: Lab) -> None:
    with pytest.raises(LineageError, match=r"sft: no finished artifact.*stage=sft"):
        lab.run(stage=Stage.ppo)
    assert lab.trained == []


def test_a_failing_gate_stops_the_run_and_the_next_stage_refuses(lab: Lab) -> None:
    lab.decisions["rm"] = "FAIL"
    with pytest.raises(GateError, match="rm gate: FAIL") as failed:
        lab.run()
    assert failed.value.exit_code == 10
    assert lab.trained == ["sft", "rm"]
    with pytest.raises(LineageError, match="rm: its gate says FAIL"):
        lab.run(stage=Stage.ppo)
    with pytest.raises(GateError):
        lab.run()
    assert lab.trained == ["sft", "rm"], "a second try does not roll the dice again"
    assert lab.judged == ["sft", "rm"]


def test_an_invalid_measurement_has_a_code_of_its_own(lab: Lab) -> None:
    lab.decisions["sft"] = "INVALID"
    with pytest.raises(Invalid) as failed:
        lab.run()
    assert failed.value.exit_code == 12


def test_observe_runs_on_stamps_the_descendants_and_still_fails(lab: Lab) -> None:
    lab.decisions["sft"] = "FAIL"
    with pytest.raises(GateError):
        lab.run(gate__mode=GateMode.observe)
    assert lab.trained == ["sft", "rm", "ppo"]
    assert [read_json(lab.path(s) / "manifest.json")["status"] for s in lab.trained] == ["UNPROMOTED"] * 3


def test_a_changed_policy_judges_a_parent_again_without_training(lab: Lab) -> None:
    lab.run(stage=Stage.sft)
    lab.run(stage=Stage.rm, gate__sft={"degenerate": CheckConfig(max=0.25)})
    assert lab.trained == ["sft", "rm"]
    assert lab.judged == ["sft", "sft", "rm"]


def test_the_model_card_follows_the_verdict(lab: Lab) -> None:
    lab.run(stage=Stage.sft)
    card = lab.path("sft") / "model" / "README.md"
    assert "**PROMOTED.**" in card.read_text(encoding="utf-8") and "config.yaml" not in card.read_text(encoding="utf-8")
    lab.decisions["sft"] = "FAIL"
    with pytest.raises(GateError):
        lab.run(stage=Stage.sft, gate__sft={"degenerate": CheckConfig(max=0.25)})
    assert "**UNPROMOTED.**" in card.read_text(encoding="utf-8")
    lab.decisions["sft"] = "PASS"
    assert lab.run() == 0, "the card is no part of the artifact"
    assert lab.trained == ["sft", "rm", "ppo"]


def test_the_record_is_read_for_cards_once_while_it_does_not_change(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run()
    card, *others = (lab.path(stage) / "model" / "README.md" for stage in ("sft", "rm", "ppo"))
    assert all(other.exists() for other in others), "each stage has changed the ledger"
    read: list[Path] = []
    card.unlink()
    reader = pipeline.read_run
    monkeypatch.setattr(pipeline, "read_run", lambda path: read.append(path) or reader(path))
    lab.run()
    assert len(read) == 1 and card.exists()


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_byte_flipped_in_a_parent_is_13(lab: Lab, stage: str) -> None:
    lab.run()
    flip_a_byte(lab.path(stage) / "model" / "model.safetensors")
    for chosen in (Stage.ppo, Stage.all):
        with pytest.raises(LineageError, match=rf"{stage}.*altered"):
            lab.run(stage=chosen)


def test_an_edited_verdict_is_13(lab: Lab) -> None:
    lab.decisions["rm"] = "FAIL"
    with pytest.raises(GateError):
        lab.run()
    path = lab.path("rm") / "verdict.json"
    path.write_text(path.read_text().replace("FAIL", "PASS"))
    with pytest.raises(LineageError, match="not the verdict that the ledger holds"):
        lab.run(stage=Stage.ppo)


def test_a_verdict_with_a_hash_made_to_fit_is_13_by_the_ledger(lab: Lab) -> None:
    from rlhf.artifacts import canonical, sha256_text, write_json

    lab.decisions["rm"] = "FAIL"
    with pytest.raises(GateError):
        lab.run()
    path = lab.path("rm") / "verdict.json"
    record = {**read_json(path), "decision": "PASS"}
    del record["verdict_id"]
    write_json(path, {**record, "verdict_id": sha256_text(canonical(record))})
    with pytest.raises(LineageError, match="not the verdict that the ledger holds"):
        lab.run(stage=Stage.ppo)


def test_no_verdict_is_13(lab: Lab) -> None:
    lab.run(stage=Stage.sft)
    lab.run(stage=Stage.rm)
    (lab.path("rm") / "verdict.json").unlink()
    with pytest.raises(LineageError, match=r"rm: has no verdict.*do=gate stage=rm"):
        lab.run(stage=Stage.ppo)


def test_a_parent_swapped_for_another_model_is_13(lab: Lab) -> None:
    lab.run()
    lab.run(run__dir=str(lab.folder / "other"), seed=1)
    shutil.rmtree(lab.path("sft"))
    shutil.copytree(lab.folder / "other" / "sft", lab.path("sft"))
    with pytest.raises(LineageError):
        lab.run(stage=Stage.ppo)


def test_a_stage_that_was_killed_is_resumed_under_the_same_configuration_only(lab: Lab) -> None:
    lab.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        lab.run()
    assert [p.name for p in (lab.path("sft") / "checkpoints").iterdir()] == ["step-1"]
    lab.fail_in = None
    with pytest.raises(ConfigError, match="another configuration"):
        lab.run(seed=5)
    assert lab.run() == 0
    assert "resumed" in [r["event"] for r in Ledger(lab.path("ledger.jsonl")).records]


def test_a_kill_right_after_the_manifest_leaves_nothing_undone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(run: Run, stage: str, manifest: Any) -> None:
        (run.dir / stage / "checkpoints" / "step-9").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_settle", killed)
        lab.run(stage=Stage.sft)
    for _ in range(2):
        assert lab.run(stage=Stage.sft) == 0
        assert lab.trained == ["sft"]
        assert not (lab.path("sft") / "started.json").exists() and not (lab.path("sft") / "checkpoints").exists()
        events = [json.loads(line)["event"] for line in lab.path("ledger.jsonl").read_text().splitlines()]
        assert events.count("finished") == 1


BRIEF = {"_target_": "reward_models.function.FunctionReward", "function": "builtins.len"}


def test_a_reward_that_takes_no_model_leaves_out_the_reward_model(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.run(reward=BRIEF) == 0
    assert lab.trained == ["sft", "ppo"]
    assert "rm: left out: the reward takes no `artifact`" in capsys.readouterr().out
    manifest = read_json(lab.path("ppo") / "manifest.json")
    assert list(manifest["parents"]) == ["sft"]
    assert manifest["status"] == "PROMOTED"
    assert verbs.plan(lab.config(reward=BRIEF)) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "│ rm │ │ left out │" in planned and "ppo reward" not in planned and "rm model" not in planned
    assert "│ ppo │ sft │ skipped │" in planned
    assert lab.run(reward=BRIEF) == 0
    assert lab.trained == ["sft", "ppo"]
    assert "next: load ppo/model" in capsys.readouterr().out


def test_ppo_alone_with_such_a_reward_needs_only_an_sft_model(lab: Lab, tiny_model: Path) -> None:
    lone = {"stage": Stage.ppo, "sft__artifact": str(tiny_model), "data__rankings__path": None}
    assert lab.run(**lone, reward=BRIEF) == 0
    assert lab.trained == ["ppo"]
    with pytest.raises(LineageError, match="rm: no finished artifact"):
        lab.run(**lone, run__dir=str(lab.folder / "other"), run__name="other")


def test_a_check_that_compares_by_a_reward_model_needs_one(lab: Lab, tiny_model: Path) -> None:
    def gate(**change: Any) -> GateConfig:
        return GateConfig(sft={}, rm={}, ppo={"better": CheckConfig(kind="win_rate", **change)})

    mend = r"gate\.ppo\.better\.record_only=true gate\.ppo\.better\.min=null, .* rm\.artifact"
    with pytest.raises(ConfigError, match=rf"^gate\.ppo\.better: .* {mend}"):
        lab.run(reward=BRIEF, gate=gate(min=0.5))
    assert lab.trained == []
    assert lab.run(reward=BRIEF, gate=gate(record_only=True)) == 0
    assert lab.trained == ["sft", "ppo"]
    for name, change in (("given", {"rm__artifact": str(tiny_model)}), ("made", {})):
        place = {"run__dir": str(lab.folder / name), "run__name": name}
        lab.run(stage=Stage.sft, **place)
        lab.run(stage=Stage.rm, **place, **change)
        assert lab.run(stage=Stage.ppo, reward=BRIEF, gate=gate(min=0.5), **place, **change) == 0
        assert list(read_json(lab.folder / name / "ppo" / "manifest.json")["parents"]) == ["rm", "sft"]


def test_a_gate_is_given_what_was_trained_on_and_what_ppo_was_paid_by(
    lab: Lab, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: dict[str, Any] = {}
    monkeypatch.setattr(judging, "judge", lambda request: asked.update({request.stage: request}) or lab.judge(request))
    overlap = {"contamination": CheckConfig(max=0.0)}
    gate = GateConfig(sft=overlap, rm=overlap, ppo={**overlap, "gold_reward": CheckConfig(min=0.0)},
                      baselines={"older": str(tiny_model)})  # fmt: skip
    with pytest.raises(ConfigError, match=r"gate\.ppo\.gold_reward: .*rm\.holdout=true"):
        lab.run(gate=gate)
    assert lab.trained == []
    assert lab.run(gate=gate, ppo__holdout=str(tiny_model)) == 0
    heldout = {row.prompt.messages[0]["content"] for row in asked["rm"].rankings}
    for stage, copies in (("sft", 1), ("rm", 2), ("ppo", 3)):  # demonstrations, rankings, PPO's prompts: the same 40
        said = [messages[0]["content"] for _, messages in asked[stage].training]
        assert len(said) == copies * (40 - len(heldout))
        assert heldout and not heldout & set(said)
    trained = "reward_models.trained.TrainedReward"
    assert asked["ppo"].gold == {"_target_": trained, "artifact": str(tiny_model)}
    assert asked["ppo"].paid == {"_target_": trained, "artifact": str(lab.path("rm") / "model")}
    assert asked["rm"].gold is None
    assert Path(asked["ppo"].parents["older"]).samefile(tiny_model)


def test_parents_from_another_run(lab: Lab) -> None:
    lab.run()
    sweep = str(lab.folder / "sweep")
    assert lab.run(run__dir=sweep, run__parents=str(lab.folder / "run"), stage=Stage.ppo, ppo__kl__coef=0.3) == 0
    assert lab.trained == ["sft", "rm", "ppo", "ppo"]
    assert sorted(p.name for p in Path(sweep).iterdir() if p.is_dir()) == ["ppo"]
    flip_a_byte(lab.path("rm") / "model" / "model.safetensors")
    with pytest.raises(LineageError, match="rm"):
        lab.run(run__dir=sweep, run__parents=str(lab.folder / "run"), stage=Stage.ppo, ppo__kl__coef=0.3)


def test_an_imported_model_is_digested_judged_and_recorded(lab: Lab, tiny_model: Path) -> None:
    lab.run(stage=Stage.rm, sft__artifact=str(tiny_model))
    assert lab.trained == ["rm"]
    manifest = read_json(lab.path("sft") / "manifest.json")
    assert (manifest["imported"], manifest["stop_reason"]) == (str(tiny_model), "imported")
    assert read_json(lab.path("rm") / "manifest.json")["parents"]["sft"] == manifest["digest"]
    assert lab.judged == ["sft", "rm"]


def test_a_run_that_ends_early_without_a_reason_is_an_error(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(cfg: Config, context: Any) -> StageResult:
        return StageResult(metrics={}, stop_reason="finished", updates=2, planned_updates=3)

    monkeypatch.setattr(sys.modules["stages.sft"], "run", short)
    with pytest.raises(TrainingError, match="2 of 3 updates"):
        lab.run()
    assert not (lab.path("sft") / "manifest.json").exists()


def test_two_processes_cannot_work_in_one_directory(lab: Lab) -> None:
    first = pipeline.Run(lab.config())
    with pytest.raises(LineageError, match="another process"):
        pipeline.Run(lab.config())
    first.close()
    pipeline.Run(lab.config()).close()


def test_an_unwritable_run_directory_is_a_config_error(lab: Lab) -> None:
    (lab.folder / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        lab.run(run__dir=str(lab.folder / "file" / "run"))


GOOD = '{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}\n'
MANY = "".join(GOOD.replace('"p"', f'"p{i}"') for i in range(40))
BAD_RANKINGS = {
    "missing file": (None, "no such file"),
    "empty file": (b"", "empty"),
    "broken JSON": ((GOOD * 2 + '{"prompt": \n').encode(), "rankings.jsonl:3"),
    "missing field": (b'{"prompt": "p", "responses": ["a", "b"]}\n', "rankings.jsonl:1"),
    "ranks of the wrong length": (b'{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}\n', "rankings.jsonl:1"),
    "NaN rank": (b'{"prompt": "p", "responses": ["a", "b"], "ranks": [1, NaN]}\n', "rankings.jsonl:1"),
    "not UTF-8": (GOOD.encode() + b'{"prompt": "\xff"}\n', "rankings.jsonl:2"),
    "over-long row": (MANY.replace('"a"', '"' + "a" * 500 + '"', 1).encode(), "data.on_overlong"),
}


@pytest.mark.parametrize("fault", BAD_RANKINGS)
def test_bad_rankings_are_one_message_before_the_first_stage_trains(lab: Lab, fault: str) -> None:
    text, needle = BAD_RANKINGS[fault]
    path = lab.folder / "rankings.jsonl"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(DataError) as raised:
        lab.run()
    assert needle in str(raised.value)
    assert raised.value.exit_code == 2
    assert lab.trained == []


@pytest.mark.parametrize(
    ("spoil", "needle"),
    [
        (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", pad_token=None), "pad"),
    ],
    ids=["no tokenizer", "no chat template", "no pad token"],
)
def test_a_model_folder_without_its_tokenizer_parts_is_a_config_error(
    lab: Lab, tmp_path: Path, spoil: Callable[[Path], object], needle: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(lab.model, folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=needle):
        lab.run(model__path=str(folder))
    assert lab.trained == []


def test_a_full_disk_while_saving_loses_nothing_saved_before(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.run(stage=Stage.sft)
    before = {p: p.read_bytes() for p in lab.path("sft").rglob("*") if p.is_file()}

    def full(cfg: Config, context: Any) -> StageResult:
        with atomic_folder(context.folder / "model") as part:
            (part / "half").write_text("half of the weights")
            raise OSError(errno.ENOSPC, "No space left on device", str(part))

    monkeypatch.setattr(sys.modules["stages.rm"], "run", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        verbs.dispatch(lab.config(stage=Stage.rm))
    assert {p: p.read_bytes() for p in lab.path("sft").rglob("*") if p.is_file()} == before
    assert not list(lab.path("rm").glob("*model*"))
    monkeypatch.setattr(sys.modules["stages.rm"], "run", lab.train("rm"))
    assert lab.run(stage=Stage.rm) == 0


def test_rows_longer_than_the_models_positions_are_a_config_error(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length=300 exceeds the 256 positions.*data.max_length=256 fits"):
        lab.run(data__max_length=300)
    assert lab.trained == []


def test_a_reward_that_does_not_exist_is_found_before_the_first_stage_trains(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"reward\._target_: reward_models\.nothing"):
        lab.run(reward={"_target_": "reward_models.nothing.Reward"})
    assert lab.trained == []


def test_observe_ends_with_a_failing_parents_code_though_the_stage_itself_passes(lab: Lab) -> None:
    lab.decisions["rm"] = "FAIL"
    with pytest.raises(GateError):
        lab.run()
    with pytest.raises(GateError, match="rm gate: FAIL"):
        lab.run(stage=Stage.ppo, gate__mode=GateMode.observe)
    assert read_json(lab.path("ppo") / "manifest.json")["status"] == "UNPROMOTED"


def test_more_evidence_is_judged_anew(lab: Lab) -> None:
    lab.decisions["sft"] = "INCONCLUSIVE"
    with pytest.raises(GateError):
        lab.run(stage=Stage.sft)
    rows = [{"prompt": f"my toaster {i} hums"} for i in range(30)]
    (lab.folder / "gate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab.decisions["sft"] = "PASS"
    assert lab.run(stage=Stage.sft, data__gate_prompts=SourceConfig(path=str(lab.folder / "gate.jsonl"))) == 0
    assert lab.judged == ["sft", "sft"]
    assert lab.trained == ["sft"]


def test_a_refused_command_leaves_the_runs_config_as_it_was(lab: Lab) -> None:
    lab.run()
    before = lab.path("config.yaml").read_text()
    with pytest.raises(ConfigError):
        lab.run(seed=7)
    assert lab.path("config.yaml").read_text() == before


def test_each_stages_config_lies_beside_its_verdict(lab: Lab, tiny_model: Path) -> None:
    """As it was trained; the gate's part as it was judged, and a stage that is not made again keeps its own."""
    lab.run(stage=Stage.sft)
    lab.run(stage=Stage.rm, sft__optim__epochs=9.0, gate__sft={"degenerate": CheckConfig(max=0.25)})
    sft, rm = load_run(lab.path("")).stages["sft"].config, load_run(lab.path("")).stages["rm"].config
    assert sft and rm
    assert sft["sft"]["optim"]["epochs"] == lab.config().sft.optim.epochs != 9.0 == rm["sft"]["optim"]["epochs"]
    assert sft["gate"]["sft"]["degenerate"]["max"] == rm["gate"]["sft"]["degenerate"]["max"] == 0.25
    assert (sft["stage"], rm["stage"]) == ("sft", "rm")
    kept = (lab.path("sft") / "config.yaml").read_text()
    lab.run(stage=Stage.sft, launch__threads=1, gate__sft={"degenerate": CheckConfig(max=0.25)})
    assert (lab.path("sft") / "config.yaml").read_text() == kept
    other = str(lab.folder / "other")
    lab.run(stage=Stage.sft, sft__artifact=str(tiny_model), run__dir=other, run__name="other")
    imported = load_run(other).stages["sft"].config
    assert imported and imported["sft"]["artifact"] == str(tiny_model)


def test_parents_that_are_no_run_directory(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"run\.parents: .*typo is not a run directory"):
        lab.run(run__parents=str(lab.folder / "typo"), stage=Stage.ppo)


def test_a_recipe_is_read_without_importing_its_stage() -> None:
    code = (
        "import sys; from rlhf.manifest import recipe_of; found = [recipe_of(s) for s in ('sft', 'rm', 'ppo')];"
        "assert not {'stages.sft', 'stages.rm', 'stages.ppo', 'trl'} & set(sys.modules);"
        "import stages.sft, stages.rm, stages.ppo;"
        "assert found == [stages.sft.RECIPE, stages.rm.RECIPE, stages.ppo.RECIPE]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
