"""One run, whatever the engine and the number of ranks: the same losses, weights that open anywhere, exact resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import Job, in_turn, perform, run_jobs
from pipeline_lab import flip_a_byte
from runs import TINY, read_json, rlhf, write_data
from safetensors.torch import load_file
from supervised_toys import tiny_base
from two_ranks import TwoRanks

from rlhf.artifacts import check_made_by, checkpoints, seal, write_json
from rlhf.checkpoints import find_resume, finish_checkpoint, load_best, missing_files, read_best, save_best
from rlhf.config import EngineKind, shared_batch
from rlhf.engine.deepspeed import choose_backend
from rlhf.engine.ranks import Ranks
from rlhf.errors import ConfigError, TrainingError
from rlhf.sharing import SharedRows, micro_steps, own_share

CORE = [("sft", "full", "ddp", 24), ("rm", "lora", "zero2", 21), ("sft", "full", "zero3", 21)]
MATRIX = [
    (stage, tuning, engine, rows)
    for stage in ("sft", "rm")
    for tuning in ("full", "lora")
    for engine in ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
    for rows in (21, 24)  # 21 leaves five rows for the last update: in its second pass rank 0 has none
    if (stage, tuning, engine, rows) not in CORE
]
Cell = tuple[str, str, str, int]


class Lab:
    """Jobs on two ranks, and the same on one rank without an engine."""

    def __init__(self, folder: Path, pair: TwoRanks) -> None:
        self.folder, self.base, self.pair = folder, tiny_base(folder / "base"), pair
        self._alone: dict[str, tuple[Path, dict[str, Any]]] = {}

    def job(self, cell: Cell, name: str, **changes: Any) -> Job:
        stage, tuning, engine, rows = cell
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        lora = tuning == "lora"
        job = Job(stage=stage, engine=engine, folder=str(folder), base=str(self.base), lora=lora, rows=rows)
        return job.changed(**changes)

    def alone(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """The folder and the record of one process."""
        name = "-".join((cell[0], cell[1], str(cell[3]), "alone"))
        if name not in self._alone:
            job = self.job((*cell[:2], "single", cell[3]), name)
            self._alone[name] = Path(job.folder), perform(job, Ranks())
        return self._alone[name]

    def together(self, cells: list[Cell]) -> list[tuple[Path, dict[str, Any]]]:
        jobs = [self.job(cell, "-".join(map(str, cell))) for cell in cells]
        return [(Path(job.folder), self.pair.call(in_turn, job)[0]) for job in jobs]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, pair: TwoRanks) -> Lab:
    return Lab(tmp_path_factory.mktemp("engines"), pair)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return found


def agree(found: tuple[Path, dict[str, Any]], expected: tuple[Path, dict[str, Any]]) -> None:
    """Three updates' losses, gradient norms and held-out losses to 1e-5; the weights as far as Adam's first steps,
    which are the signs of gradients, let tiny ones decide."""
    for series in ("train/loss", "train/grad_norm", "eval/loss"):
        assert found[1][series].keys() == expected[1][series].keys()
        assert found[1][series] == pytest.approx(expected[1][series], rel=1e-5), series
    assert len(found[1]["train/loss"]) == found[1]["updates"] == 3
    assert found[1]["metrics"] == pytest.approx(expected[1]["metrics"], rel=1e-4)
    left, right = weights(found[0]), weights(expected[0])
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=1e-4), name
    assert (found[0] / "adapter").is_dir() == (expected[0] / "adapter").is_dir()


def test_two_ranks_make_the_updates_of_one(lab: Lab) -> None:
    """The core of the matrix, one job after the other on the same two processes."""
    for cell, found in zip(CORE, lab.together(CORE), strict=True):
        agree(found, lab.alone(cell))
        if cell[2] == "ddp":  # ranks whose passes differ in length meet in the update's gradient, and not before
            assert found[1]["meetings"] == {"passes": 6}


@pytest.mark.slow
def test_every_engine_makes_the_updates_of_one_process(lab: Lab) -> None:
    for cell, found in zip(MATRIX, lab.together(MATRIX), strict=True):
        agree(found, lab.alone(cell))
        if cell[2] == "ddp":
            assert found[1]["meetings"] == {"passes": 6}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "engine"), [("sft", "ddp"), ("sft", "zero2"), ("rm", "zero3")])
def test_bf16_has_the_losses_of_one_process_to_a_hundredth(lab: Lab, stage: str, engine: str) -> None:
    """bf16 arithmetic, and with DeepSpeed bf16 weights in the model. The losses of float32 are as far off."""
    cell = (stage, "full", engine, 24)
    job = lab.job(cell, f"bf16-{stage}-{engine}", bf16=True)
    alone = lab.job((stage, "full", "single", 24), f"bf16-{stage}-{engine}-alone", bf16=True)
    found, expected, exact = lab.pair.call(in_turn, job)[0], perform(alone, Ranks()), lab.alone(cell)[1]
    for series in ("train/loss", "eval/loss"):
        assert found[series] == pytest.approx(expected[series], rel=1e-2), series
        assert found[series] == pytest.approx(exact[series], rel=1e-2), series
    assert found["train/loss"] != exact["train/loss"], "it was bf16"


KINDS = [("sft", "full", "ddp"), ("sft", "full", "zero2"), ("rm", "full", "zero3"), ("sft", "lora", "zero3"),
         ("rm", "lora", "zero1")]  # fmt: skip


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_a_resume_ends_as_the_unbroken_run(lab: Lab) -> None:
    """Killed after update 5 of 6: what is gone on from is the checkpoint of update 4, in the second epoch."""
    for stage, tuning, engine in KINDS:
        cell = (stage, tuning, engine, 24)
        broken = lab.job(cell, f"broken-{stage}-{tuning}-{engine}", epochs=2, die_at=5)
        ended = run_jobs(lab.folder / "killed", [broken])
        assert ended == [[{}, {}]]
        whole = lab.job(cell, f"whole-{stage}-{tuning}-{engine}", epochs=2)
        resumed, unbroken = run_jobs(lab.folder / "resumed", [broken.changed(die_at=None), whole])
        assert set(resumed[0]["train/loss"]) == {"5", "6"}
        assert resumed[0]["train/loss"].items() <= unbroken[0]["train/loss"].items()
        assert resumed[0]["metrics"] == unbroken[0]["metrics"]
        left, right = weights(Path(broken.folder)), weights(Path(whole.folder))
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.slow
def test_what_cannot_go_on_says_so_on_every_rank(lab: Lab) -> None:
    """Stopped after update 3, then asked for with another engine; a checkpoint that lost files; one rank's NaN."""
    cell = ("sft", "full", "zero2", 24)
    stopped = lab.job(cell, "stopped", stop_at=3)
    torn = lab.job(cell, "torn", stop_at=2, epochs=2)
    ddp = lab.job(("sft", "full", "ddp", 24), "ddp", stop_at=2)
    jobs = [
        stopped.changed(stop_at=2), stopped.changed(stop_at=None, engine="ddp"),
        torn, torn.changed(stop_at=None, lose="global_step*/*rank_1*optim_states.pt"),
        ddp, ddp.changed(stop_at=None, lose="optimizer.pt"),
        lab.job(cell, "nan", nan_at=2), lab.job(("rm", "full", "ddp", 24), "nan-ddp", nan_at=2),
        lab.job(cell, "uneven").changed(micro=3),
    ]  # fmt: skip
    said = run_jobs(lab.folder / "refused", jobs)
    assert all(first == second for first, second in said)  # every rank ends alike
    errors = [ranks[0]["error"] for ranks in said]
    names = ["Preempted", "ConfigError", "Preempted", "TrainingError", "Preempted", "TrainingError", "TrainingError",
             "TrainingError", "ConfigError"]  # fmt: skip
    assert [kind for kind, _ in errors] == names, errors
    assert "made by engine=zero2 on 2 ranks, and this is engine=ddp on 2" in errors[1][1]
    assert "lacks the optimiser states of 1 of 2 ranks" in errors[3][1]
    assert "lacks optimizer.pt" in errors[5][1]
    assert "the loss of update 2 is nan" in errors[6][1] and "the loss of update 2 is nan" in errors[7][1]
    assert "sft.optim.micro_batch=3 does not divide the 4 rows" in errors[8][1]
    alone = perform(stopped.changed(stop_at=None, engine="single"), Ranks())
    assert "made by engine=zero2 on 2 ranks, and this is engine=single on 1" in alone["error"][1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 8, 12, 13])
