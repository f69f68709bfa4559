"""What `do=plan` says a stage holds at most, beside what it does hold.

    python benchmarks/memory.py --model MODEL                     each setting, on CPU, for minutes
    python benchmarks/memory.py --model MODEL --only sft rm-lora  some of them

Each stage runs in processes of its own through the pipeline, on rows of the greatest length. Measured is the high-water
mark of the process (VmHWM), above what it holds when the stage begins and everything is imported; of several ranks the
highest. MALLOC_MMAP_THRESHOLD_ gives freed memory back to the system at once: else the mark would also hold what the C
library keeps for later. `--as-is` leaves that out: a worker keeps it. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from process import memory
from stage_runs import arguments_of, configuration, run_ranks, watch, write_data, write_reward_model

MIB = 2**20
SETTINGS: dict[str, tuple[str, ...]] = {
    "sft": (), "rm": (), "ppo": (), "sft-lora": ("lora=r16",), "rm-lora": ("lora=r16",), "ppo-lora": ("lora=r16",),
    "sft-ddp": ("launch.gpus=2",), "sft-zero2": ("engine=zero2", "launch.gpus=2"),
    "rm-zero3": ("engine=zero3", "launch.gpus=2"), "ppo-zero2": ("engine=zero2", "launch.gpus=2"),
}  # fmt: skip
SHAPES = (
    "data.holdout=0.2", "data.max_length=256", "data.max_prompt_length=160", "sft.optim.batch=16",
    "sft.optim.micro_batch=8", "rm.optim.batch=8", "rm.optim.micro_batch=4", "ppo.updates=2", "ppo.batch=8",
    "ppo.minibatch=8", "ppo.micro_tokens=1024", "ppo.max_new_tokens=64", "ppo.decode_group=4", "ppo.eval_every=1",
)  # fmt: skip
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rise(perform: Callable[[], Any], stage: str) -> int:
    """The bytes by which this process's memory rises inside the stage."""
    for module in (f"stages.{stage}", "peft", "deepspeed"):
        importlib.import_module(module)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark begins anew: man 5 proc
    perform()
    return memory("VmHWM") - before


def main() -> None:
    parser = arguments_of(__doc__, SETTINGS)
    parser.add_argument("--as-is", action="store_true", help="with freed memory kept, as a worker keeps it")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        watch(arguments.rank, rise)
        return
    from rlhf.pipeline import Run
    from rlhf.plan_memory import role_sizes, stage_peak

    print(f"{'setting':10} {'rest':>6} {'training':>9} {'reading':>8} {'plan MiB':>9} {'measured':>9} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), arguments.model.resolve()
        data = write_data(folder, 40, (300, 300), (70, 70))
        write_reward_model(model, folder / "rm")
        for setting in arguments.only:
            stage, overrides = setting.partition("-")[0], [*SHAPES, *data, *SETTINGS[setting]]
            cfg = configuration(stage, model, folder, setting, overrides)
            run = Run(cfg, read_only=True)
            rest, trains, reads = stage_peak(run, stage, role_sizes(run))
            planned = rest + max(trains, reads)
            found = max(run_ranks(cfg, __file__, {} if arguments.as_is else AT_ONCE))
            print(
                f"{setting:10} {rest / MIB:6.0f} {trains / MIB:9.0f} {reads / MIB:8.0f} {planned / MIB:9.0f} "
                f"{found / MIB:9.0f} {planned / found:6.2f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
