"""What do=plan says of each stage is what do=run then does, and the plan itself changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_lab import Lab, flip_a_byte

from rlhf import plan_memory
from rlhf.config import CheckConfig, Dtype, EngineKind, GateConfig, GateMode, LaunchConfig, LoraConfig, Stage
from rlhf.engine.crew import Crew
from rlhf.engine.ranks import Ranks
from rlhf.errors import ConfigError, GateError, LineageError
from rlhf.footprint import Shapes
from rlhf.pipeline import Run
from rlhf.plan import _batches, plan_tables
from rlhf.plan_memory import MIB, ranks_asked
from rlhf.verbs import chosen

STAGES = ("sft", "rm", "ppo")


@pytest.fixture
def decoding_of_37_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_memory, "cache_bytes", lambda *_, recorded: 80 if recorded else 30)
    monkeypatch.setattr(plan_memory, "noise_bytes", lambda *_: 7)


def planned(lab: Lab, **changes: Any) -> dict[str, tuple[str, str]]:
    """For each stage what it would be, and why."""
    before = sorted(lab.folder.rglob("*"))
    cfg = lab.config(**changes)
    run = Run(cfg, read_only=True, crew=Crew(Ranks(size=ranks_asked(cfg))))
    stages = chosen(run)
    graph = next(plan_tables(run, stages))
    assert sorted(lab.folder.rglob("*")) == before
    rows, _, actions, whys = ([str(cell) for cell in column.cells] for column in graph.columns)
    return dict(zip(rows, zip(actions, whys, strict=True), strict=True))


@pytest.mark.parametrize(
    ("changes", "anew", "whys"),
    [
        ({"ppo__kl__coef": 0.2}, ["ppo"], [r"kl\.coef: 0\.05 -> 0\.2"]),
        ({"seed": 5}, ["sft", "rm", "ppo"], ["seed: 0 -> 5", "sft would change", "rm, sft would change"]),
    ],
    ids=["ppo alone", "all"],
)
def test_a_changed_stage_is_refused_or_with_fresh_made_anew(
    lab: Lab, changes: dict[str, Any], anew: list[str], whys: list[str]
) -> None:
    lab.run()
    refused, fresh = planned(lab, **changes), planned(lab, **changes, run__fresh=True)
    for stage, why in zip(anew, whys, strict=True):
        assert fresh[stage][0] == "run" and re.search(f"{why}; the old one is kept aside", fresh[stage][1])
    assert refused[anew[0]][0] == "refused" and re.search(f"{whys[0]}; run.fresh=true or", refused[anew[0]][1])
    assert [refused[stage] for stage in anew[1:]] == [("not reached", f"{anew[0]} is refused")] * (len(anew) - 1)
    for plan in (refused, fresh):
        assert {plan[stage][0] for stage in STAGES if stage not in anew} <= {"skipped"}
    with pytest.raises(ConfigError, match="another configuration"):
        lab.run(**changes)
    lab.trained.clear()
    assert lab.run(**changes, run__fresh=True) == 0
    assert lab.trained == anew
    assert {action for action, _ in planned(lab, **changes).values()} == {"skipped"}


def test_an_unfinished_stage_is_resumed_refused_or_with_fresh_made_anew(lab: Lab) -> None:
    lab.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        lab.run()
    assert planned(lab, run__fresh=True)["sft"] == ("resumed", "from step-1")
    assert planned(lab, seed=5)["sft"][0] == "refused"
    action, why = planned(lab, seed=5, run__fresh=True)["sft"]
    assert (action, why) == ("run", "unfinished under another configuration; the old one is kept aside")


def test_fresh_does_not_take_altered_weights_from_the_same_inputs(lab: Lab) -> None:
    """do=run puts a stage aside for its inputs, whatever became of its weights, and for nothing else."""
    lab.run()
    flip_a_byte(lab.path("ppo") / "model" / "model.safetensors")
    action, why = planned(lab, run__fresh=True)["ppo"]
    assert action == "refused" and "altered" in why
    with pytest.raises(LineageError, match=r"ppo.*altered"):
        lab.run(run__fresh=True)
    assert planned(lab, ppo__kl__coef=0.2, run__fresh=True)["ppo"][0] == "run"


def test_what_ends_the_command_before_any_stage_is_a_row_of_its_own(lab: Lab) -> None:
    lab.run()
    flip_a_byte(lab.path("sft") / "model" / "model.safetensors")
    plan = planned(lab, stage=Stage.ppo)
    assert plan["before any"][0] == "refused" and "altered" in plan["before any"][1]
    assert plan["ppo"] == ("not reached", "the command ends before any stage")
    with pytest.raises(LineageError, match="altered"):
        lab.run(stage=Stage.ppo)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_with_the_nearest_that_do(lab: Lab) -> None:
    changes = {"launch": LaunchConfig(gpus=3), "sft__optim__batch": 16}
    says = "sft.optim.batch=16 rows do not divide among 3 ranks: 15 or 18 do"
    plan = planned(lab, **changes)
    assert plan["before any"] == ("refused", says) and plan["sft"][0] == "not reached"
    _, _, cut, _ = ([str(cell) for cell in column.cells] for column in _batches(lab.config(**changes)).columns)
    assert cut[0] == says


def test_a_model_whose_passes_cannot_be_counted_is_planned_all_the_same(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel for tensors without data\nand more")

    monkeypatch.setattr("rlhf.plan_memory.stage_peak", fails)
    run = Run(lab.config(launch=LaunchConfig(gpus=2)), read_only=True)
    tables = {str(table.title): table for table in plan_tables(run, STAGES)}
    (peaks,) = (table for title, table in tables.items() if title.startswith("peak"))
    assert list(peaks.columns[2].cells) == ["not counted"] * 3
    assert next(iter(peaks.columns[4].cells)) == "RuntimeError: no kernel for tensors without data"
    assert any("memory on each of 2 ranks, engine=ddp" in title for title in tables), "the engine that will run"


@pytest.mark.usefixtures("decoding_of_37_bytes")
@pytest.mark.parametrize(
    ("engine", "ranks", "sft", "rm", "ppo"),
    [
        # weights 4, moments 8 a weight; a pass holds the gradients already
        ("single", 1, (12000, 9000, 500), (12000, 7000, 0), (12000 + 9600 + 4000 + 4000, 8000, 4537)),
        # the buffers that gradients are sent from, 4 a weight
        ("single", 2, (12000, 13000, 500), (12000, 11000, 0), (12000 + 9600 + 4000 + 4000, 12000, 4537)),
        # half of the weights and moments; half of the gradients, those that are sent, and the weights gathered
        ("zero3", 2, (6000, 9000 - 2000 + 8000, 500), (6000, 13000, 0), (6000 + 4800 + 2000 + 4000, 14000, 4537)),
    ],
)
def test_what_a_stage_holds_is_the_sum_of_its_parts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, engine: str, ranks: int, sft: Any, rm: Any, ppo: Any
) -> None:
    """Models of 1,000 weights, a critic of 800, a frozen reference, the average of the policy's weights; beside what
    decoding reads, the cache, the noise and a copy of the policy whose weights are packed."""
    passes = {"sft": 9000.0, "rm": 7000.0, "ppo": 8000.0, "read": 500.0}
    monkeypatch.setattr(plan_memory, "_pass", lambda run, stage, kind, shapes: passes[kind])
    sizes = [("sft model", 1000, 1000), ("rm model", 1000, 1000), ("ppo policy", 1000, 1000), ("ppo critic", 800, 800),
             ("ppo reference", 1000, 0)]  # fmt: skip
    changes = {"engine__kind": EngineKind[engine], "launch": LaunchConfig(gpus=ranks, device="cpu"), "ppo__ema": 0.5}
    run = Run(lab.config(**changes), read_only=True)
    for stage, parts in (("sft", sft), ("rm", rm), ("ppo", ppo)):
        assert plan_memory.stage_peak(run, stage, sizes) == parts, stage
    monkeypatch.setattr(plan_memory, "stage_peak", lambda *_: (2.0 * MIB, 5.0 * MIB, 3.0 * MIB))
    assert plan_memory._cells(run, "ppo", sizes) == ["2", "5", "3", "7"]


def test_a_pass_is_counted_once_for_all_that_it_depends_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(99))
    monkeypatch.setattr(plan_memory, "_counted", {})
    monkeypatch.setattr(plan_memory, "peak_of", lambda *_: next(numbers))

    def counted(rows: int = 1, kind: str = "sft", **changes: Any) -> float:
        return plan_memory._pass(Run(lab.config(**changes), read_only=True), "sft", kind, Shapes(rows, 8))

    small, large = (LoraConfig(enabled=True, r=r) for r in (4, 8))
    assert [counted(), counted()] == [0, 0]
    assert [counted(rows=2), counted(kind="read"), counted(sft__lora=small), counted(sft__lora=large)] == [1, 2, 3, 4]
    assert [counted(model__activation_checkpointing=True), counted(model__dtype=Dtype.bfloat16)] == [5, 6]


def test_ranks_that_would_wait_while_others_decode_are_told(lab: Lab) -> None:
    """A batch of 128 in groups of 64 keeps two ranks at work; groups of 16 keep eight."""
    changes = {"ppo__batch": 128, "ppo__minibatch": 64, "ppo__decode_group": 64}
    for gpus, says in ((2, None), (8, "; 6 of 8 ranks wait while 2 decode: ppo.decode_group=16 gives each a group")):
        table = _batches(lab.config(launch=LaunchConfig(gpus=gpus), **changes))
        cell = str(list(table.columns[2].cells)[2])
        assert cell.endswith(says or "epochs")


def test_a_gate_that_said_no_ends_the_plan_too(lab: Lab) -> None:
    """Unless the policy changed since, or gates only observe: then do=run goes on, as far as anyone can say."""
    lab.decisions["sft"] = "FAIL"
    with pytest.raises(GateError):
        lab.run(gate__mode=GateMode.observe)
    refused = planned(lab)
    assert refused["sft"][0] == "skipped"
    assert [refused[stage] for stage in ("rm", "ppo")] == [("not reached", "the sft gate says FAIL")] * 2
    assert planned(lab, gate__mode=GateMode.observe)["rm"][0] == "skipped"
    other = GateConfig(
        sft={"degenerate": CheckConfig(max=0.4)}, rm=lab.config().gate.rm, ppo=lab.config().gate.ppo
    )  # fmt: skip
    assert planned(lab, gate=other)["rm"][0] == "skipped"
    lab.trained.clear()
    with pytest.raises(GateError):
        lab.run()
    assert lab.trained == []


def test_an_imported_model_is_taken_kept_or_refused_as_do_run_does(lab: Lab, tiny_model: Path) -> None:
    own = lab.folder / "own"
    shutil.copytree(tiny_model, own)
    taken = {"sft__artifact": str(own)}
    assert planned(lab, **taken)["sft"] == ("imported", str(own))
    lab.run(**taken)
    assert {action for action, _ in planned(lab, **taken).values()} == {"skipped"}
    flip_a_byte(own / "model.safetensors")
    plan, fresh = planned(lab, **taken), planned(lab, **taken, run__fresh=True)
    assert plan["sft"][0] == "refused" and "altered" in plan["sft"][1] and plan["rm"][0] == "not reached"
    assert [fresh[stage][0] for stage in STAGES] == ["imported", "run", "run"]
    with pytest.raises(LineageError, match="altered"):
        lab.run(**taken)
    assert "sft.artifact: " in planned(lab, sft__artifact=str(tiny_model))["sft"][1]
    with pytest.raises(ConfigError, match=r"sft\.artifact: "):
        lab.run(sft__artifact=str(tiny_model))


@pytest.mark.usefixtures("decoding_of_37_bytes")
@pytest.mark.parametrize(("dtype", "packed"), [(Dtype.float32, 4000), (Dtype.bfloat16, 0)])
def test_only_the_policy_is_packed_and_only_in_float32(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, dtype: Dtype, packed: int
) -> None:
    monkeypatch.setattr(plan_memory, "_pass", lambda *_: 500.0)
    sizes = [("ppo policy", 1000, 1000), ("ppo reference", 1000, 0), ("ppo reward × 3", 3000, 0)]
    run = Run(lab.config(model__dtype=dtype, launch=LaunchConfig(device="cpu")), read_only=True)
    assert plan_memory.stage_peak(run, "ppo", sizes)[2] == 537 + packed


@pytest.mark.usefixtures("decoding_of_37_bytes")
def test_on_a_gpu_the_cache_has_the_room_of_recorded_steps(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_memory, "_pass", lambda *_: 500.0)
    run = Run(lab.config(), read_only=True)
    run.device = torch.device("cuda")
    assert plan_memory.stage_peak(run, "ppo", [("ppo policy", 1000, 1000)])[2] == 500 + 80 + 7
