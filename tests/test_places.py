"""Which rank a process is, from the variables that each launcher sets."""

from __future__ import annotations

import pytest

from rlhf.errors import ConfigError
from rlhf.places import Place, first_host, place_from

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[03-04,11]", "SLURM_JOB_NODELIST": "gpu[01-11]",
}  # fmt: skip


def test_torchs_variables_are_read_and_given_back() -> None:
    place = place_from(TORCHRUN)
    assert place == Place(rank=3, size=4, local_rank=1, address="node7", port=29511)
    assert place is not None and place.variables() == TORCHRUN


def test_no_launcher_is_no_place() -> None:
    assert place_from({"PATH": "/bin"}) is None


def test_torchs_variables_go_before_slurms() -> None:
    assert place_from({**SRUN, **TORCHRUN}) == place_from(TORCHRUN)


def test_slurms_task() -> None:
    """1,234,567 * 16 + 3 = 19,753,075, which is 13,075 above a multiple of 20,000."""
    assert place_from(SRUN) == Place(rank=5, size=8, local_rank=1, address="gpu03", port=33_075)
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert place_from({**SRUN, **chosen}) == Place(rank=5, size=8, local_rank=1, address="10.0.0.1", port=4000)


def test_the_batch_script_is_no_task() -> None:
    """sbatch and salloc set SLURM_PROCID=0 and SLURM_NTASKS too: taken for a rank, it would wait for ever."""
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    assert place_from(batch) is None


def test_the_only_task_of_a_step_is_no_rank() -> None:
    """Such as a job of submitit's, which starts ranks of its own."""
    assert place_from({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"), ("a,b", "a"), ("a[03-07,9]-ib,b", "a03-ib"), ("n[12,15-17]", "n12"),
        ("n[1-2]c[4-5]", "n1c4"), ("gpu-a-7", "gpu-a-7"), ("node[1]", "node1"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"MASTER_PORT": None},
            "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR: set in the environment without MASTER_PORT",
        ),
        ({"RANK": "x"}, "RANK='x': must be a whole number"),
        ({"RANK": "4"}, "RANK=4: must be in 0 .. WORLD_SIZE - 1 = 3"),
        ({"RANK": "-1"}, "RANK=-1: must be in 0"),
    ],
)
def test_half_an_environment_is_refused(change: dict[str, str | None], says: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError) as raised:
        place_from(environ)
    assert says in str(raised.value)