def test_each_row_is_read_once_an_epoch_and_ranks_keep_step(rows: int, size: int, padded: bool) -> None:
    """Updates of 8 rows, cut into micro-batches of 2 a rank."""
    lengths = [1 + row % 5 for row in range(rows)]
    read_by = [SharedRows(lengths, 8, 2, Ranks(rank, size), lambda: 7, padded=padded) for rank in range(size)]
    epochs = [list(samples) for samples in read_by]
    assert {len(epoch) for epoch in epochs} == {len(samples) for samples in read_by}
    assert len({len(epoch) for epoch in epochs}) == 1
    read = [row for epoch in epochs for part in epoch for row in part if row >= 0]
    assert sorted(read) == list(range(rows))
    alone = list(SharedRows(lengths, 8, 2, Ranks(), lambda: 7, padded=True))
    first = {row for part in alone[:4] for row in part}  # of the first update
    steps = -(-8 // (2 * size))
    assert {row for epoch in epochs for part in epoch[:steps] for row in part if row >= 0} == first
    assert all(1 <= len(part) <= 2 for epoch in epochs for part in epoch)


def own_parts(rows: Sequence[int], micro: int, *, padded: bool) -> list[list[list[int]]]:
    """What each of two ranks reads of an update."""
    return [list(micro_steps(rows, micro, Ranks(rank, 2), padded=padded)) for rank in (0, 1)]


def test_a_rank_without_a_row_reads_one_that_does_not_count() -> None:
    """Seven rows, two a rank on two ranks: four, then three as two and one, since the order of the ranks turns."""
    rows = [10, 11, 12, 13, 14, 15, 16]
    assert own_parts(rows, 2, padded=True) == [[[10, 11], [15, 16]], [[12, 13], [14]]]
    assert own_parts(rows, 2, padded=False) == [[[10, 13], [15, 16]], [[11, 12], [14]]]
    assert own_parts([10], 2, padded=True) == [[[~10]], [[10]]]
    assert own_parts([10], 2, padded=False) == [[[10]], [[~10]]]


def test_ranks_have_as_much_to_do() -> None:
    """Sixteen rows of 16, 15, ... tokens. Two to a pass, padded: with the longer half each time rank 0 would have 80 of
    144. Eight to a pass, the longer half alone would be 100 of 136."""
    lengths = range(16, 0, -1)
    tokens = [[2 * lengths[part[0]] for part in parts] for parts in own_parts(range(16), 2, padded=True)]
    assert tokens == [[32, 20, 16, 4], [28, 24, 12, 8]]
    dealt = own_parts(range(16), 8, padded=False)
    assert dealt == [[[0, 3, 4, 7, 8, 11, 12, 15]], [[1, 2, 5, 6, 9, 10, 13, 14]]]
    assert [sum(lengths[row] for row in parts[0]) for parts in dealt] == [68, 68]


def test_evaluation_is_shared_with_as_many_passes_on_each_rank() -> None:
    assert own_share("abcde", Ranks(0, 2)) == (["a", "c", "e"], 3)
    assert own_share("abcde", Ranks(1, 2)) == (["b", "d", "a"], 2)
    assert own_share("a", Ranks(1, 2)) == (["a"], 0)


def test_a_checkpoint_is_for_the_engine_and_ranks_that_made_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt"):
        (folder / name).write_text("of one rank", encoding="utf-8")
    write_json(folder / "engine.json", {"engine": "single", "ranks": 1})
    seal(folder)
    assert find_resume(tmp_path, EngineKind.single, Ranks()) == folder
    with pytest.raises(ConfigError, match=r"made by engine=single on 1 ranks, and this is engine=zero2 on 1: go on"):
        find_resume(tmp_path, EngineKind.zero2, Ranks())
    write_json(folder / "engine.json", {"engine": "ddp", "ranks": 2})
    seal(folder)
    with pytest.raises(ConfigError, match=r"made by engine=ddp on 2 ranks, and this is engine=single on 1"):
        find_resume(tmp_path, EngineKind.single, Ranks())
    with pytest.raises(ConfigError, match=r"made by engine=ddp on 2 ranks, and this is engine=ddp on 4"):
        check_made_by(folder, ("ddp", 2), ("ddp", 4))


def test_a_sealed_checkpoint_that_lacks_a_file_is_not_gone_on_from(tmp_path: Path) -> None:
    """The Trainer would go on with a fresh optimiser and say nothing."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    names = {"trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt"}
    write_json(folder / "engine.json", {"engine": "single", "ranks": 1})
    for name in sorted(names):
        for other in names - {name}:
            (folder / other).write_text("of one rank", encoding="utf-8")
        (folder / name).unlink(missing_ok=True)
        seal(folder)
        with pytest.raises(TrainingError, match=f"checkpoint-2: lacks {name}: delete it"):
            find_resume(tmp_path, EngineKind.single, Ranks())
    for rank in (0, 1):
        (folder / f"rng_state_{rank}.pth").touch()
    assert missing_files(folder, EngineKind.ddp, 2) == ["trainer_state.json"]
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    lost = ["trainer_state.json", "latest", "the optimiser states of 1 of 2 ranks"]
    assert missing_files(folder, EngineKind.zero2, 2) == lost


def test_checkpoints_are_sealed_two_are_kept_and_a_torn_one_is_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt"):
            (folder / name).write_text("of one rank", encoding="utf-8")
        finish_checkpoint(tmp_path, step, EngineKind.single, Ranks())
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert read_json(folder / "engine.json") == {"engine": "single", "ranks": 1}
    (folder / "optimizer.pt").write_text("torn", encoding="utf-8")
    assert find_resume(tmp_path, EngineKind.single, Ranks()) == tmp_path / "checkpoint-2" and not folder.exists()
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-2: optimizer\.pt was not written"):
        finish_checkpoint(tmp_path, 2, EngineKind.single, Ranks())


def test_the_best_weights_are_those_of_the_model_and_whole(tmp_path: Path) -> None:
    model, other, best = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), tmp_path / "best"
    save_best(model, best, {"loss": 0.5}, EngineKind.single, Ranks())
    load_best(other, best)
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)
    assert read_best(best) == {"loss": 0.5}
    for wrong in (torch.nn.Linear(3, 3), torch.nn.Linear(2, 3, bias=False), torch.nn.Sequential(model)):
        with pytest.raises(TrainingError, match="the best weights are not those of the model"):
            load_best(wrong, best)
    flip_a_byte(best / "weights.safetensors")
    with pytest.raises(TrainingError, match="the best weights are torn or altered"):
        read_best(best)


def test_a_switch_that_a_trainer_on_deepspeed_has_left_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    choose_backend(EngineKind.ddp)
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_a_batch_that_does_not_divide_names_the_nearest_that_does() -> None:
    assert shared_batch(16, 4, 2, "rm.optim") == (4, 2)
    assert shared_batch(16, 16, 2, "rm.optim") == (8, 1)  # at most: a rank has 8 rows
    with pytest.raises(ConfigError, match=r"rm\.optim\.batch=15 rows do not divide among 4 ranks: 12 or 16 do"):
        shared_batch(15, 5, 4, "rm.optim")
    with pytest.raises(ConfigError, match=r"micro_batch=4 does not divide the 6 rows .*optim\.micro_batch=3 does"):
        shared_batch(12, 4, 2, "rm.optim")


def test_deepspeeds_configuration_is_that_of_its_json() -> None:
    from rlhf.engine.deepspeed import trainer_config

    made = trainer_config(EngineKind.zero3_offload, 2, 4, 1.0, bf16=True)
    assert json.loads(json.dumps(made)) == made
    assert (made["zero_optimization"]["stage"], made["bf16"]) == (3, {"enabled": True})
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.slow
def test_the_program_trains_on_two_ranks_and_another_engine_finds_it_done(tmp_path: Path, tiny_model: Path) -> None:
    """SFT under ZeRO-3, two reward models under ZeRO-2, as a user types it; the same on one rank; then a skip."""
    common = [*TINY, f"model.path={tiny_model}", *write_data(tmp_path), f"run.root={tmp_path}/runs", "rm.members=2"]
    ranked = ("launch.gpus=2", "run.name=ranks")
    for stage, engine in (("sft", "zero3"), ("rm", "zero2")):
        for options in ((f"engine={engine}", *ranked), ("run.name=alone",)):
            made = rlhf(*common, f"stage={stage}", *options, cwd=tmp_path)
            assert made.returncode in {0, 10, 11, 12}, made.stdout + made.stderr
        left, right = (read_json(tmp_path / "runs" / name / stage / "manifest.json") for name in ("ranks", "alone"))
        assert left["metrics"] == pytest.approx(right["metrics"], rel=1e-4)
        assert left["inputs"]["config"] == right["inputs"]["config"]
    assert (tmp_path / "runs" / "ranks" / "rm" / "members" / "1" / "manifest.json").exists()
    again = rlhf(*common, "stage=sft", "engine=ddp", *ranked, cwd=tmp_path)
    assert "sft: skipped" in again.stdout and again.stdout.count("skipped") == 1, again.stdout + again.stderr
    refused = rlhf(*common, "stage=sft", "engine=ddp", "launch.gpus=3", "run.name=three", cwd=tmp_path)
    assert refused.returncode == 2
    assert "sft.optim.batch=8 rows do not divide among 3 ranks: 6 or 9 do" in refused.stderr
